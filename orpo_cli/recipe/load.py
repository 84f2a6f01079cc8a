"""A recipe file and `--set` overrides -> a `Recipe`, or every fault at once; and a `Recipe` -> YAML."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from orpo_cli.errors import RecipeError
from orpo_cli.recipe import faults as plain_words
from orpo_cli.recipe import strict_yaml
from orpo_cli.recipe.checks import Fault, Place, place_of
from orpo_cli.recipe.gather import several
from orpo_cli.recipe.schema import Recipe, SourceSpec
from orpo_cli.recipe.strict_yaml import YamlFault, join

MAX_BYTES = 1_000_000
"""Largest recipe file that is read."""


@dataclass
class _Draft:
    """A recipe before it is known to be right: its values, and by dotted key where and in what letters they stand."""

    tree: dict[str, Any]
    places: dict[str, Place]
    raw: dict[str, str | None]
    faults: list[Fault] = field(default_factory=list)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides in their order, and validate the two together.

    An override's value is YAML, and replaces what the file says, right or wrong. Raises `RecipeError` that lists every
    fault with its `file:line` (or its `--set`), dotted key, what is allowed and what was probably meant.
    """
    path = Path(path)
    draft = _read_draft(path)
    for number, override in enumerate(overrides):
        _override(draft, override, Place(MAX_BYTES + number, f"--set {override}"))
    _fill_blank_sections(draft)
    recipe = _validate(draft)
    if recipe is None or draft.faults:
        raise _report(path, draft)
    return recipe.written_at(draft.places)


def dump_recipe(recipe: Recipe) -> str:
    """The complete recipe as YAML, every default written out; `load_recipe` reads an equal one back."""
    return strict_yaml.dump(recipe.model_dump(mode="json"))


def _read_draft(path: Path) -> _Draft:
    text = read_text(path)
    try:
        tree = strict_yaml.parse(text)
    except YamlFault as fault:
        raise RecipeError(f"{path}:{fault.line}: {fault.message}", fault.hint) from fault
    if tree.value is None:
        raise RecipeError(f"{path}: the recipe is empty", "it needs at least model.name_or_path and data.train")
    if not isinstance(tree.value, dict):
        kind = "a list" if isinstance(tree.value, list) else "a single value"
        line = tree.written[""].line
        raise RecipeError(
            f"{path}:{line}: a recipe is a mapping of sections, not {kind}",
            f"the sections are {', '.join(Recipe.model_fields)}",
        )
    places = {key: Place(written.line, f"{path}:{written.line}") for key, written in tree.written.items()}
    draft = _Draft(tree.value, places, {key: written.raw for key, written in tree.written.items()})
    for key, line in tree.duplicates:
        place = Place(line, f"{path}:{line}")
        draft.faults.append(
            Fault(key, f"given twice, first at {places[key].text}", "remove one of the two", place=place)
        )
    return draft


def read_text(path: Path) -> str:
    """The text of a recipe file; RecipeError where there is none that could be one."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, siblings, 1, 0.5)
        hint = f"did you mean {path.parent / close[0]}?" if close else "give the path of a recipe, a YAML file"
        raise RecipeError(f"{path}: no such file", hint) from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path}: a directory, not a recipe", f"a run's recipe is {path}/recipe.yaml") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path}: too large for a recipe (above {MAX_BYTES:,} bytes)", "is it the data?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: not UTF-8 text", "save the file as UTF-8") from error


# ------------------------------------------------------------------------------------------------- overrides


def _override(draft: _Draft, override: str, place: Place) -> None:
    """Put the value of `section.key=value` into the draft, or a fault if it is no such thing."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not all(name.split(".")):
        draft.faults.append(Fault(name, "not of the form section.key=value", "e.g. --set loss.beta=0.2", place=place))
        return
    try:
        value = strict_yaml.parse(text)
    except YamlFault as fault:
        draft.faults.append(
            Fault(name, fault.message, fault.hint or "put the value in quotes if it is text", place=place)
        )
        return
    try:
        key = _put(draft.tree, _parts(name), value.value)
    except LookupError as error:
        draft.faults.append(Fault(name, str(error.args[0]), place=place))
        return
    for old in [known for known in draft.places if known == key or known.startswith(f"{key}.")]:
        del draft.places[old], draft.raw[old]
    ancestor = key
    while ancestor := ancestor.rpartition(".")[0]:
        if draft.raw.get(ancestor, "") is not None:  # made here, or in place of a plain value
            draft.places[ancestor], draft.raw[ancestor] = place, None
    for below, written in value.written.items():
        full = join(key, below) if below else key
        draft.places[full], draft.raw[full] = place, written.raw
    if text.strip() == "":
        draft.raw[key] = "null"  # an empty value is meant; in a file it may be forgotten
    for below, _ in value.duplicates:
        draft.faults.append(Fault(join(key, below), "given twice", "remove one of the two", place=place))


def _parts(name: str) -> list[str]:
    """The steps of a dotted key; the keys of a free mapping (`lora.rank_pattern`) may hold dots themselves."""
    parts = name.split(".")
    annotation = plain_words.annotation_at(tuple(parts[:2]))
    return [*parts[:2], ".".join(parts[2:])] if get_origin(annotation) is dict and parts[2:] else parts


def _put(tree: dict[str, Any], parts: list[str], value: Any) -> str:
    """Set a place of the tree, making the mappings on the way to it; returns its key. `LookupError` if it cannot be.

    What stands in the way (`lora: null`, a path in `data.eval`) gives way. A key of a source reaches into the only
    one there is: `data.train.max_pairs`.
    """
    node: Any = tree
    key = ""
    for position, part in enumerate(parts):
        if isinstance(node, list) and len(node) == 1 and part in SourceSpec.model_fields:
            node[0] = node[0] if isinstance(node[0], dict) else {"path": node[0]}
            node, key = node[0], join(key, 0)
        step: Any = part
        if isinstance(node, list):
            if not (part.isdigit() and int(part) < len(node)):
                raise LookupError(f"{key} is a list of {len(node)}, numbered from 0, without an item {part!r}")
            step = int(part)
        key = join(key, step)
        if position == len(parts) - 1:
            node[step] = value
            break
        child = node[step] if isinstance(node, list) else node.get(step)
        following = parts[position + 1]
        if isinstance(child, str) and following in SourceSpec.model_fields:
            child = {"path": child}
        elif not isinstance(child, dict | list) or (following == "holdout" and isinstance(child, list)):
            child = {}
        node[step] = child
        node = child
    return key


# ------------------------------------------------------------------------------------------------ validation


def _fill_blank_sections(draft: _Draft) -> None:
    """A section whose lines are all commented out has its defaults; a blank `lora:` could be meant either way."""
    for name in Recipe.model_fields:
        is_blank = name in draft.tree and draft.tree[name] is None and draft.raw.get(name) == ""
        if is_blank and name == "lora":
            draft.faults.append(
                Fault("lora", "empty", "write lora: null for a full fine-tune, lora: {} for LoRA with the defaults")
            )
        if is_blank or (name in ("model", "data") and name not in draft.tree):
            draft.tree[name] = {}


def _validate(draft: _Draft) -> Recipe | None:
    """The recipe, or None with every fault noted in the draft.

    pydantic checks what keys say together only where each is right. So what is wrong is taken out, which leaves its
    default, and the rest is looked at again; a fault that has to do with a key already at fault says nothing new.
    """
    tree = draft.tree
    wrong: set[str] = set()
    doubtful: set[str] = set()  # also the keys that misspelt ones were meant for
    while True:
        try:
            recipe = Recipe.model_validate(tree)
            return recipe if tree is draft.tree else None
        except ValidationError as error:
            found = plain_words.explain(error, tree, draft.raw)
        draft.faults += [
            fault
            for fault in found
            if not any(_related(fault.key, key) for key in wrong)
            and not any(_related(other, key) for other in fault.others for key in doubtful)
        ]
        wrong |= {fault.key for fault in found}
        doubtful |= {key for fault in found for key in (fault.key, *fault.others)}
        smaller = _without(tree, {fault.key for fault in found})
        if smaller == tree:
            return None
        tree = smaller


def _related(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _without(tree: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """The tree without the `section.key`s to which these belong; what is required gets a stand-in."""
    smaller: dict[str, Any] = {}
    for section, value in tree.items():
        if section not in Recipe.model_fields:
            continue
        if isinstance(value, dict):
            smaller[section] = {
                name: kept
                for name, kept in value.items()
                if not any(_related(f"{section}.{name}", key) for key in keys)
            }
        elif section not in keys:
            smaller[section] = value
    smaller["model"] = {"name_or_path": "stand-in", **smaller.get("model", {})}
    smaller["data"] = {"train": "stand-in", **smaller.get("data", {})}
    return smaller


def _report(path: Path, draft: _Draft) -> RecipeError:
    """The error that lists every fault in the order of the file, then of the overrides."""

    def place(fault: Fault) -> Place:
        return fault.place or place_of(fault.key, draft.places) or Place(0, str(path))

    listed = sorted(dict.fromkeys(draft.faults), key=lambda fault: (place(fault), fault.key))
    lines = [f"{place(fault).text}: {fault.key}: {fault.message}" for fault in listed]
    if len(listed) == 1:
        return RecipeError(lines[0], listed[0].hint)
    return several(str(path), [(line, fault.hint) for line, fault in zip(lines, listed, strict=True)])
