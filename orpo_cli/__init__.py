"""`orpo`: preference alignment in one stage (ORPO, arXiv 2403.07691), driven by a YAML recipe.

Reading order: `recipe` -> `data` -> `model` -> `loss` -> `train` -> `evaluate`, `merge` -> `report`.
"""

import logging

__version__ = "0.1.0"

# Before anything imports it: on a CPU it complains of an optional kernel package that nobody needs here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
