"""The data path alone: pairs a second, memory at two sizes of a stream, and the time to a resumed run's first pairs.

    python benchmarks/data_path.py --data PAIRS --tokenizer DIR [--pairs 1000000] [--resume-at 400000]

The rows of PAIRS are repeated, each with a number of its own in its prompt, and read under a template. Counted: the
pass that drops duplicates and holds 500 pairs out, then a step of 16 from the place to resume at. Counted before: the
same again, with the count that was kept. Not counted: an epoch in steps of 16, as with `max_steps`. Each is a process
of its own; memory is its peak as the kernel counts it, imports and all.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path

from common import BATCH, MAX_LENGTH, apart, machine, texts

SMALL = 10_000


def make(path: Path, data: str, count: int) -> None:
    """Write the pairs of `data` over and over, each with a number in its prompt."""
    pairs = list(texts(data))
    with path.open("w", encoding="utf-8") as file:
        for number, pair in enumerate(islice(cycle(pairs), count)):
            file.write(json.dumps({**pair, "prompt": f"{number}: {pair['prompt']}"}) + "\n")


def read(pairs: str, tokenizer: str, counted: bool, skip: int, steps: int) -> dict[str, float]:
    """Open a stream and make steps of it from a position on; all of it in this process.

    The seconds to open it and to the first step, pairs a second from there on, and the peak in MiB.
    """
    from orpo_cli.data.dataset import load_pairs
    from orpo_cli.data.order import Position
    from orpo_cli.model.build import load_text_side, pair_tokenizer
    from orpo_cli.recipe import Recipe

    started = time.perf_counter()
    data = {"train": pairs, "streaming": True, "max_length": MAX_LENGTH, "deduplicate": counted, "max_dropped": 1.0}
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": tokenizer, "chat_template": "chatml"},
            "data": data | ({"eval": {"holdout": 500}} if counted else {}),
            "train": {} if counted else {"max_steps": 1},
        }
    )
    training, _ = load_pairs(recipe.data, pair_tokenizer(recipe, load_text_side(recipe)), recipe.train)
    opened = time.perf_counter()
    stream = training.steps(BATCH, seed=0, shuffle=True, start=Position(0, skip), total_pairs=None)
    next(stream)
    first = time.perf_counter()
    made = sum(len(step) for step, _ in islice(stream, steps))
    return {
        "open": opened - started,
        "first": first - started,
        "pairs_per_second": made / (time.perf_counter() - first),
        "pairs": training.pairs or 0,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preference pairs, HH-RLHF for instance")
    parser.add_argument("--tokenizer", required=True, help="a directory")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--resume-at", type=int, default=400_000)
    options = parser.parse_args()

    print(f"{machine()}\n")
    print("| | rows | seconds to the first step | pairs/s | peak MiB |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch  # so that nothing is counted yet
        for count in (min(SMALL, options.pairs), options.pairs):
            path = Path(scratch) / f"{count}.jsonl"
            apart(make, path, options.data, count)
            skip = options.resume_at if count == options.pairs else 0
            for name, counted, start, steps in (
                ("counted", True, skip, 1),
                ("counted before", True, skip, 1),
                ("not counted, resumed", False, skip, 1),
                ("not counted", False, 0, count // BATCH),
            ):
                found = apart(read, str(path), options.tokenizer, counted, start, steps)
                rate = found["pairs"] / found["open"] if name == "counted" else found["pairs_per_second"]
                shown = f"{rate:,.0f}" if steps > 1 or name == "counted" else ""
                print(f"| {name} | {count:,} | {found['first']:.1f} | {shown} | {found['peak_mib']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
