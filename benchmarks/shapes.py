"""Speed and memory against TRL where the work has another shape than in `speed.py`.

    python benchmarks/shapes.py --data HH_RLHF --tokenizer DIR --trl PYTHON [--layers 8] [--pairs 96] [--rounds 3]
        [--cases full,4bit,...] [--sweep]

How to make TRL's environment stands at the top of `peers/trl_trainers.py`; `4bit` wants bitsandbytes there. All is as
in `speed.py` but for what the case says:

full            every weight trained; TRL's are float32 under autocast, since what we step is float32 too
full-bf16       the same against TRL on bfloat16 weights: smaller, and most small steps round to nothing
4bit            NF4 with double quantisation under LoRA
long-prompt     450 words of prompt, answers of 40
long-answers    30 words of prompt, answers of 300
vocab-32k, vocab-128k, full-vocab-32k, full-vocab-128k
                32,768 and 131,072 words, LoRA and full fine-tune

Where both sizes of a vocabulary were run, it is said what the larger one adds to the peak of memory, beside what it
has to add: its rows' weights, and where they train their gradient and optimizer state.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common import (
    BATCH,
    HIDDEN,
    LIKE_TRL,
    SETTINGS,
    TRL,
    VOCABULARY,
    RunFailedError,
    Setting,
    Task,
    Trained,
    apart,
    arguments,
    cut_pairs,
    machine,
    make_model,
    make_pairs,
    ratios,
    same_tokens,
    spread,
    sweep,
    train_ours,
    train_peer,
)

SMALL, LARGE = 32_768, 131_072


@dataclass(frozen=True)
class Case:
    """What differs from `speed.py`."""

    ours: tuple[str, ...] = ()
    trl: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[int, int] | None = None  # of a prompt and of an answer
    vocabulary: int = VOCABULARY


FULL = ("lora=null",)
TRL_FULL = {"lora": False, "dtype": "float32"}
CASES = {
    "full": Case(FULL, TRL_FULL),
    "full-bf16": Case(FULL, {"lora": False}),
    "4bit": Case(("model.load_in_4bit=true",), {"load_in_4bit": True}),
    "long-prompt": Case(words=(450, 40)),
    "long-answers": Case(words=(30, 300)),
    "vocab-32k": Case(vocabulary=SMALL),
    "vocab-128k": Case(vocabulary=LARGE),
    "full-vocab-32k": Case(FULL, TRL_FULL, vocabulary=SMALL),
    "full-vocab-128k": Case(FULL, TRL_FULL, vocabulary=LARGE),
}


def added_memory(runs: Mapping[str, tuple[list[Trained], list[Trained]]]) -> None:
    """Say what a larger vocabulary adds to the peak, and what it has to add."""
    rows_gib = (LARGE - SMALL) * HIDDEN / 2**30  # a byte for each of the added weights
    must = {
        "": (2 * rows_gib, "their bfloat16 weights"),
        "full-": ((2 + 4 + 4 + 8) * rows_gib, "bfloat16 and float32 weights, gradient and Adam's moments"),
    }
    for kind, (gib, what) in must.items():
        if {f"{kind}vocab-32k", f"{kind}vocab-128k"} <= runs.keys():
            small, large = runs[f"{kind}vocab-32k"], runs[f"{kind}vocab-128k"]
            added = [
                statistics.median(run.peak_gib for run in more) - statistics.median(run.peak_gib for run in less)
                for less, more in zip(small, large, strict=True)
            ]
            print(
                f"\n{'full fine-tune' if kind else 'LoRA'}: {LARGE - SMALL:,} more words add {added[0]:.2f} GiB to "
                f"orpo and {added[1]:.2f} GiB to TRL; {what} are {gib:.2f} GiB"
            )


def compare(case: Case, scratch: Path, options: argparse.Namespace) -> tuple[list[Trained], list[Trained]]:
    """Our runs of a case and TRL's, in turn."""
    task = Task(scratch, scratch / "model", scratch / "pairs.jsonl", steps=options.pairs // BATCH)
    apart(make_model, task.model, options.layers, options.tokenizer, case.vocabulary)
    if case.words:
        apart(cut_pairs, task.pairs, options.data, options.pairs, *case.words)
    else:
        apart(make_pairs, task.pairs, options.data, options.tokenizer, options.pairs)

    def trl(task: Task, setting: Setting) -> Trained:
        return train_peer(task, options.trl, TRL, setting, **case.trl)

    setting = Setting()
    if options.sweep:
        setting = sweep("TRL", lambda setting: trl(replace(task, steps=min(2, task.steps)), setting), SETTINGS)
    ours, theirs = [], []
    for _ in range(options.rounds):
        ours.append(train_ours(task, LIKE_TRL, case.ours))
        theirs.append(trl(task, setting))
        same_tokens(ours[-1], theirs[-1])
    return ours, theirs


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help="which, separated by commas")
    parser.add_argument("--sweep", action="store_true", help="look for TRL's fastest setting first, in each case")
    options = parser.parse_args()
    if not options.trl:
        raise SystemExit("error: there is nothing to compare with\nhint: give --trl")
    names = options.cases.split(",")
    if unknown := set(names) - CASES.keys():
        raise SystemExit(f"error: no case {', '.join(sorted(unknown))}\nhint: there are {', '.join(CASES)}")

    print(f"{machine()}; {options.layers} layers, {options.pairs} pairs, {options.rounds} rounds: median and range")
    runs: dict[str, tuple[list[Trained], list[Trained]]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            try:
                runs[name] = compare(CASES[name], Path(directory), options)
            except RunFailedError as error:
                print(f"\n{name}: {error}", flush=True)
                continue
        ours, trl = runs[name]
        cells = [
            name,
            f"{ours[0].flat_tokens:,}",
            *(spread(run.pairs_per_second for run in side) for side in (ours, trl)),
            ratios(trl, ours, lambda run: sum(run.seconds)),
            *(spread(run.peak_gib for run in side) for side in (ours, trl)),
            ratios(trl, ours, lambda run: run.peak_gib),
        ]
        if options.sweep or len(runs) == 1:
            print("\n| | tokens | orpo, pairs/s | TRL, pairs/s | time, TRL / orpo ", end="")
            print("| orpo, GiB | TRL, GiB | memory, TRL / orpo |\n|---|---|---|---|---|---|---|---|")
        print(f"| {' | '.join(cells)} |", flush=True)
    added_memory(runs)


if __name__ == "__main__":
    main()
