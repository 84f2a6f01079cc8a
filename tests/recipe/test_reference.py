"""What is generated from the schema says all of it, and the page in docs is the one that is generated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from orpo_cli.recipe import Recipe, reference
from orpo_cli.recipe.faults import section_keys

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
SCHEMA = reference.json_schema()


def definition(section: str) -> dict[str, Any]:
    """The definition that a section of the schema refers to."""
    node = SCHEMA["properties"][section]
    [ref] = [branch["$ref"] for branch in node.get("anyOf", [node]) if "$ref" in branch]
    return SCHEMA["$defs"][ref.removeprefix("#/$defs/")]


@pytest.mark.skipif(not PAGE.exists(), reason="not in a checkout")
def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.markdown(), "orpo schema --markdown > docs/recipe.md"


@pytest.mark.parametrize("dotted", section_keys())
def test_every_key_is_explained_in_both(dotted: str) -> None:
    section, _, key = dotted.partition(".")
    node = definition(section)["properties"][key]
    assert node["description"].endswith((".", ")"))
    assert "\n" not in node["description"]
    row = re.search(
        rf"^## {section}\n.*?^\| `{key}` \| (.*?) \| .* \|$", reference.markdown(), re.DOTALL | re.MULTILINE
    )
    assert row
    assert row[1].strip("`")


def test_defaults_are_the_recipes_own() -> None:
    bare = Recipe.model_validate({"model": {"name_or_path": "m"}, "data": {"train": "d"}}).model_dump(mode="json")
    bare["output"]["dir"] = "auto"
    for section in Recipe.model_fields:
        node = definition(section)
        for key, value in bare[section].items():
            if key not in node.get("required", []):
                assert node["properties"][key]["default"] == value, f"{section}.{key}"


def test_editors_are_told_what_is_unknown_and_what_is_required() -> None:
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert SCHEMA["required"] == ["model", "data"]
    assert all(node["additionalProperties"] is False for node in [SCHEMA, *map(definition, Recipe.model_fields)])
    assert definition("train")["properties"]["learning_rate"]["anyOf"] == [
        {"const": "auto", "type": "string"},
        {"exclusiveMinimum": 0, "type": "number"},
    ]
    assert {"type": "null"} in SCHEMA["properties"]["lora"]["anyOf"]
    assert "in" in SCHEMA["$defs"]["FilterSpec"]["properties"]  # as a recipe writes it
