"""`orpo eval` with a stop-watch around the scoring of the pairs; its seconds are the first line that it prints.

python benchmarks/timed_eval.py MODEL [options of `orpo eval`]
"""

import sys
import time
from typing import Any

from orpo_cli import cli, evaluate

score_pairs = evaluate.score_pairs


def timed(*args: Any, **kwargs: Any) -> evaluate.Scores:
    started = time.perf_counter()
    scores = score_pairs(*args, **kwargs)
    print(time.perf_counter() - started)
    return scores


evaluate.score_pairs = timed
sys.argv.insert(1, "eval")
cli.main()
