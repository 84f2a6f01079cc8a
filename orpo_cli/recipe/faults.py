"""pydantic's complaints -> faults in plain words: what is wrong, what is allowed, what was meant."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from orpo_cli.recipe import checks, foreign, strict_yaml
from orpo_cli.recipe.checks import Fault
from orpo_cli.recipe.schema import InWords, Recipe

KeyPath = tuple[str | int, ...]


def explain(error: ValidationError, tree: dict[str, Any], raw: dict[str, str | None]) -> list[Fault]:
    """The faults behind a validation error of `tree`; `raw` has its scalars' own letters by dotted key."""
    complaints: dict[KeyPath, list[Any]] = {}
    for complaint in error.errors(include_url=False):
        cause = complaint.get("ctx", {}).get("error")
        if isinstance(cause, checks.ImpossibleRecipeError):
            return cause.faults
        complaints.setdefault(_path(complaint, tree), []).append(complaint)
    faults = [
        _fault(path, alternatives, raw.get(dotted(path)))
        for path, alternatives in complaints.items()
        # A list may also be no text; its item that is wrong says it better.
        if not any(len(other) > len(path) and other[: len(path)] == path for other in complaints)
    ]
    meant = {key for fault in faults for key in fault.others}
    return [fault for fault in faults if not (fault.message.startswith("required") and fault.key in meant)]


def dotted(path: KeyPath) -> str:
    """`("data", "filter", 0, "column")` -> `data.filter.0.column`."""
    return ".".join(map(str, path))


def annotation_at(path: KeyPath) -> Any:
    """The type that the schema gives to a key; None where it knows no such key."""
    annotation: Any = Recipe
    for part in path:
        annotation = _child(annotation, part)
    return annotation


def _path(complaint: Any, tree: Any) -> KeyPath:
    """Where in the tree a complaint belongs: its location without the names of union branches."""
    path: list[str | int] = []
    value = tree
    for part in complaint["loc"]:
        is_key = isinstance(value, dict) and part in value
        if is_key or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            path.append(part)
            value = value[part]
    if complaint["type"] == "missing":
        path.append(complaint["loc"][-1])
    return tuple(path)


def _fault(path: KeyPath, complaints: Sequence[Any], raw: str | None) -> Fault:
    """One fault out of the complaints that the branches of a key's type have about the same value."""
    key, kinds, value = dotted(path), {complaint["type"] for complaint in complaints}, complaints[0]["input"]
    choices = _choices_at(path)
    if "extra_forbidden" in kinds or any(complaint["loc"][-1] == "[key]" for complaint in complaints):
        return _unknown_key(path)
    if "missing" in kinds:
        return Fault(key, f"required, and missing (allowed: {either(choices)})")
    for complaint in complaints:
        if complaint["type"] == "value_error":
            return Fault(key, f"{complaint['ctx']['error']} (got {_show(value, raw)})")
    hint = _hint(value, raw, choices)
    if kinds & {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}:
        wrong = "out of range"
    elif kinds & {"too_short", "string_too_short"}:
        wrong = "empty"
    elif isinstance(value, str) and "literal_error" in kinds and not (hint or "").startswith("write"):
        wrong = "unknown value"
    else:
        wrong = "wrong type"
    return Fault(key, f"{wrong} (allowed: {either(choices)}; got {_show(value, raw)})", hint)


# --------------------------------------------------------------------------------------------- what was meant


def _unknown_key(path: KeyPath) -> Fault:
    key = dotted(path)
    section, siblings = path[:-1], _keys(annotation_at(path[:-1]))
    meant, note = _meant_key(path, siblings)
    if meant == key:  # a key of the other branch of data.eval
        return Fault(key, "does not go with the keys beside it", f"{dotted(section)} is {either(_choices_at(section))}")
    if meant:
        return Fault(key, "unknown key", f"did you mean {meant}?" + (f" ({note})" if note else ""), (meant,))
    if note:
        return Fault(key, "unknown key", note)
    there = f"keys of {dotted(section)}" if section else "sections"
    return Fault(key, "unknown key", f"the {there} are {', '.join(siblings)}")


def _meant_key(path: KeyPath, siblings: list[str]) -> tuple[str | None, str]:
    """Our key that a wrong one stands for, and what to mind; (None, why) if there is none, (None, "") if unheard."""
    section, name = dotted(path[:-1]), str(path[-1]).lower().replace("-", "_")
    homes = {key.rpartition(".")[2]: key for key in section_keys()}
    if name in siblings:
        return strict_yaml.join(section, name), ""
    if "is_null" in siblings and name in foreign.OPERATORS:  # by their letters `gte` would be `gt`
        return strict_yaml.join(section, foreign.OPERATORS[name]), ""
    if len(path) <= 2:
        if found := foreign.translate(strict_yaml.join(section, name)):
            return found
        if name in homes:
            return homes[name], ""
        if found := foreign.translate(name):
            return found
    if not section and (whole := _without_dot(name)):
        return whole, ""
    if close := difflib.get_close_matches(name, siblings, 1, 0.6):
        return strict_yaml.join(section, close[0]), ""
    if close := difflib.get_close_matches(name, homes, 1, 0.8):
        return homes[close[0]], ""
    if close := difflib.get_close_matches(name, [*foreign.OUR_KEY, *foreign.NO_KEY], 1, 0.85):
        return foreign.translate(close[0]) or (None, "")
    return None, ""


def _without_dot(name: str) -> str | None:
    """`lossbeta`, `loss_beta` -> `loss.beta`: the key of a section that was written without the dot."""
    keys = {re.sub("[._]", "", key): key for key in section_keys()}
    squeezed = re.sub(r"[^a-z0-9]", "", name)
    close = difflib.get_close_matches(squeezed, keys, 1, 0.85)
    return keys[close[0]] if close else None


def _hint(value: Any, raw: str | None, choices: list[str]) -> str | None:
    """How to write what was probably meant."""
    if value is None:
        return "write a value, or remove the line to take the default"
    if isinstance(value, str) and (hint := _hint_for_text(value, choices)):
        return hint
    if isinstance(value, float) and value.is_integer() and any(c.startswith("a whole number") for c in choices):
        return f"write {int(value)}"
    if isinstance(value, int | float) and raw and "text" in choices:
        return f'write "{raw}", in quotes, if the text is meant'
    if not isinstance(value, list | dict) and any(choice.startswith("a list") for choice in choices):
        return f"write a list: [{raw or value}]"
    return None


def _hint_for_text(text: str, choices: list[str]) -> str | None:
    word = text.strip().lower()
    if "true" in choices and word in ("yes", "on", "y", "true"):
        return "write true"
    if "false" in choices and word in ("no", "off", "n", "false"):
        return "write false"
    if "null" in choices and word in ("none", "null", "nil"):
        return "write null"
    if any(choice.startswith(("a number", "a whole number")) for choice in choices):
        number = _plain_number(word)
        if len(number) < 40 and type(strict_yaml.scalar(number)) in (int, float):
            return f"write {number}" + (" without quotes" if number == text else "")
    if foreign.VALUES.get(word) in choices:
        return f"did you mean {foreign.VALUES[word]}?"
    close = difflib.get_close_matches(word, choices, 1, 0.6)
    return f"did you mean {close[0]}?" if close else None


def _plain_number(word: str) -> str:
    """`1_000`, `1,000`, `007`, `5%` -> how a recipe writes that number."""
    if word.endswith("%") and isinstance(share := strict_yaml.scalar(word[:-1]), int | float):
        return f"{share / 100:g}"
    digits = word.replace("_", "").replace(",", "")
    return digits.lstrip("0") if digits.isdigit() and digits.strip("0") else digits


def _show(value: Any, raw: str | None) -> str:
    """A value as its writer sees it, cut to one short line."""
    if value is None:
        return "null" if raw else "nothing"
    shown = raw if raw and not isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


# --------------------------------------------------------------------------------------- what the schema allows


def section_keys() -> list[str]:
    """Every `section.key` of the recipe, in the order of the schema."""
    sections = {name: _keys(annotation_at((name,))) for name in Recipe.model_fields}
    return [f"{section}.{key}" for section, keys in sections.items() for key in keys]


def _choices_at(path: KeyPath) -> list[str]:
    if today := checks.NOT_YET.get(dotted(path)):
        return [json.dumps(value).strip('"') for value in today[0]]
    return allowed(annotation_at(path))


def either(choices: list[str]) -> str:
    """`["a", "b", "c"]` -> `a, b or c`."""
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]])) if choices else "nothing"


def _branches(annotation: Any) -> list[tuple[Any, list[Any]]]:
    """A type's alternatives without `Annotated`, each with its constraints."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        found = [m for item in metadata for m in ([item, *item.metadata] if isinstance(item, FieldInfo) else [item])]
        return [(branch, [*constraints, *found]) for branch, constraints in _branches(inner)]
    if get_origin(annotation) in (Union, types.UnionType):
        return [branch for option in get_args(annotation) for branch in _branches(option)]
    return [(annotation, [])]


def allowed(annotation: Any) -> list[str]:
    """What a type allows, in words, each alternative once."""
    return list(dict.fromkeys(word for branch in _branches(annotation) for word in _words(*branch)))


def _words(kind: Any, constraints: list[Any]) -> list[str]:
    for constraint in constraints:
        if isinstance(constraint, InWords):
            return [constraint.text]
    limits = " and ".join(
        f"{sign} {getattr(constraint, name)}"
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        for constraint in constraints
        if hasattr(constraint, name)
    )
    origin = get_origin(kind)
    if origin is Literal:
        return [str(value) for value in get_args(kind)]
    if origin is list:
        return [f"a list of {either(allowed(get_args(kind)[0]))}"]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        keys = _keys(kind)
        return [f"a mapping of {', '.join(keys[:3])}" + (", ..." if len(keys) > 3 else "")]
    plain: dict[Any, list[str]] = {
        bool: ["true", "false"],
        int: [f"a whole number {limits}".rstrip()],
        float: [f"a number {limits}".rstrip()],
        str: ["text"],
        type(None): ["null"],
    }
    return plain.get(kind, ["a mapping"] if origin is dict else ["any value"])


def _keys(annotation: Any) -> list[str]:
    """The keys that a mapping of this type may have, as a recipe writes them."""
    keys: list[str] = []
    for kind, _ in _branches(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += [field.alias or name for name, field in kind.model_fields.items()]
        elif get_origin(kind) is dict and get_origin(get_args(kind)[0]) is Literal:
            keys += get_args(get_args(kind)[0])
        elif get_origin(kind) is list:
            keys += _keys(get_args(kind)[0])
    return keys


def _child(annotation: Any, part: str | int) -> Any:
    for kind, _ in _branches(annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            hints = get_type_hints(kind, include_extras=True)
            for name, field in kind.model_fields.items():
                if part == (field.alias or name):
                    return hints[name]
        elif get_origin(kind) is list:
            item = get_args(kind)[0]
            found = item if isinstance(part, int) else _child(item, part)
            if found is not None:
                return found
        elif get_origin(kind) is dict:
            return get_args(kind)[1]
    return None
