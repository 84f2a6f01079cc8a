"""What one stage and no reference model save: ORPO against SFT with DPO or SimPO after it, on a larger base.

    python benchmarks/stages.py --data HH_RLHF --tokenizer DIR --trl PYTHON [--layers 8] [--pairs 96] [--rounds 3]
        [--keep DIR]

How to make TRL's environment stands at the top of `peers/trl_trainers.py`. The model is that of `speed.py`, every
weight of it trained, TRL's in float32 under autocast, micro-batch 1. All stages are TRL's own trainers on the same
pairs once, 16 a step, so that methods are compared and not tools; ours stands below them. DPO runs with its reference
model beside it and with the reference's log-probs computed beforehand. CPU seconds are of the whole process and all
its threads, imports and saving too, so that other work on the machine matters less than in wall time. A method of two
stages costs the sum of their seconds and the larger memory.

With `--keep` runs are kept there, and those that it has are not repeated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common import (
    BATCH,
    LIKE_TRL,
    TRL,
    Setting,
    Statement,
    Task,
    Trained,
    apart,
    arguments,
    kept,
    machine,
    make_model,
    make_pairs,
    same_tokens,
    spread,
    train_ours,
    train_peer,
)

FULL = {"lora": False, "dtype": "float32"}
TRAINERS: dict[str, Mapping[str, Any]] = {
    "SFT": {"trainer": "sft"},
    "ORPO": {"trainer": "orpo"},
    "DPO": {"trainer": "dpo"},
    "DPO, reference beforehand": {"trainer": "dpo", "config": {"precompute_ref_log_probs": True}},
    "SimPO": {"trainer": "simpo"},
}
OURS = {"orpo, beta 0": "0", "orpo, beta 0.1": "0.1"}
SECOND = ("DPO", "DPO, reference beforehand", "SimPO")


def statements(rounds: list[Mapping[str, Trained]]) -> list[Statement]:
    """What is to be seen, as figures that are to be positive."""

    def say(text: str, figure: Callable[[Mapping[str, Trained]], float]) -> Statement:
        return Statement(text, [figure(of) for of in rounds])

    said = [
        say("a run of ORPO takes more CPU time than one of SFT, times", lambda of: of["ORPO"].cpu / of["SFT"].cpu - 1),
        say(
            "a reference model beside it makes DPO take more memory, GiB",
            lambda of: of["DPO"].peak_gib - of["DPO, reference beforehand"].peak_gib,
        ),
    ]
    for second in SECOND:
        said += [
            say(
                f"SFT, then {second}, takes more CPU time than ORPO, times",
                lambda of, s=second: (of["SFT"].cpu + of[s].cpu) / of["ORPO"].cpu - 1,
            ),
            say(
                f"SFT, then {second}, takes more memory than ORPO, GiB",
                lambda of, s=second: max(of["SFT"].peak_gib, of[s].peak_gib) - of["ORPO"].peak_gib,
            ),
        ]
    return said


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs there, and go on with those it has")
    options = parser.parse_args()
    if not options.trl:
        raise SystemExit("error: there is nothing to compare with\nhint: give --trl")

    with tempfile.TemporaryDirectory() as name:
        scratch = (options.keep or Path(name)).resolve() / f"{options.layers} layers, {options.pairs} pairs"
        task = Task(scratch, scratch / "model", scratch / "pairs.jsonl", steps=options.pairs // BATCH)
        if not task.pairs.exists():
            scratch.mkdir(parents=True, exist_ok=True)
            apart(make_model, task.model, options.layers, options.tokenizer)
            apart(make_pairs, task.pairs, options.data, options.tokenizer, options.pairs)

        def train(side: str) -> Trained:
            if side in OURS:
                return train_ours(task, LIKE_TRL, ["lora=null", f"loss.beta={OURS[side]}"])
            return train_peer(task, options.trl, TRL, Setting(), **FULL, **TRAINERS[side])

        rounds = [
            {side: kept(scratch / str(i) / side, Trained, lambda _, side=side: train(side)) for side in TRAINERS | OURS}
            for i in range(options.rounds)
        ]

    for of in rounds:
        for side in TRAINERS.keys() - {"SFT"}:
            same_tokens(of["orpo, beta 0.1"], of[side])
    print(f"{machine()}\n{options.layers} layers, {options.pairs} pairs; {options.rounds} rounds: median and range\n")
    print("| | CPU seconds | wall | peak GiB |\n|---|---|---|---|")
    for side in rounds[0]:
        runs = [of[side] for of in rounds]
        cells = [spread(getattr(run, figure) for run in runs) for figure in ("cpu", "wall", "peak_gib")]
        print(f"| {side if side in OURS else f'TRL, {side}'} | {' | '.join(cells)} |")
    print("", *statements(rounds), sep="\n")


if __name__ == "__main__":
    main()
