"""What a verb is pointed at: a run, an adapter, or a model by itself."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from orpo_cli.data.pairs import HELD_OUT_SPLITS, open_sources
from orpo_cli.errors import DataError, InputError, ModelError
from orpo_cli.model.load import is_path
from orpo_cli.recipe import DataSection, Recipe, SourceSpec, load_recipe
from orpo_cli.run_directory import open_run


@dataclass(frozen=True)
class Subject:
    """A model that a verb is pointed at: a run, an adapter, or a model by itself."""

    recipe: Recipe
    """How to load, read, render and score; `model` names the base, or the model itself."""
    adapter: Path | None
    """The adapter to put into the base; None for a model by itself."""
    tokenizer: Path | None
    """Where the tokenizer is to be read instead of the base's; None: the base's, taught the recipe's template."""


def find_subject(target: str, recipe: Recipe | None, data: str | None, *, scores: bool = True) -> Subject:
    """What `target` names. `recipe` says how to use what is in no run; `data` replaces the held-out source.

    Where a run's own recipe says what columns its data has, and `data` has others, it is recognised by itself.

    `scores`: pairs are going to be scored, so that something has to say which.

    Raises InputError where it names nothing, or nothing says which pairs to use.
    """
    if not target or data == "":
        raise InputError("a model or a source of data was given as an empty text", "leave it out, or name one")
    require_there(target, "RUN_OR_MODEL")
    path, own_recipe = Path(target), recipe is None
    if (path / "recipe.yaml").is_file():
        run, own = open_run(path)
        adapter = run.adapter if own.lora is not None else None
        if not (run.adapter if adapter else run.merged).is_dir():
            raise InputError(f"{path} is not finished: it has no {'adapter' if adapter else 'merged'}/", "--resume it")
        base = {key: getattr(own.model, key) for key in ("name_or_path", "revision", "load_in_4bit", "load_in_8bit")}
        recipe = own if recipe is None else recipe.model_copy(update={"model": recipe.model.model_copy(update=base)})
        subject = (
            Subject(recipe, adapter, None) if adapter else Subject(_by_itself(recipe, str(run.merged)), None, None)
        )
    elif (path / "adapter_config.json").is_file():
        recipe = recipe or _recipe_around(path)
        name, revision = _base_of_adapter(path)
        tokenizer = path if (path / "tokenizer_config.json").is_file() else None
        recipe = recipe or minimal_recipe(name, data, scores=scores)
        model = recipe.model.model_copy(update={"name_or_path": name, "revision": revision})
        subject = Subject(recipe.model_copy(update={"model": model}), path, tokenizer)
    elif recipe is not None:  # to be used as the recipe would use its base
        model = recipe.model.model_copy(update={"name_or_path": target, "revision": "main"})
        subject = Subject(recipe.model_copy(update={"model": model}), None, None)
    else:
        around = _recipe_around(path)
        subject = Subject(
            _by_itself(around, target) if around else minimal_recipe(target, data, scores=scores), None, None
        )
    if data is None:
        return subject
    # The filter is for the training data; other data need not have its columns.
    source = SourceSpec(path=data)
    section = subject.recipe.data.model_copy(update={"eval": [source], "filter": []})
    if own_recipe and not _fits(source, section):
        section = section.model_copy(update={"columns": {}, "format": "auto"})
    return dataclasses.replace(subject, recipe=subject.recipe.model_copy(update={"data": section}))


def require_there(name: str, typed: str) -> None:
    """Raise ModelError where what was typed for an argument, or an option, can only be a directory and is none."""
    if is_path(name) and not Path(name).exists():
        raise ModelError(f"{typed}: there is no directory {name}", f"{typed} names a directory or a hub id")


def _fits(source: SourceSpec, section: DataSection) -> bool:
    """Whether the source has the columns and the shape that the section names, if it names any."""
    if not section.columns and section.format == "auto":
        return True
    try:
        return bool(open_sources([source], section, HELD_OUT_SPLITS))
    except DataError:
        return False


def _base_of_adapter(path: Path) -> tuple[str, str]:
    """Name and revision of the base that an adapter's configuration names."""
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        name, revision = config["base_model_name_or_path"], config.get("revision")
    except (ValueError, TypeError, KeyError):
        name, revision = None, None
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{path}/adapter_config.json does not name the adapter's base", "write base_model_name_or_path"
        )
    return name, revision or "main"


def minimal_recipe(model: str, data: str | None, *, scores: bool) -> Recipe:
    """A recipe of defaults for a model that has none."""
    if data is None and scores:
        raise InputError(f"{model} is no run, so nothing says which pairs to score", "give --data, or --recipe")
    return Recipe.model_validate({"model": {"name_or_path": model}, "data": {"train": data or "none"}, "lora": None})


def _recipe_around(path: Path) -> Recipe | None:
    """The recipe of the run in which a model or adapter lies, if it lies in one."""
    for parent in list(path.resolve().parents)[:2]:
        if (parent / "recipe.yaml").is_file() and (parent / "manifest.json").is_file():
            return load_recipe(parent / "recipe.yaml")
    return None


def _by_itself(recipe: Recipe, model: str) -> Recipe:
    """The recipe for a model that needs no adapter and brings tokenizer and template along, unquantised."""
    keep_raw = recipe.model.chat_template == "none"
    section = recipe.model.model_copy(
        update={
            "name_or_path": model,
            "revision": "main",
            "load_in_4bit": False,
            "load_in_8bit": False,
            "chat_template": "none" if keep_raw else "auto",
        }
    )
    return recipe.model_copy(update={"model": section, "lora": None})
