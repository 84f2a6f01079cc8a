"""Speed and memory of a training run against TRL, LLaMA-Factory and the bare transformer.

    python benchmarks/speed.py --data HH_RLHF --tokenizer DIR [--trl PYTHON] [--llamafactory PYTHON]
        [--layers 8] [--pairs 96] [--rounds 3] [--sweep] [--set KEY=VALUE ...]

How to make the peers' environments stands at the top of the scripts in `peers/`.

The model is a random Llama of SmolLM2-135M's width (hidden 576, intermediate 1536, 9 heads over 3, vocabulary 49,152,
tied) in bfloat16, with LoRA r 16, alpha 32 on all linear layers, 16 pairs a step of at most 1,024 tokens. All sides
run in turn, round by round, on the same tokens in the same order, and each peer against the loss of ours that is its
own: `nll_tokens: all, nll_reduction: token` for TRL, `response, pair` for LLaMA-Factory. Ours runs with its defaults,
but for `--set`. The peers run at micro-batch 1 without checkpointing, the fastest on a CPU, under autocast, their own
default; `--sweep` looks for the fastest of micro-batch 1, 2, 4 and 8, each with and without checkpointing and without
autocast, in runs of two steps, and prints what it found.

Ratios are taken round by round: their median, and their range. A step of one pair a micro-batch weighs TRL's NLL by
pairs, not by tokens, so that its first loss differs a little from ours; `first_loss.py` compares them exactly.

The bare transformer is the stock backbone with frozen weights and SDPA, its inputs requiring a gradient: forward and
backward over as many tokens as our flat batches have, 1,024 a call, no head; best of three.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from common import (
    BATCH,
    HIDDEN,
    LIKE_LLAMAFACTORY,
    LIKE_TRL,
    LLAMAFACTORY,
    SETTINGS,
    TRL,
    Setting,
    Task,
    Trained,
    apart,
    arguments,
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

SWEEP_STEPS = 2
BARE_TOKENS = 1024


def bare_transformer(model: Path, tokens: int) -> float:
    """Seconds of the stock backbone's forward and backward over this many tokens; best of three."""
    import torch
    from transformers import AutoModelForCausalLM

    backbone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).base_model.requires_grad_(False)
    calls = [BARE_TOKENS] * (tokens // BARE_TOKENS) + [tokens % BARE_TOKENS]

    def once() -> float:
        started = time.perf_counter()
        for length in filter(None, calls):
            inputs = torch.randn(1, length, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
            hidden = backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state
            hidden.backward(torch.ones_like(hidden))
        return time.perf_counter() - started

    return min(once() for _ in range(3))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--llamafactory", metavar="PYTHON", help="the Python of an environment with LLaMA-Factory")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of our recipe")
    parser.add_argument("--sweep", action="store_true", help="look for the peers' fastest setting first")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        task = Task(scratch, scratch / "model", scratch / "pairs.jsonl", steps=options.pairs // BATCH)
        apart(make_model, task.model, options.layers, options.tokenizer)
        apart(make_pairs, task.pairs, options.data, options.tokenizer, options.pairs)

        def ours(nll: tuple[str, str]) -> Callable[[Task], Trained]:
            return lambda task: train_ours(task, nll, options.set)

        def peer(name: str, python: str, script: Path) -> Callable[[Task], Trained]:
            short, setting = replace(task, steps=min(SWEEP_STEPS, task.steps)), Setting()
            if options.sweep:
                setting = sweep(name, lambda setting: train_peer(short, python, script, setting), SETTINGS)
            print(f"\n{name}: {setting}", flush=True)
            return lambda task: train_peer(task, python, script, setting)

        sides = {"orpo, NLL like TRL": ours(LIKE_TRL), "orpo, NLL like LLaMA-Factory": ours(LIKE_LLAMAFACTORY)}
        against: dict[str, str] = {}  # peer -> the side of ours it is compared with
        if options.trl:
            sides["TRL"], against["TRL"] = peer("TRL", options.trl, TRL), "orpo, NLL like TRL"
        if options.llamafactory:
            sides["LLaMA-Factory"] = peer("LLaMA-Factory", options.llamafactory, LLAMAFACTORY)
            against["LLaMA-Factory"] = "orpo, NLL like LLaMA-Factory"

        # Programs and libraries into the page cache, for everyone alike.
        warm = {side: train(replace(task, steps=1, batch=2)) for side, train in sides.items()}
        for name, own in against.items():
            same_tokens(warm[own], warm[name])
        runs: dict[str, list[Trained]] = {side: [] for side in sides}
        bare: list[float] = []
        for _ in range(options.rounds):
            for side, train in sides.items():
                runs[side].append(train(task))
            bare.append(apart(bare_transformer, task.model, runs["orpo, NLL like TRL"][-1].flat_tokens))

    tokens = runs["orpo, NLL like TRL"][0].flat_tokens
    print(f"\n{machine()}")
    print(
        f"{options.layers} layers, {task.steps} steps of {task.batch} pairs, {tokens:,} tokens; "
        f"{options.rounds} rounds: median (lowest to highest)\n"
    )
    print("| | pairs/s over the steps | seconds in all | peak GiB | first loss | steps / bare transformer |")
    print("|---|---|---|---|---|---|")
    for side, of_side in runs.items():
        cells = [
            spread(run.pairs_per_second for run in of_side),
            spread(run.wall for run in of_side),
            spread(run.peak_gib for run in of_side),
            f"{of_side[0].first_loss:.4f}",
            spread(sum(run.seconds) / seconds for run, seconds in zip(of_side, bare, strict=True)),
        ]
        print(f"| {side} | {' | '.join(cells)} |")
    print(f"\nthe bare transformer takes {spread(bare)} s for these tokens, forward and backward")
    for name, own in against.items():
        print(
            f"{name} over orpo: time of the steps {ratios(runs[name], runs[own], lambda run: sum(run.seconds))}, "
            f"seconds in all {ratios(runs[name], runs[own], lambda run: run.wall)}, "
            f"memory {ratios(runs[name], runs[own], lambda run: run.peak_gib)}"
        )


if __name__ == "__main__":
    main()
