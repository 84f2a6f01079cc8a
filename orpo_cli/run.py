"""The run directory: what lies where, whether it may be used, and the manifest."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_cli.errors import InputError
from orpo_cli.recipe import Recipe, SourceSpec, load_recipe

# What a run writes, and --overwrite removes; anything else in the directory is the user's and stays.
FILES = (
    "recipe.yaml",
    "manifest.json",
    "metrics.jsonl",
    "samples.jsonl",
    "eval.json",
    "eval.pairs.jsonl",
    "report.html",
)
DIRECTORIES = ("checkpoints", "adapter", "merged")


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run's files (INTERFACE of the tool: users and programs rely on them)."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """Versions, devices, seeds, data fingerprints and counts."""
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        """One object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Answers to `train.sample_prompts`."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Directory of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter (LoRA runs)."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """The full model."""
        return self.path / "merged"

    @property
    def eval(self) -> Path:
        """Held-out metrics."""
        return self.path / "eval.json"

    @property
    def eval_pairs(self) -> Path:
        """Held-out metrics of each pair."""
        return self.path / "eval.pairs.jsonl"

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return any((self.path / name).exists() for name in (*FILES, *DIRECTORIES))

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Make sure that a run may be written here; raise InputError if one is, and no option says what to do with it.

        Nothing is deleted yet: `clear` does that once all else is known to be right.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file", "name another directory with --output-dir")
        if self.holds_run() and not (resume or overwrite):
            raise InputError(
                f"{self.path} already holds a run",
                "--resume goes on with it, --overwrite starts anew, --output-dir names another directory",
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path} cannot be made: {error.strerror}", "name another --output-dir") from error

    def clear(self) -> None:
        """Remove the run that is here, and nothing else."""
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)
        for name in DIRECTORIES:
            shutil.rmtree(self.path / name, ignore_errors=True)


def open_run(path: Path) -> tuple[RunDirectory, Recipe]:
    """A finished run and its recipe. Raises InputError if there is none."""
    run = RunDirectory(path)
    if not run.recipe.is_file():
        raise InputError(f"{path} holds no run: it has no recipe.yaml", "name the directory given by output.dir")
    return run, load_recipe(run.recipe, files_must_exist=False)


# What may change between a run and its resumption: it leaves the result as it is, or is meant to prolong the run.
_FREE_KEYS = {
    "train": {"num_train_epochs", "max_steps", "max_tokens_per_microbatch", "logging_steps", "eval_steps", "save_steps"}
    | {"save_total_limit", "sample_prompts", "eval_on_start"},
    "model": {"gradient_checkpointing"},
    "output": {"dir", "merge", "trackers"},
}


def check_unchanged(run: RunDirectory, recipe: Recipe, fingerprint: str, *, streamed: bool) -> None:
    """Raise InputError when a run to be resumed was made by another recipe or from other data, or is none."""
    if not run.recipe.is_file():
        raise InputError(f"{run.path} holds no run to go on with", "give the checkpoint's own run with --output-dir")
    before = load_recipe(run.recipe, files_must_exist=False).model_dump(mode="json")
    now = recipe.model_dump(mode="json")
    changed = []
    for section in now:
        old, new = before[section], now[section]
        if old is None or new is None:
            changed += [section] if old != new else []
            continue
        keys = set(new) - _FREE_KEYS.get(section, set())
        changed += [f"{section}.{key}" for key in sorted(keys) if old.get(key) != new[key]]
    if changed:
        raise InputError(
            f"{run.path} was made by another recipe; these keys differ: {', '.join(changed)}",
            "set them as in its recipe.yaml, or start a new run with --output-dir",
        )
    sources = read_manifest(run).get("data", {}).get("train", {}).get("sources", [])
    if any(source["streamed"] for source in sources) != streamed:
        raise InputError(
            f"{run.path} was started with its data {'held in memory' if streamed else 'streamed'}, in another order",
            f"set data.streaming: {'false' if streamed else 'true'}",
        )
    if "+".join(source["fingerprint"] for source in sources) != fingerprint:
        raise InputError(f"the training data has changed since {run.path} was started", "start a new run")


def read_manifest(run: RunDirectory) -> dict[str, Any]:
    """The run's manifest, empty if it has none. Raises InputError for one that someone has spoilt."""
    try:
        return json.loads(run.manifest.read_text(encoding="utf-8")) if run.manifest.exists() else {}
    except ValueError as error:
        raise InputError(f"{run.manifest} is damaged: {error}", "start a new run") from error


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

    `scores`: pairs are going to be scored, so that something has to say which.

    Raises InputError where it names nothing, or nothing says which pairs to use.
    """
    if not target or data == "":
        raise InputError("a model or a source of data was given as an empty text", "leave it out, or name one")
    path = Path(target)
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
    section = subject.recipe.data.model_copy(update={"eval": [SourceSpec(path=data)], "filter": []})
    return dataclasses.replace(subject, recipe=subject.recipe.model_copy(update={"data": section}))


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
            return load_recipe(parent / "recipe.yaml", files_must_exist=False)
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
