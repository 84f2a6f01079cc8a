"""Every recipe that ships is right, explains itself, and names nothing that is the default anyway."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_cli.init import RECIPES
from orpo_cli.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.name for path in RECIPES.glob("*.yaml"))


def settings(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """`section.key=value` for each key of a recipe's sections; `lora: null` is one by itself."""
    for section, keys in tree.items():
        if isinstance(keys, dict):
            yield from (f"{section}.{key}" for key in keys)
        else:
            yield section


def test_the_recipes_are_there():
    assert {
        "demo.yaml",
        "distilabel-intel-orca.yaml",
        "llama-3.1-8b-qlora.yaml",
        "mistral-7b-ultrafeedback.yaml",
        "opt-350m-hh.yaml",
        "phi-2-hh.yaml",
        "qwen3-1.7b-qlora-16gb.yaml",
        "smollm2-135m-laptop.yaml",
    } <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_loads(name):
    load_recipe(RECIPES / name)


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_what_it_is_for_and_gives_reasons(name):
    lines = (RECIPES / name).read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert sum(" # " in line for line in lines) >= 4
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", NAMES)
def test_it_names_no_default(name):
    tree = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    recipe = load_recipe(RECIPES / name)
    bare = type(recipe).model_validate({"model": {"name_or_path": "m"}, "data": {"train": "d"}})

    def value(of: Any, key: str) -> Any:
        for part in key.split("."):
            of = getattr(of, part)
        return of

    idle = [key for key in settings(tree) if value(recipe, key) == value(bare, key)]
    assert idle == []


@pytest.mark.parametrize("name", NAMES)
def test_it_never_trains_on_harmful_pairs(name):
    recipe = load_recipe(RECIPES / name)
    for source in recipe.data.train:
        if source.path == "mlabonne/orpo-dpo-mix-40k":
            assert [(f.column, f.ne) for f in source.filter] == [("source", "toxic-dpo-v0.2")]


def test_the_papers_settings():
    recipe = load_recipe(RECIPES / "mistral-7b-ultrafeedback.yaml")
    train = recipe.train
    assert recipe.lora is None
    assert recipe.loss.beta == 0.1
    assert (train.learning_rate, train.lr_scheduler_type, train.warmup_steps) == (5e-6, "inverse_sqrt", 200)
    assert (train.num_train_epochs, train.batch_size) == (5, 32)
    assert (recipe.data.max_prompt_length, recipe.data.max_length) == (1792, 2048)
    assert (recipe.data.train[0].split, recipe.data.eval[0].split) == ("train_prefs", "test_prefs")
    assert load_recipe(RECIPES / "phi-2-hh.yaml").loss.beta == 0.25


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not in a checkout")
def test_the_package_lists_all_its_parts_and_the_recipes():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "orpo_cli").rglob("__init__.py")}
    assert set(packages) == found | {"orpo_cli.recipes"}
