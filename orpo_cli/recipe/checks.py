"""What a recipe may not say although each key is right by itself: impossible combinations, work to come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orpo_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a recipe.

    `key` is the dotted key to report it at, `others` the further keys that have a part in it.
    """

    key: str
    message: str
    hint: str | None = None
    others: tuple[str, ...] = ()


class ImpossibleRecipeError(ValueError):
    """Keys that are right one by one and cannot stand together; carries every fault of the kind."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{fault.key}: {fault.message}" for fault in faults))
        self.faults = faults


# key -> (the values that work today, what to do meanwhile). A key leaves this table when its work is done.
# `*` stands for each item of a list.
NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    "model.device_map": ((None,), "leave it null; load_in_4bit makes a large base fit one device"),
    "train.optimizer": (("adamw",), "use adamw"),
    "train.load_best_model_at_end": (
        (False,),
        "the best checkpoint is kept in checkpoints/; merge it by hand",
    ),
    "train.early_stopping_patience": ((None,), "set max_steps or num_train_epochs instead"),
    "output.trackers": (([],), "leave it []; metrics.jsonl holds every number"),
    "data.train.*.weight": ((None,), "limit the larger source with max_pairs"),
    "data.eval.*.weight": ((None,), "limit the larger source with max_pairs"),
}


def not_yet(recipe: Recipe) -> Iterator[Fault]:
    """Faults for values whose work is still to come, so that none is accepted and ignored."""
    tree = recipe.model_dump(mode="json")
    for pattern, (values_today, instead) in NOT_YET.items():
        for key, value in _matches(tree, pattern.split(".")):
            if value not in values_today:
                yield Fault(key, f"not yet: {_brief(value)} comes with a later version", instead)


def _matches(tree: Any, parts: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted key, value) of each place of the tree that the pattern names."""
    if not parts:
        yield prefix.removesuffix("."), tree
    elif parts[0] == "*" and isinstance(tree, list):
        for index, item in enumerate(tree):
            yield from _matches(item, parts[1:], f"{prefix}{index}.")
    elif isinstance(tree, dict) and parts[0] in tree:
        yield from _matches(tree[parts[0]], parts[1:], f"{prefix}{parts[0]}.")


def _brief(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def impossible(recipe: Recipe) -> Iterator[Fault]:
    """Faults for keys that cannot stand together."""
    yield from ()
