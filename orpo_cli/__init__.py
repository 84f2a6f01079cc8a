"""`orpo`: preference alignment in one stage (ORPO, arXiv 2403.07691), driven by a YAML recipe.

Reading order, in which each module imports only what stands before it: `recipe` -> `data` -> `model` -> `loss` ->
`scores` -> `generate`, `evaluate`, `merge` -> `train` -> `report`. `train/run.py` is the whole way in one function.
"""

import logging

__version__ = "0.1.0"

# Before anything imports it: on a CPU it complains of an optional kernel package that nobody needs here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
