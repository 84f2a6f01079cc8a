"""Speed of an evaluation: `orpo eval` of a base model against TRL's `trainer.evaluate()`.

    python benchmarks/evaluation.py --data HH_RLHF --tokenizer DIR --trl PYTHON [--layers 8] [--pairs 96] [--rounds 3]

How to make TRL's environment stands at the top of `peers/trl_trainers.py`. The model is that of `speed.py`, and no side
has adapters. TRL runs at the fastest of micro-batch 1, 2, 4 and 8, with and without autocast, which is looked for
first. Pairs a second are of the evaluation alone: the model is loaded and the pairs are tokenised. Wall time and
memory are the whole process's. Ratios are taken round by round: their median, and their range.

The figures are compared at TRL's micro-batch of 1 and under autocast, where its loss is the mean over pairs of each
one's token mean, prompt included, as ours with `nll_tokens: all` and `nll_reduction: pair`. Ours runs by its default
too, which takes the NLL over the response.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from common import (
    HERE,
    MICRO,
    TRL,
    Evaluated,
    Setting,
    Task,
    apart,
    arguments,
    machine,
    make_model,
    make_pairs,
    peer_settings,
    ratios,
    run_process,
    spread,
    sweep,
    write_recipe,
)


def evaluate_ours(task: Task, nll_tokens: str) -> Evaluated:
    """One `orpo eval` of the base model."""
    recipe = write_recipe(task, (nll_tokens, "pair"))
    command = [sys.executable, HERE / "timed_eval.py", task.model, "--data", task.pairs, "--recipe", recipe]
    process = run_process(command, task.scratch)
    seconds, figures = process.output.split("\n", 1)
    told = json.loads(figures)
    return Evaluated(told["pairs"], float(seconds), told["loss"], told["accuracy"], process.wall, process.peak_gib)


def evaluate_trl(task: Task, python: str, setting: Setting) -> Evaluated:
    """The same by TRL."""
    process = run_process([python, TRL, peer_settings(task, setting, evaluate=True)], task.scratch)
    told = json.loads(process.output.splitlines()[-1])
    return Evaluated(**told, wall=process.wall, peak_gib=process.peak_gib)


def main() -> None:
    options = arguments(__doc__).parse_args()
    if not options.trl:
        raise SystemExit("error: there is nothing to compare with\nhint: give --trl")

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        task = Task(scratch, scratch / "model", scratch / "pairs.jsonl", steps=1)
        apart(make_model, task.model, options.layers, options.tokenizer)
        apart(make_pairs, task.pairs, options.data, options.tokenizer, options.pairs)

        ours, theirs = evaluate_ours(task, "all"), evaluate_trl(task, options.trl, Setting())
        assert ours.pairs == theirs.pairs
        print(f"{machine()}; {options.layers} layers, {ours.pairs} pairs\n")
        print("| | orpo | TRL |\n|---|---|---|")
        print(f"| loss | {ours.loss:.6f} | {theirs.loss:.6f} |")
        print(f"| accuracy | {ours.accuracy:.4f} | {theirs.accuracy:.4f} |")
        settings = [Setting(micro, autocast=autocast) for autocast in (True, False) for micro in MICRO]
        setting = sweep("TRL", lambda setting: evaluate_trl(task, options.trl, setting), settings)

        runs: dict[str, list[Evaluated]] = {"orpo, NLL like TRL": [], "orpo": [], "TRL": []}
        for _ in range(options.rounds):
            runs["orpo, NLL like TRL"].append(evaluate_ours(task, "all"))
            runs["orpo"].append(evaluate_ours(task, "response"))
            runs["TRL"].append(evaluate_trl(task, options.trl, setting))

    print(f"\nTRL: {setting}; {options.rounds} rounds: median (lowest to highest)\n")
    print("| | pairs/s | seconds in all | peak GiB |\n|---|---|---|---|")
    for side, of_side in runs.items():
        cells = [
            spread(run.pairs_per_second for run in of_side),
            spread(run.wall for run in of_side),
            spread(run.peak_gib for run in of_side),
        ]
        print(f"| {side} | {' | '.join(cells)} |")
    print()
    theirs_of_rounds = runs.pop("TRL")
    for side, of_side in runs.items():
        print(
            f"TRL over {side}: time of the evaluation {ratios(theirs_of_rounds, of_side, lambda run: run.seconds)}, "
            f"seconds in all {ratios(theirs_of_rounds, of_side, lambda run: run.wall)}, "
            f"memory {ratios(theirs_of_rounds, of_side, lambda run: run.peak_gib)}"
        )


if __name__ == "__main__":
    main()
