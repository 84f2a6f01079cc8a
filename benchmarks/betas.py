"""What beta does: the same base and pairs trained with several betas and seeds, judged on held-out pairs.

    python benchmarks/betas.py [--model MODEL --data PAIRS] [--betas 0,0.1,0.5] [--seeds 1,2,3] [--set KEY=VALUE ...]

Without a model and data, those of `orpo demo` are made. Each run is `orpo train` in a process of its own. Prints a
Markdown table: accuracy and mean log-probs of the held-out pairs before and after, the spread over seeds, and the wall
time of a whole run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from orpo_cli.demo import make_base, make_pairs

RECIPE = """\
model:
  name_or_path: {model}
lora: null
data:
  train: {data}
  eval: {{holdout: 100}}
  max_length: 512
train:
  learning_rate: 2e-3
  lr_scheduler_type: linear
  num_train_epochs: 3
output:
  merge: false
"""
FIGURES = ("accuracy", "chosen_logps", "rejected_logps")


def train(recipe: Path, directory: Path, settings: list[str]) -> tuple[dict, dict, float]:
    """One run: the evaluation row before the first step, `eval.json`, and the seconds of the whole process."""
    command = [sys.executable, "-m", "orpo_cli", "train", str(recipe), "--output-dir", str(directory)]
    started = time.perf_counter()
    subprocess.run([*command, *(a for s in settings for a in ("--set", s))], check=True, capture_output=True)
    seconds = time.perf_counter() - started
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return rows[0], json.loads((directory / "eval.json").read_text()), seconds


def spread(values: list[float]) -> str:
    """Mean and range, as text."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--betas", default="0,0.1,0.5")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()

    seeds = options.seeds.split(",")
    print(f"{platform.processor() or platform.machine()}, {len(seeds)} seeds; mean (lowest to highest)\n")
    print("| beta | accuracy | mean log-prob, chosen | mean log-prob, rejected | seconds a run |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        if options.model is None or options.data is None:
            options.model, options.data = f"{scratch}/base", f"{scratch}/pairs.jsonl"
            make_base(Path(options.model), seed=0)
            make_pairs(Path(options.data), count=400, seed=0)
            options.set += ["data.max_length=64"]
        recipe = Path(scratch) / "recipe.yaml"
        recipe.write_text(RECIPE.format(model=json.dumps(options.model), data=json.dumps(options.data)))
        for number, beta in enumerate(options.betas.split(",")):
            runs = [
                train(recipe, Path(scratch) / f"{beta}-{s}", [f"loss.beta={beta}", f"train.seed={s}", *options.set])
                for s in seeds
            ]
            if number == 0:
                before = runs[0][0]
                print("| base model | " + " | ".join(f"{before[f'eval_{name}']:.2f}" for name in FIGURES) + " | |")
            cells = [spread([after[name] for _, after, _ in runs]) for name in FIGURES]
            print(f"| {beta} | {' | '.join(cells)} | {spread([seconds for *_, seconds in runs])} |", flush=True)


if __name__ == "__main__":
    main()
