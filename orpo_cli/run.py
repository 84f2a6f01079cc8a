"""The run directory: what lies where, whether it may be used, and the manifest."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import platform
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from orpo_cli.errors import InputError
from orpo_cli.files import make_directory, recover_all, remove
from orpo_cli.recipe import Recipe, SourceSpec, load_recipe
from orpo_cli.report.terminal import warn

# What a run writes, and --overwrite removes; anything else in the directory is the user's and stays.
FILES = (
    "recipe.yaml",
    "manifest.json",
    "metrics.jsonl",
    "samples.jsonl",
    "eval.json",
    "eval.pairs.jsonl",
    "eval.start.pairs.jsonl",
    "report.html",
)
DIRECTORIES = ("checkpoints", "adapter", "merged")
# Who writes here; gone when nobody does, unless it was killed.
LOCK = ".lock"


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

    @property
    def start_pairs(self) -> Path:
        """The same before the first step."""
        return self.path / "eval.start.pairs.jsonl"

    @property
    def report(self) -> Path:
        """The page."""
        return self.path / "report.html"

    def holds_run(self) -> bool:
        """Whether a run was started here."""
        return any((self.path / name).exists() for name in (*FILES, *DIRECTORIES))

    @contextmanager
    def claimed(self, *, resume: bool, overwrite: bool) -> Iterator[None]:
        """Hold the directory for a run that nothing else may write into; what a kill left half done in it is mended.

        Nothing is deleted yet: `clear` does that once all else is known to be right. Raises InputError for a directory
        that cannot be written, that another process holds, or that has a run and no option says what to do with it.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file", "name another directory with --output-dir")
        whole = self.path.resolve()
        for parent, child in pairwise([*reversed(whole.parents), whole]):
            if child.name in DIRECTORIES and (parent / "manifest.json").is_file():
                raise InputError(f"{self.path} lies inside the run {parent}", "name another directory")
        for name in (*FILES, *DIRECTORIES):
            if (self.path / name).is_symlink():
                raise InputError(
                    f"{self.path / name} is a link, and a run writes nothing outside of its directory",
                    "remove the link; a run that needs more room takes another --output-dir",
                )
        with held(self.path / LOCK, self.path):
            if self.holds_run() and not (resume or overwrite):
                raise InputError(
                    f"{self.path} already holds a run",
                    "--resume goes on with it, --overwrite starts anew, --output-dir names another directory",
                )
            recover_all(self.path, (*FILES, *DIRECTORIES).__contains__)
            yield

    def clear(self) -> None:
        """Remove the run that is here, and nothing else."""
        for name in (*DIRECTORIES, *FILES):  # without checkpoints, what a kill leaves of it cannot be gone on with
            remove(self.path / name)


@contextmanager
def held(lock: Path, what: Path) -> Iterator[None]:
    """Let no other process write `what` meanwhile, by a lock that the kernel opens when this one ends, however it does.

    The file `lock` says who holds it. Raises InputError where another process does, or where it cannot be made.
    """
    while True:
        try:
            make_directory(lock.parent)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise InputError(
                f"{lock.parent} cannot be made or written to: {error.strerror}", "name another directory"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise InputError(
                f"{what} is in use: {holder} writes there", "wait until it has ended, or name another directory"
            ) from None
        except OSError as error:
            warn(f"{what} cannot be locked ({error.strerror}): see to it that nothing else writes there")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
        os.close(descriptor)  # who held it before has just deleted the file: it locks nothing any more
    try:
        with suppress(OSError):  # a full disk says so elsewhere
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
    finally:
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                lock.unlink()
        os.close(descriptor)


def open_run(path: Path) -> tuple[RunDirectory, Recipe]:
    """A finished run and its recipe. Raises InputError if there is none."""
    run = RunDirectory(path)
    if not run.recipe.is_file():
        raise InputError(f"{path} holds no run: it has no recipe.yaml", "name the directory given by output.dir")
    return run, load_recipe(run.recipe, files_must_exist=False)


# What may change between a run and its resumption: it leaves the result as it is, or is meant to prolong the run. Where
# base and data lie, and by which name a template is called, may too: what counts is what is found there.
_FREE_KEYS = {
    "train": {"num_train_epochs", "max_steps", "max_tokens_per_microbatch", "logging_steps", "eval_steps", "save_steps"}
    | {"save_total_limit", "sample_prompts", "eval_on_start"},
    "model": {"gradient_checkpointing", "name_or_path", "revision", "chat_template"},
    "data": {"streaming", "strict", "max_dropped"},
    "output": {"dir", "merge", "trackers"},
}
# Libraries whose other version may give another result.
_DECIDING_VERSIONS = ("orpo", "torch", "transformers", "peft", "tokenizers", "bitsandbytes")
# What changes only rounding, if anything: it is told.
_NOTED = ("device", "device_type", "processes", "threads")


def identity(recipe: Recipe, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what a run comes to, by dotted key; runs that agree in it are one."""
    tree = recipe.model_dump(mode="json")
    found: dict[str, Any] = {}
    for section, keys in tree.items():
        if section == "lora":
            found["lora"] = "all weights" if keys is None else "an adapter"
        for key in set(keys or ()) - _FREE_KEYS.get(section, set()):
            found[f"{section}.{key}"] = keys[key]
    of_manifest: Any = defaultdict(dict, manifest)
    for split in ("train", "eval"):
        if not isinstance(sources := found[f"data.{split}"], list):
            continue
        where = ("path", "revision")
        found[f"data.{split}"] = [{k: v for k, v in source.items() if k not in where} for source in sources]
        read = (of_manifest["data"].get(split) or {}).get("sources", [])
        found[f"data.{split} (content)"] = [source["fingerprint"] for source in read]
        if split == "train":
            found["data.train (streamed)"] = any(source["streamed"] for source in read)
    base = of_manifest["base"]
    found["model (content)"] = base.get("content") or f"{base.get('name_or_path')} {base.get('revision')}"
    found["tokenizer"] = of_manifest["fingerprints"].get("tokenizer")
    found["template"] = of_manifest["fingerprints"].get("template")
    quantised = recipe.model.load_in_4bit or recipe.model.load_in_8bit or recipe.train.optimizer != "adamw"
    for package in _DECIDING_VERSIONS:
        if package != "bitsandbytes" or quantised:  # a build for another device is named behind the plus
            found[f"versions.{package}"] = str(of_manifest["versions"].get(package)).partition("+")[0]
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What differs between two mappings, by key: the values before and now."""
    return {
        key: {"before": before.get(key), "now": now.get(key)}
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    }


def check_unchanged(
    run: RunDirectory, recipe: Recipe, manifest: Mapping[str, Any], lost: Mapping[str, Any], *, allow: bool
) -> dict[str, Any]:
    """What differs from the run that is to be gone on with: `changed`, which may change the result, and `noted`.

    `manifest` is what would be written of the run as it is now; `lost` are differences found elsewhere. Raises
    InputError that lists all that is changed, unless it is allowed, and where there is no run.
    """
    if not run.recipe.is_file():
        raise InputError(f"{run.path} holds no run to go on with", "give the checkpoint's own run with --output-dir")
    before = read_manifest(run)
    own = load_recipe(run.recipe, files_must_exist=False)
    changed = {**differences(identity(own, before), identity(recipe, manifest)), **lost}
    if "lora" in changed:
        changed = {key: change for key, change in changed.items() if not key.startswith("lora.")}
    noted = differences({k: before.get(k) for k in _NOTED}, {k: manifest.get(k) for k in _NOTED})
    if changed and not allow:
        raise InputError(
            f"{run.path} is not what it was; these differ:\n" + "\n".join(_told(changed)),
            "set or install what it was begun with (its recipe.yaml and manifest.json say what), begin a new run with "
            "--output-dir, or go on all the same with --resume --allow-changes",
        )
    for line in _told(changed):
        warn(f"going on although this differs:{line}")
    for line in _told(noted):
        warn(f"another machine or another number of threads or processes rounds otherwise:{line}")
    return {"changed": changed, "noted": noted}


def _told(changes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each change."""
    return [f"  {key}: {_short(of['before'])} before, now {_short(of['now'])}" for key, of in changes.items()]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_manifest(run: RunDirectory) -> dict[str, Any]:
    """The run's manifest, empty if it has none. Raises InputError for one that someone has spoilt."""
    try:
        return json.loads(run.manifest.read_text(encoding="utf-8")) if run.manifest.exists() else {}
    except ValueError as error:
        raise InputError(
            f"{run.manifest} is damaged: {error}",
            "begin a new run, or delete the file and go on with --resume --allow-changes",
        ) from error


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
