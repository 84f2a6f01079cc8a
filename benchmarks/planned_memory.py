"""The peak of memory that `orpo check` plans, beside that of the run as the kernel counts it.

    python benchmarks/planned_memory.py --data HH_RLHF --tokenizer DIR [--layers 8] [--pairs 128] [--cases lora,4bit]

The model is that of `speed.py`; 16 pairs are a step, and 16 more are held out. A case is what the recipe sets:

lora, 4bit, full        as in `speed.py`, on NF4, and every weight trained
lora-merged, 4bit-merged    and the base merged at the end
lora-vocab-128k, full-vocab-128k    131,072 words instead of 49,152
lora-long, full-long    micro-batches of 4,096 tokens
lora-checkpointed       gradient checkpointing in all layers

Planned is the highest of training, evaluation and merging.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from common import (
    BATCH,
    LIKE_LLAMAFACTORY,
    VOCABULARY,
    Task,
    apart,
    arguments,
    machine,
    make_model,
    make_pairs,
    run_process,
    train_ours,
    write_recipe,
)

FULL, NF4, MERGED = "lora=null", "model.load_in_4bit=true", "output.merge=true"
LONG = "train.max_tokens_per_microbatch=4096"
CASES = {
    "lora": (),
    "4bit": (NF4,),
    "full": (FULL,),
    "lora-merged": (MERGED,),
    "4bit-merged": (NF4, MERGED),
    "lora-vocab-128k": (),
    "full-vocab-128k": (FULL,),
    "lora-long": (LONG,),
    "full-long": (FULL, LONG),
    "lora-checkpointed": ("model.gradient_checkpointing=true",),
}


def planned_gib(task: Task, overrides: tuple[str, ...]) -> float:
    """The plan's highest peak."""
    recipe = write_recipe(task, LIKE_LLAMAFACTORY)
    sets = [argument for override in overrides for argument in ("--set", override)]
    process = run_process([sys.executable, "-m", "orpo_cli", "check", recipe, "--json", *sets], task.scratch)
    memory = json.loads(process.output)["memory"]
    parts = [memory[name] for name in ("training", "evaluation", "merging") if memory[name]]
    return max(part.get("total", part.get("host")) for part in parts) / 2**30


def main() -> None:
    parser = arguments(__doc__, repeated=False)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--cases", default=",".join(CASES), help="which, separated by commas")
    options = parser.parse_args()
    names = options.cases.split(",")
    if unknown := set(names) - CASES.keys():
        raise SystemExit(f"error: no case {', '.join(sorted(unknown))}\nhint: there are {', '.join(CASES)}")

    print(f"{machine()}; {options.layers} layers, {options.pairs // BATCH} steps\n")
    print("| | planned GiB | measured GiB | planned over measured |\n|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as directory:
            scratch = Path(directory)
            task = Task(scratch, scratch / "model", scratch / "pairs.jsonl", steps=options.pairs // BATCH)
            vocabulary = 131_072 if "128k" in name else VOCABULARY
            apart(make_model, task.model, options.layers, options.tokenizer, vocabulary)
            apart(make_pairs, task.pairs, options.data, options.tokenizer, options.pairs + BATCH)
            overrides = (f"data.eval={{holdout: {BATCH}}}", *CASES[name])
            planned = planned_gib(task, overrides)
            measured = train_ours(task, LIKE_LLAMAFACTORY, overrides).peak_gib
        print(f"| {name} | {planned:.2f} | {measured:.2f} | {planned / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
