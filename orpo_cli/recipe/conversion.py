"""How another tool's recipe is turned into ours: what is taken from it, what is put into ours, what is said."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orpo_cli.recipe import strict_yaml
from orpo_cli.recipe.checks import NOT_YET
from orpo_cli.recipe.faults import allowed, annotation_at, either
from orpo_cli.recipe.schema import Recipe


@dataclass
class Conversion:
    """A recipe of ours in the making: what is carried over, in whose words, and what is not."""

    path: Path
    tool: str
    given: dict[str, Any]
    """The other tool's keys that are still to be looked at, without blank ones."""
    lines: dict[str, int]
    """Where each of its keys stands."""
    defaults: dict[str, Any]
    """What the tool does where its recipe is silent."""
    tree: dict[str, Any] = field(default_factory=lambda: {section: {} for section in Recipe.model_fields})
    """Our recipe: the keys that differ from our defaults, by section."""
    comments: dict[str, str] = field(default_factory=dict)
    """Our dotted key -> what stands beside it in the file."""
    remarks: list[tuple[int, str]] = field(default_factory=list)
    """(line, what to know): what the file says and ours does not; line 0 is the file as a whole."""
    template: str | None = None
    """A chat template written out in the recipe, which ours keeps in a file of its own."""

    def named(self, *names: str) -> str | None:
        """The first of the names that is given, else that the tool has a default for."""
        return next((name for names_of in (self.given, self.defaults) for name in names if name in names_of), None)

    def take(self, *names: str) -> Any:
        """The value of the first of the names that is given, else the tool's default, else None."""
        name = self.named(*names)
        return None if name is None else self.given.pop(name, self.defaults.get(name))

    def number(self, *names: str) -> int | float | None:
        """The same for a number; anything else is left out."""
        name = self.named(*names)
        value = as_number(self.take(*names))
        if name is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        self.leave(name, f"{_shown(value)} is no number")
        return None

    def entries(self, name: str) -> list[dict[str, Any]]:
        """A list of mappings, copied; a text in it is a path, and anything else is left out."""
        found = []
        for entry in listed(self.take(name)):
            if isinstance(entry, dict):
                found.append(dict(entry))
            elif isinstance(entry, str):
                found.append({"path": entry})
            else:
                self.leave(name, f"{_shown(entry)} is no source of data")
        return found

    def put(self, key: str, value: Any, name: str, comment: str = "") -> None:
        """Set our key to what the other tool's `name` says, unless it is our default or nothing that ours may be."""
        fitting = [v for v in (value, as_number(value)) if _is_valid(key, v)]
        if not fitting:
            choices = either(allowed(annotation_at(tuple(key.split(".")))))
            self.leave(name, f"{_shown(value)} is none of what {key} may be: {choices}")
            return
        value = fitting[0]
        values_today, instead = NOT_YET.get(key, ((value,), ""))
        if value not in values_today:
            self.leave(name, f"{key} comes with a later version; {instead}")
            return
        section, _, last = key.partition(".")
        if value == _fields(section)[last].get_default(call_default_factory=True):
            return
        self.tree[section][last] = value
        if not comment and name in self.defaults and name not in self.lines:
            comment = f"{self.tool}'s default"
        if comment:
            self.comments[key] = comment

    def carry(self, table: dict[str, tuple[str, ...]], *sections: str) -> None:
        """Take the keys that mean the same as ours in these sections; `table` has other tools' names by our key."""
        for key, names in table.items():
            if key.startswith(sections) and (name := self.named(*names)) is not None:
                self.put(key, self.take(name), name)

    def leave(self, name: str, why: str) -> None:
        """Note a key of the other tool that is not carried over."""
        self.given.pop(name, None)
        self.remark(f"{name}: {why}", name)

    def remark(self, what: str, name: str = "") -> None:
        """Note something about a key, or about the recipe as a whole."""
        self.remarks.append((self.lines.get(name, 0), what))


def listed(value: Any) -> list[Any]:
    """A list as it is; `a, b` and single values as lists."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value if isinstance(value, list) else [] if value is None else [value]


def as_number(value: Any) -> Any:
    """Numbers in quotes, and whole numbers with a point, as plain numbers; anything else as it is."""
    number = strict_yaml.scalar(value) if isinstance(value, str) else value
    if not isinstance(number, int | float):
        return value
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


@functools.cache
def _adapter(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(annotation_at(tuple(key.split("."))))


def _is_valid(key: str, value: Any) -> bool:
    try:
        _adapter(key).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _fields(section: str) -> dict[str, Any]:
    """The keys of a section, in the order of the schema."""
    annotation: Any = Recipe.model_fields[section].annotation
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return next(kind.model_fields for kind in kinds if hasattr(kind, "model_fields"))


def written(draft: Conversion) -> str:
    """The recipe as a file, with what is the other tool's default, or needs a thought, explained beside it."""
    blocks = [f"# From {draft.path.name}, a recipe of {draft.tool}.\n"]
    for section, keys in draft.tree.items():
        if keys is None:
            blocks.append(f"{_commented(f'{section}: null', 'a full fine-tune')}\n")
        elif keys:
            ordered = [key for key in _fields(section) if key in keys]
            blocks.append(f"{section}:\n" + "".join(_entry(draft, section, key) for key in ordered))
    return "\n".join(blocks)


def _entry(draft: Conversion, section: str, key: str) -> str:
    lines = [f"  {line}" for line in strict_yaml.dump({key: draft.tree[section][key]}).splitlines()]
    comment = draft.comments.get(f"{section}.{key}")
    if comment and len(lines) == 1:
        lines = [_commented(lines[0], comment)]
    return "".join(f"{line}\n" for line in lines)


def _commented(line: str, comment: str) -> str:
    return f"{line:<33} # {comment}"
