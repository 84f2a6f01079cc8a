"""Faults of what a recipe names (model, data, adapter), gathered so that all are told at once, each with its line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from orpo_cli.errors import InputError, RecipeError
from orpo_cli.recipe.checks import Place
from orpo_cli.recipe.schema import Recipe


class Faults:
    """The faults noted so far of one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._found: dict[str, InputError] = {}

    @contextmanager
    def at(self, key: str) -> Iterator[None]:
        """Note an InputError raised within the block as a fault of this key, and go on behind the block.

        A key's first fault stands for those that follow from it; the same fault is noted once.
        """
        try:
            yield
        except InputError as error:
            if error.message not in (known.message for known in self._found.values()):
                self._found.setdefault(key, error)

    def raise_any(self) -> None:
        """Raise what was noted: a single fault as it was, several in the order of the recipe as a RecipeError."""
        places = {key: self._recipe.place_of(key) or Place(0, "") for key in self._found}
        told = [
            (f"{places[key].text}: {error.message}".removeprefix(": "), error)
            for key, error in sorted(self._found.items(), key=lambda item: places[item[0]])
        ]
        if len(told) == 1:
            [(message, error)] = told
            raise type(error)(message, error.hint) from error
        if told:
            raise several("the recipe", [(message, error.hint) for message, error in told])


def several(whose: str, faults: Sequence[tuple[str, str | None]]) -> RecipeError:
    """The error that lists several faults, each a message and a hint."""
    lines = [message + (f"; {hint}" if hint else "") for message, hint in faults]
    listed = "".join("\n  " + line.replace("\n", "\n    ") for line in lines)
    return RecipeError(
        f"{whose} has {len(lines)} faults:{listed}", "correct them in the file, or with --set section.key=value"
    )
