"""The recipe explained from its schema: as JSON Schema for editors, and as a page for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticUndefined, to_jsonable_python

from orpo_cli.recipe import schema
from orpo_cli.recipe.faults import allowed, either


class _Editors(GenerateJsonSchema):
    """Without titles that only repeat the keys; descriptions as running text."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe: every key with its default, what it may hold and what it does."""
    tree = schema.Recipe.model_json_schema(schema_generator=_Editors, mode="validation")
    return {"$schema": GenerateJsonSchema.schema_dialect, **_tidied(tree), "title": "Recipe of orpo"}


def _tidied(node: Any) -> Any:
    if isinstance(node, list):
        return [_tidied(item) for item in node]
    if not isinstance(node, dict):
        return node
    tidied = {key: _tidied(value) for key, value in node.items()}
    if isinstance(text := tidied.get("description"), str):
        tidied["description"] = " ".join(text.split())
    if isinstance(tidied.get("title"), str):
        del tidied["title"]
    return tidied


_HEAD = """# Recipe reference

Every key of a recipe, with its default, what it may hold and what it does. `model.name_or_path` and `data.train` are
required; a recipe names only what it changes. `orpo schema` prints the same as JSON Schema, for editors. This page is
generated: `orpo schema --markdown > docs/recipe.md`.
"""


def markdown() -> str:
    """The recipe reference, docs/recipe.md."""
    sections = get_type_hints(schema.Recipe)
    kinds = {name: _section(sections[name]) for name in schema.Recipe.model_fields}
    kinds |= {"a source": schema.SourceSpec, "a held-out part": schema.Holdout, "a filter": schema.FilterSpec}
    return "\n".join([_HEAD, *(line for name, kind in kinds.items() for line in _page(name, kind))])


def _section(annotation: Any) -> type[BaseModel]:
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))


def _page(name: str, kind: type[BaseModel]) -> Iterator[str]:
    """The lines about one section, with a table of its keys."""
    yield f"## {name}\n"
    yield f"{' '.join((kind.__doc__ or '').split())}\n"
    yield "| key | default | may be | |"
    yield "|---|---|---|---|"
    hints = get_type_hints(kind, include_extras=True)
    for field, info in kind.model_fields.items():
        cells = [
            f"`{info.alias or field}`",
            _default(info),
            either(allowed(hints[field])),
            " ".join((info.description or "").split()),
        ]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _default(info: FieldInfo) -> str:
    """A default as a recipe would write it."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(to_jsonable_python(value))}`"
