"""`orpo`: preference alignment in one stage (ORPO, arXiv 2403.07691), driven by a YAML recipe.

Reading order: `recipe` -> `data` -> `model` -> `loss` -> `train` -> `evaluate`, `merge` -> `report`.
"""

__version__ = "0.1.0"
