"""`orpo init`: a recipe to start from, one of those that ship or another tool's made ours."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from orpo_cli.errors import InputError
from orpo_cli.files import write_file

if TYPE_CHECKING:
    from orpo_cli.recipe.conversion import Conversion

# An installed package carries the recipes inside; a checkout has them beside it.
RECIPES = next(
    path for path in (Path(__file__).with_name("recipes"), Path(__file__).parents[1] / "recipes") if path.is_dir()
)


def starters() -> dict[str, str]:
    """The recipes that ship: name -> what it is for, the comment that it begins with."""
    return {path.stem: _purpose(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.yaml"))}


def _purpose(recipe: str) -> str:
    """The first sentence of the comment at the top."""
    lines = recipe.splitlines()
    top = [line.removeprefix("# ") for line in lines[: next(i for i, line in enumerate(lines) if line[:1] != "#")]]
    return " ".join(top).split(". ")[0].removesuffix(".")


def starter(name: str) -> str:
    """The text of a recipe that ships. Raises InputError for a name that none has."""
    known = starters()
    name = name.removesuffix(".yaml")
    if name not in known:
        close = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise InputError(f"no recipe is called {name!r}", hint)
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def write_recipe(text: str, output: Path, *, overwrite: bool) -> None:
    """Write a recipe file; InputError if there is one already and `overwrite` is not said."""
    check_output(output, overwrite=overwrite)
    write_file(output, text)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise InputError where a file may not be, or cannot be, written."""
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"{output}: no file can be written there", "name a file in a directory that exists")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists", "--overwrite replaces it, -o names another file")


def write_converted(source: Path, output: Path, *, overwrite: bool) -> list[str]:
    """Write another tool's recipe as ours; a line for each thing that is not in it, in the order of the source.

    A tracker that is not installed is a comment. What is missing or impossible is left to be corrected: the file is
    there, and RecipeError lists its faults.
    """
    from orpo_cli.recipe import load_recipe
    from orpo_cli.recipe.conversion import written
    from orpo_cli.recipe.convert import convert

    draft = convert(source)
    template = output.with_suffix(".jinja")
    for path in (output, *([template] if draft.template else [])):
        check_output(path, overwrite=overwrite)
    if draft.template:
        write_file(template, draft.template)
        draft.tree["model"]["chat_template"] = str(template)
    absent = _take_absent_trackers(draft)
    write_file(output, written(draft) + "".join(map(_once_installed, absent)))
    load_recipe(output)
    return [f"{source}{f':{line}' if line else ''}: {said}" for line, said in sorted(draft.remarks)]


def _take_absent_trackers(draft: Conversion) -> list[str]:
    """Take the trackers that are not installed here out of a recipe, and say so: it would be refused with them."""
    from orpo_cli.report.trackers import is_installed

    named = draft.tree["output"].pop("trackers", [])
    absent = [name for name in named if not is_installed(name)]
    if there := [name for name in named if name not in absent]:
        draft.tree["output"]["trackers"] = there
    for name in absent:
        draft.remark(f"{name} is not installed, so that output.trackers has it in a comment alone", "report_to")
    return absent


def _once_installed(tracker: str) -> str:
    from orpo_cli.report.trackers import PACKAGES

    return f"# output.trackers: {tracker}, once it is installed: pip install {PACKAGES[tracker]}\n"
