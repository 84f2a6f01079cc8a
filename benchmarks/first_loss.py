"""Whether the peers' loss is ours: one step of two pairs in one micro-batch, in float32 and in bfloat16.

    python benchmarks/first_loss.py --data HH_RLHF --tokenizer DIR [--trl PYTHON] [--llamafactory PYTHON] [--layers 8]

How to make the peers' environments stands at the top of the scripts in `peers/`. Model and adapters are those of
`speed.py`; fresh adapters change nothing, so that the first loss is the base's. It agrees if the relative difference
is below 1e-5 in float32 and below a bfloat16's rounding, 2^-8, in bfloat16. Exit code 1 if one does not.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import (
    LIKE_LLAMAFACTORY,
    LIKE_TRL,
    LLAMAFACTORY,
    TRL,
    Setting,
    Task,
    apart,
    arguments,
    make_model,
    make_pairs,
    same_tokens,
    train_ours,
    train_peer,
)

PAIRS = 2
ROUNDING = {"float32": 1e-5, "bfloat16": 2**-8}


def main() -> None:
    parser = arguments(__doc__, repeated=False)
    parser.add_argument("--llamafactory", metavar="PYTHON", help="the Python of an environment with LLaMA-Factory")
    options = parser.parse_args()
    peers = [
        ("TRL", options.trl, TRL, LIKE_TRL),
        ("LLaMA-Factory", options.llamafactory, LLAMAFACTORY, LIKE_LLAMAFACTORY),
    ]

    agree = True
    print("| dtype | peer | its loss | ours | relative difference | agree |\n|---|---|---|---|---|---|")
    for dtype, rounding in ROUNDING.items():
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            task = Task(scratch, scratch / "model", scratch / "pairs.jsonl", steps=1, batch=PAIRS)
            apart(make_model, task.model, options.layers, options.tokenizer, 49_152, dtype)
            apart(make_pairs, task.pairs, options.data, options.tokenizer, PAIRS)
            setting = Setting(micro=PAIRS, autocast=dtype == "bfloat16")
            for peer, python, script, nll in peers:
                if python is None:
                    continue
                theirs = train_peer(task, python, script, setting, dtype=dtype)
                ours = train_ours(task, nll, [f"model.dtype={dtype}"])
                same_tokens(ours, theirs)
                difference = abs(theirs.first_loss - ours.first_loss) / ours.first_loss
                agree &= difference < rounding
                cells = [dtype, peer, f"{theirs.first_loss:.6f}", f"{ours.first_loss:.6f}", f"{difference:.1e}"]
                print(f"| {' | '.join(cells)} | {'yes' if difference < rounding else 'NO'} |", flush=True)
    sys.exit(not agree)


if __name__ == "__main__":
    main()
