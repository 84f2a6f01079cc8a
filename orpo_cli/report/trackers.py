"""`output.trackers`: experiment trackers are told what goes into `metrics.jsonl`, by accelerate's classes for them.

They are guests of a run: one that raises is warned of once and told no more. Each has a directory of its own below the
run's `trackers/`, and what it writes there is written anew from `metrics.jsonl` whenever the run is gone on with. Where
the user has it write elsewhere, to a server say, it goes on with the run under the id by which it knows it; what it has
been told is noted, so that a resumed run tells no row twice.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from orpo_cli.errors import InputError, Stopped
from orpo_cli.files import make_directory, remove
from orpo_cli.metrics import MetricsFile, read_metrics
from orpo_cli.recipe import Recipe
from orpo_cli.redact import redact
from orpo_cli.terminal import say, warn

# What to install for each. The whole of mlflow asks for older versions of pandas and pyarrow than datasets does.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow-skinny"}
# The project, or experiment, that runs belong to, unless the tracker's own variables name another.
PROJECT = "orpo"
# Variables by which users have a tracker write elsewhere than into the run.
_ELSEWHERE = {
    "trackio": ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_DIR"),
    "mlflow": ("MLFLOW_TRACKING_URI",),
}
# Seconds that wandb may take to begin, and in the end to send what it has; the rest stays here, for `wandb sync`.
_PATIENCE = 30

Config = dict[str, bool | int | float | str]
Log = Callable[[dict[str, float], int], None]
"""Tells a tracker figures, by name, and their step."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise InputError for trackers that are not installed, have no account, or need a network under HF_HUB_OFFLINE."""
    for name in names:
        if _is_offline() and (variable := elsewhere(name)) and _is_on_network(variable):
            raise InputError(
                f"HF_HUB_OFFLINE forbids to use a network, and {variable} has {name} write to a server",
                "unset one of the two",
            )
        if not is_installed(name):
            raise InputError(
                f"output.trackers names {name}, and the package {PACKAGES[name]} is not installed",
                f"pip install {PACKAGES[name]}, or take {name} out of output.trackers",
            )
        if name == "wandb" and _wandb_is_online() and not _wandb_has_account():
            raise InputError(
                "output.trackers names wandb, and there is no account that it could write to",
                "`wandb login`, or set WANDB_API_KEY; with WANDB_MODE=offline all stays on this machine",
            )


def is_installed(name: str) -> bool:
    """Whether a tracker's package is there."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # without an origin, it is some directory that is called wandb


def elsewhere(name: str) -> str | None:
    """The variable by which the user has a tracker write elsewhere than into the run; None where none does."""
    if name == "wandb" and _wandb_is_online():
        return "WANDB_MODE"
    return next((variable for variable in _ELSEWHERE.get(name, ()) if os.environ.get(variable)), None)


def _is_on_network(variable: str) -> bool:
    value = os.environ.get(variable, "")
    if variable == "MLFLOW_TRACKING_URI":
        return value == "databricks" or urlsplit(value).scheme not in ("", "file", "sqlite")
    return variable != "TRACKIO_DIR"


def _is_offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _wandb_is_online() -> bool:
    return not _is_offline() and _wandb().setup().settings.mode not in ("offline", "dryrun", "disabled")


def _wandb_has_account() -> bool:
    """Whether wandb can log in without asking."""
    with redirect_stdout(io.StringIO()):
        return _wandb().login(prompt=False, verify=False)


def _wandb() -> ModuleType:
    """The package, which would report its own errors to its makers."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    return importlib.import_module("wandb")


@contextmanager
def told_to_trackers(metrics: MetricsFile | None, recipe: Recipe, directory: Path) -> Iterator[None]:
    """Within it, the recipe's trackers are told what `metrics` holds and will hold; at its end they are closed.

    They write below `directory`. `metrics` is None in all processes but the main one, and these have none.
    """
    with ExitStack() as stack:
        if metrics is not None and recipe.output.trackers:
            rows = read_metrics(metrics.path)
            for name in dict.fromkeys(recipe.output.trackers):
                tracker = stack.enter_context(Tracker(name, recipe, directory))
                for row in rows:
                    tracker.tell(row)
                metrics.listeners.append(tracker.tell)
        yield


class Tracker:
    """One tracker, which is told each row once; after the first thing that goes wrong it is told nothing more."""

    def __init__(self, name: str, recipe: Recipe, directory: Path) -> None:
        """Start it, so that what it keeps here lies in a directory of its name below `directory`."""
        self.name = name
        self._at_end = ExitStack()
        self._failed = False
        self._told: set[tuple[int, bool]] = set()
        self._notes: MetricsFile | None = None
        with self._given_up_on_failure():
            self._log = self._start(recipe, directory)

    def _start(self, recipe: Recipe, directory: Path) -> Log:
        own, notes, known = directory / self.name, directory / f"{self.name}.jsonl", None
        for path in (own, notes):
            if path.is_symlink():
                raise OSError(f"{path} is a link, and a run writes nothing outside of its directory")
        make_directory(directory)
        if elsewhere(self.name) is None:
            remove(own)
            remove(notes)
        else:
            self._notes = MetricsFile(notes, notes.stat().st_size if notes.exists() else 0)
            self._at_end.callback(self._notes.close)
            for row in read_metrics(notes):
                if "id" in row:
                    known = row["id"]
                else:
                    self._told.add((row["step"], row["evaluation"]))
        title = Path(recipe.output.dir).resolve().name
        log, run_id = _STARTS[self.name](Setting(own, title, config_of(recipe), known, self._at_end))
        if self._notes is not None and known is None:
            self._notes.write({"id": run_id})
        return log

    def tell(self, row: Mapping[str, Any]) -> None:
        """Pass on a row of `metrics.jsonl`, unless it has been told before."""
        step, evaluation = row["step"], "eval_loss" in row
        if self._failed or (step, evaluation) in self._told:
            return
        with self._given_up_on_failure():
            self._log(figures(row), step)
            self._told.add((step, evaluation))
            if self._notes is not None:
                self._notes.write({"step": step, "evaluation": evaluation})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Let it write or send what it still has, and end; it is told how the run did."""
        with self._given_up_on_failure():
            self._at_end.__exit__(kind, error, trace)

    @contextmanager
    def _given_up_on_failure(self) -> Iterator[None]:
        """Warn of the first thing that a tracker raises. Stdout is not for what it prints."""
        try:
            with redirect_stdout(io.StringIO()):
                yield
        except Exception as error:
            if not self._failed:
                what = (str(error).strip() or type(error).__name__).splitlines()[0]
                warn(f"{self.name} is told nothing more: {what}; the run goes on, and metrics.jsonl has every figure")
            self._failed = True


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's finite numbers, as `train/loss` or `eval/loss`; `skipped` and `spike` are 1 where they are there."""
    split = "eval" if "eval_loss" in row else "train"
    return {
        f"{split}/{key.removeprefix('eval_')}": int(value) if isinstance(value, bool) else value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def config_of(recipe: Recipe) -> Config:
    """The recipe by dotted key, without secrets; what is no number, truth or text is JSON."""
    flat: Config = {}
    for section, keys in recipe.model_dump(mode="json").items():
        of_section = {section: keys} if keys is None else {f"{section}.{key}": value for key, value in keys.items()}
        for key, value in of_section.items():
            plain = value if isinstance(value, int | float | str) else json.dumps(value, ensure_ascii=False)
            flat[key] = redact(plain) if isinstance(plain, str) else plain
    return flat


# ---- how each of them is started


@dataclass(frozen=True)
class Setting:
    """What a tracker is started with."""

    own: Path
    """The directory for what it keeps here; not made yet."""
    title: str
    """The run's name, for people."""
    config: Config
    known: str | None
    """The id by which it knows the run; None: not yet."""
    at_end: ExitStack
    """Takes what is to be done with it in the end; `push` has that told how the run ended."""


def _start_tensorboard(setting: Setting) -> tuple[Log, str]:
    from accelerate.tracking import TensorBoardTracker

    # A viewer that is open forgets what it read before: all of it comes again.
    tracker = TensorBoardTracker(setting.own.name, setting.own.parent, purge_step=0)
    tracker.start()
    setting.at_end.callback(tracker.finish)
    tracker.store_init_configuration(setting.config)
    say(f"tensorboard: tensorboard --logdir {setting.own}")
    return lambda values, step: tracker.log(values, step=step), ""


def _start_wandb(setting: Setting) -> tuple[Log, str]:
    from accelerate.tracking import WandBTracker

    run_id, is_online = setting.known or secrets.token_hex(4), _wandb_is_online()
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        id=run_id,
        resume="allow",
        name=os.environ.get("WANDB_NAME", setting.title),
        dir=str(setting.own.parent),
        mode="offline" if _is_offline() else None,
        # Figures, recipe, names of packages and the machine's load; not what is printed, code, git's remotes or the
        # command line.
        settings=_wandb().Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            quiet=True,
            symlink=False,
            init_timeout=_PATIENCE,
            finish_timeout=_PATIENCE,
        ),
    )
    tracker.start()
    setting.at_end.push(lambda kind, *_: tracker.tracker.finish(exit_code=int(kind is not None)))
    tracker.store_init_configuration(setting.config)
    # Its own step only ever rises, which that of an evaluation that a resumed run makes up for does not.
    tracker.tracker.define_metric("*", step_metric="step")
    say(f"wandb: {tracker.tracker.url if is_online else f'wandb sync {Path(tracker.tracker.dir).parent}'}")
    return lambda values, step: tracker.log({**values, "step": step}), run_id


def _start_trackio(setting: Setting) -> tuple[Log, str]:
    variable = elsewhere("trackio")
    if is_ours := not os.environ.get("TRACKIO_DIR"):
        os.environ["TRACKIO_DIR"] = str(setting.own.resolve())
        setting.at_end.callback(os.environ.pop, "TRACKIO_DIR", None)
    import trackio
    from accelerate.tracking import TrackioTracker

    if is_ours and setting.own.resolve() != trackio.TRACKIO_DIR:
        raise RuntimeError("in this process it writes to the directory of another run")
    name = setting.known or f"{setting.title}-{secrets.token_hex(2)}"
    tracker = TrackioTracker(PROJECT, name=name, resume="allow", config=setting.config, embed=False)
    tracker.start()
    setting.at_end.callback(trackio.finish)  # what tracker.finish does, but only once: not again when Python ends
    is_remote = variable is not None and _is_on_network(variable)
    place = f"where {variable} says" if is_remote else f"TRACKIO_DIR={trackio.TRACKIO_DIR} trackio show"
    say(f"trackio: run {name} of project {PROJECT}, {place}")
    return lambda values, step: tracker.log(values, step=step), name


def _start_mlflow(setting: Setting) -> tuple[Log, str]:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # A server that does not answer is given up in a minute, not in ten.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    import mlflow
    from accelerate.tracking import MLflowTracker

    if elsewhere("mlflow") is None:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri(setting.own.resolve().as_uri())
        setting.at_end.callback(mlflow.set_tracking_uri, None)
    tracker = MLflowTracker(PROJECT, run_id=setting.known, run_name=setting.title)
    tracker.start()
    setting.at_end.push(lambda kind, *_: mlflow.end_run(_MLFLOW_STATUS.get(kind, "FAILED")))
    run_id = tracker.tracker.info.run_id
    if setting.known is None:  # what it has been given cannot be changed
        tracker.store_init_configuration(setting.config)
    say(f"mlflow: run {run_id} in {mlflow.get_tracking_uri()}")
    return lambda values, step: tracker.log(values, step=step), run_id


# By what ended the run.
_MLFLOW_STATUS = {None: "FINISHED", Stopped: "KILLED"}
_STARTS = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
    "trackio": _start_trackio,
    "mlflow": _start_mlflow,
}
