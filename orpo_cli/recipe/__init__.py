"""The recipe: schema, strict loading, other tools' names.

Reading order: `strict_yaml`, `checks`, `schema`, `gather`, `foreign`, `faults`, `load`, `conversion`, `convert`,
`reference`.
"""

from __future__ import annotations

from orpo_cli.recipe.load import dump_recipe, load_recipe
from orpo_cli.recipe.schema import (
    DataSection,
    FilterSpec,
    Holdout,
    LoraSection,
    LossSection,
    ModelSection,
    OutputSection,
    Recipe,
    SourceSpec,
    TrainSection,
)

__all__ = [
    "DataSection",
    "FilterSpec",
    "Holdout",
    "LoraSection",
    "LossSection",
    "ModelSection",
    "OutputSection",
    "Recipe",
    "SourceSpec",
    "TrainSection",
    "dump_recipe",
    "load_recipe",
]
