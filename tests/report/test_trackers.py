"""Experiment trackers hold what metrics.jsonl holds, read back with their own packages, and harm no run."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from orpo_cli.errors import InputError, RunError, Stopped
from orpo_cli.metrics import MetricsFile, comparable, read_metrics
from orpo_cli.recipe import load_recipe
from orpo_cli.report.trackers import PACKAGES, Tracker, check_trackers, config_of, figures, told_to_trackers
from orpo_cli.train.run import Start, train
from tests.runs import rows

Figures = list[tuple[int, str, float]]

# A process that is killed right after the evaluation of step 6 is written, before the checkpoint of that step.
KILLED = """
import os, signal, sys
from orpo_cli.metrics import MetricsFile
write = MetricsFile.write
def and_die(self, row):
    write(self, row)
    if "eval_loss" in row and row["step"] == 6:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.write = and_die
from orpo_cli.__main__ import main
sys.argv = ["orpo", "train", sys.argv[1]]
main()
"""
LONG = {"max_steps": 8, "eval_steps": 2, "save_steps": 2}


def written(run: Path, *, times: bool = True) -> Figures:
    """All figures of metrics.jsonl, by step and name."""
    found = read_metrics(run / "metrics.jsonl")
    found = [row if times else comparable(row) for row in found]
    return sorted((row["step"], name, value) for row in found for name, value in figures(row).items())


def in_float32(found: Figures) -> Figures:
    return [(step, name, float(np.float32(value))) for step, name, value in found]


def events(directory: Path) -> Iterator[Any]:
    """Every event of the files that lie right in a directory, with nothing purged."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for path in sorted(directory.glob("events.out.tfevents.*")):
        yield from LegacyEventFileLoader(str(path)).Load()


def scalars(directory: Path) -> Figures:
    return sorted(
        (event.step, value.tag, value.simple_value) for event in events(directory) for value in event.summary.value
    )


def without_times(found: Figures) -> Figures:
    return [entry for entry in found if comparable({entry[1].partition("/")[2]: 0})]


def orpo_train(recipe: Path, *arguments: str, **environment: str) -> None:
    """In a process of its own: some trackers can be set up only once in one."""
    command = [sys.executable, "-m", "orpo_cli", "train", recipe, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is told nothing more" not in done.stderr
    assert done.stdout == ""


def killed_and_resumed(recipe: Path, **environment: str) -> None:
    """Kill a run after the evaluation of step 6, and go on with it from the checkpoint of step 4."""
    command = [sys.executable, "-c", KILLED, recipe]
    killed = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    run = recipe.parent / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    orpo_train(recipe, "--resume", **environment)


# ---- what is told


def test_figures_are_the_finite_numbers_of_a_row():
    row = {"step": 3, "loss": 0.5, "grad_norm": float("nan"), "nll_loss": None, "pairs": 8, "pairs_digest": "ab"}
    assert figures(row) == {"train/loss": 0.5, "train/pairs": 8}
    assert figures({"step": 3, "loss": float("inf"), "skipped": True, "indices": [1]}) == {"train/skipped": 1}
    assert figures({"step": 0, "epoch": 0.0, "eval_loss": 1.5}) == {"eval/epoch": 0.0, "eval/loss": 1.5}


def test_the_recipe_is_told_flat_and_without_secrets(tiny_recipe, monkeypatch):
    recipe = load_recipe(tiny_recipe(lora=None, data={"system": "correct horse battery staple"}))
    monkeypatch.setenv("HF_TOKEN", "correct horse")
    flat = config_of(recipe)
    assert flat["data.system"] == "*** battery staple"
    assert flat["train.max_steps"] == 4
    assert flat["train.eval_on_start"] is True
    assert flat["lora"] == flat["data.max_prompt_length"] == "null"
    assert json.loads(flat["data.train"])[0]["path"] == recipe.data.train[0].path
    assert {key.partition(".")[0] for key in flat} == {"model", "lora", "data", "loss", "train", "output"}


# ---- what is refused


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_that_is_not_installed_is_refused_before_data_or_weights_are_read(
    tiny_recipe, orpo, monkeypatch, tmp_path, name
):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    recipe = tiny_recipe(output={"trackers": [name]})
    for command in (["check", recipe], ["train", recipe], ["sweep", recipe, "--set", "loss.beta=0.1,0.2"]):
        code, _, err = orpo(*command)
        assert code == 2
        assert f"output.trackers names {name}, and the package {PACKAGES[name]} is not installed" in err
        assert f"hint: pip install {PACKAGES[name]}" in err
        assert "training data" not in err
    assert not (tmp_path / "run").exists()


def test_a_directory_of_that_name_is_not_taken_for_the_package(tmp_path, monkeypatch):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="wandb is not installed"):
        check_trackers(["wandb"])


@pytest.mark.parametrize(
    ("name", "variable", "value", "is_refused"),
    [
        ("mlflow", "MLFLOW_TRACKING_URI", "https://tracking.example.org", True),
        ("mlflow", "MLFLOW_TRACKING_URI", "databricks", True),
        ("mlflow", "MLFLOW_TRACKING_URI", "file:///tmp/runs", False),
        ("mlflow", "MLFLOW_TRACKING_URI", "runs", False),
        ("mlflow", "MLFLOW_TRACKING_URI", "sqlite:///runs.db", False),
        ("trackio", "TRACKIO_SPACE_ID", "someone/space", True),
        ("trackio", "TRACKIO_SERVER_URL", "https://tracking.example.org", True),
        ("trackio", "TRACKIO_DIR", "runs", False),
    ],
)
def test_no_server_is_written_to_when_the_hub_is_offline(monkeypatch, name, variable, value, is_refused):
    from huggingface_hub import constants

    monkeypatch.setenv(variable, value)
    monkeypatch.setitem(sys.modules, name, None)  # the next thing that is complained of
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=variable if is_refused else "not installed"):
        check_trackers([name])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="not installed"):
        check_trackers([name])


# ---- tensorboard


def test_tensorboard_holds_every_figure_and_the_recipe(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe(output={"trackers": ["tensorboard"]}, train={"eval_steps": 2}))
    train(recipe)
    directory = tmp_path / "run/trackers/tensorboard"
    expected = written(tmp_path / "run")
    assert {step for step, name, _ in expected if name == "eval/loss"} == {0, 2, 4}
    assert {step for step, name, _ in expected if name == "train/loss"} == {1, 2, 3, 4}
    assert scalars(directory) == in_float32(expected)
    [parameters] = directory.glob("*/hparams.yml")
    assert yaml.safe_load(parameters.read_text()) == config_of(recipe)


def test_tensorboard_holds_every_figure_once_after_a_kill(tiny_recipe, tmp_path):
    killed_and_resumed(tiny_recipe(output={"trackers": ["tensorboard"]}, train=LONG))
    expected = written(tmp_path / "run")
    assert {step for step, name, _ in expected if name == "train/loss"} == set(range(1, 9))
    assert scalars(tmp_path / "run/trackers/tensorboard") == in_float32(expected)


def test_a_tracker_named_at_a_resumption_is_told_what_was_before(tiny_recipe, tmp_path):
    train(load_recipe(tiny_recipe()))
    longer = tiny_recipe(train={"max_steps": 6}, output={"trackers": ["tensorboard"]})
    train(load_recipe(longer), Start(resume=True))
    found = scalars(tmp_path / "run/trackers/tensorboard")
    assert {step for step, name, _ in found if name == "train/loss"} == set(range(1, 7))
    assert found == in_float32(written(tmp_path / "run"))
    train(load_recipe(tiny_recipe()), Start(overwrite=True))
    assert not (tmp_path / "run/trackers").exists()


def test_trackers_change_nothing_of_what_is_trained(tiny_recipe, tiny_run, tmp_path):
    train(load_recipe(tiny_recipe(output={"trackers": ["tensorboard", "tensorboard"]})))
    assert rows(tmp_path / "run") == rows(tiny_run)
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (tiny_run / weights).read_bytes()


# ---- what goes wrong is the tracker's own


def test_a_tracker_that_raises_is_warned_of_once_and_left(tiny_recipe, tmp_path, monkeypatch, orpo):
    from accelerate.tracking import TensorBoardTracker

    log, told = TensorBoardTracker.log, []

    def broken(self: TensorBoardTracker, values: dict, step: int) -> None:
        told.append(step)
        if step == 2:
            raise ConnectionError("the network is gone\nand more of it")
        log(self, values, step)

    monkeypatch.setattr(TensorBoardTracker, "log", broken)
    code, _, err = orpo("train", tiny_recipe(output={"trackers": ["tensorboard"]}))
    assert code == 0
    assert err.count("tensorboard is told nothing more: the network is gone; the run goes on") == 1
    assert told == [0, 1, 2]
    assert [row["step"] for row in rows(tmp_path / "run") if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["tensorboard", "tensorboard.jsonl"])
def test_a_tracker_that_would_write_outside_of_the_run_is_left(tiny_recipe, tmp_path, capsys, name):
    directory = tmp_path / "run/trackers"
    directory.mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (directory / name).symlink_to(tmp_path / "outside")
    with Tracker("tensorboard", load_recipe(tiny_recipe()), directory) as tracker:
        tracker.tell({"step": 1, "loss": 1.0})
    err = "".join(capsys.readouterr().err.split())
    assert f"tensorboardistoldnothingmore:{directory / name}isalink," in err
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_ends_a_tracker_and_not_what_tells_it(tiny_recipe, disk, capsys):
    with Tracker("tensorboard", load_recipe(tiny_recipe()), disk / "trackers") as tracker:
        for step in range(1, 1000):
            tracker.tell({"step": step, "loss": 1.0})
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("tensorboard is told nothing more") == 1
    assert "No space left on device" in err


def test_trackers_are_closed_however_the_loop_ends(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe(output={"trackers": ["tensorboard"]}))
    (tmp_path / "run").mkdir()
    before = threading.active_count()
    metrics = MetricsFile(tmp_path / "run/metrics.jsonl")

    def work() -> None:
        with told_to_trackers(metrics, recipe, tmp_path / "run/trackers"):
            assert threading.active_count() > before, "tensorboard writes in a thread"
            metrics.write({"step": 1, "loss": 0.5})
            raise SystemExit(143)

    with pytest.raises(SystemExit):
        work()
    assert threading.active_count() == before
    metrics.close()
    assert scalars(tmp_path / "run/trackers/tensorboard") == [(1, "train/loss", 0.5)]


def test_processes_besides_the_main_one_have_no_trackers(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe(output={"trackers": ["tensorboard"]}))
    with told_to_trackers(None, recipe, tmp_path / "run/trackers"):
        assert not (tmp_path / "run").exists()


# ---- the others; they write below the run's directory unless a variable says otherwise


def of_mlflow(uri: str) -> tuple[Figures, dict[str, str]]:
    """The only run's figures and parameters."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    [experiment] = client.search_experiments(filter_string="name = 'orpo'")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    found = [
        (m.step, name, m.value) for name in run.data.metrics for m in client.get_metric_history(run.info.run_id, name)
    ]
    return sorted(found), run.data.params


def test_mlflow_holds_every_figure_once_after_a_kill(tiny_recipe, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    recipe = tiny_recipe(output={"trackers": ["mlflow"]}, train=LONG)
    killed_and_resumed(recipe)
    found, parameters = of_mlflow((tmp_path / "run/trackers/mlflow").as_uri())
    assert found == written(tmp_path / "run")
    expected = config_of(load_recipe(recipe))
    assert parameters == {key: str(value) for key, value in expected.items() if value != ""}


def test_mlflow_elsewhere_goes_on_with_the_run_and_is_told_nothing_twice(tiny_recipe, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "elsewhere").as_uri()
    killed_and_resumed(tiny_recipe(output={"trackers": ["mlflow"]}, train=LONG), MLFLOW_TRACKING_URI=uri)
    found, _ = of_mlflow(uri)
    assert without_times(found) == written(tmp_path / "run", times=False)
    assert {step for step, name, _ in found if name == "eval/loss"} == {0, 2, 4, 6, 8}
    assert [path.name for path in (tmp_path / "run/trackers").iterdir()] == ["mlflow.jsonl"]


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (RunError("x", None), "FAILED"), (Stopped(15, "x"), "KILLED")]
)
def test_mlflow_is_told_how_a_run_ended(tiny_recipe, tmp_path, monkeypatch, error, status):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with (
        pytest.raises(type(error)) if error else nullcontext(),
        Tracker("mlflow", load_recipe(tiny_recipe()), tmp_path / "trackers") as tracker,
    ):
        tracker.tell({"step": 1, "loss": 1.0})
        if error:
            raise error
    client = mlflow.MlflowClient((tmp_path / "trackers/mlflow").as_uri())
    [experiment] = client.search_experiments(filter_string="name = 'orpo'")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == status


def of_trackio(directory: Path) -> tuple[Figures, dict[str, Any]]:
    """The only run's figures and parameters, read in a process that knows of this directory alone."""
    code = """if True:
        import json
        from trackio.sqlite_storage import SQLiteStorage as storage
        [name] = storage.get_runs("orpo")
        print(json.dumps([storage.get_logs("orpo", name), storage.get_run_config("orpo", name)]))
    """
    environment = {**os.environ, "TRACKIO_DIR": str(directory)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    logs, parameters = json.loads(done.stdout)
    found = [(row["step"], name, value) for row in logs for name, value in row.items() if "/" in name]
    return sorted(found), {key: value for key, value in parameters.items() if not key.startswith("_")}


def test_trackio_holds_every_figure_once_after_a_kill(tiny_recipe, tmp_path):
    pytest.importorskip("trackio")
    recipe = tiny_recipe(output={"trackers": ["trackio"]}, train=LONG)
    killed_and_resumed(recipe)
    found, parameters = of_trackio(tmp_path / "run/trackers/trackio")
    assert found == written(tmp_path / "run")
    assert parameters == config_of(load_recipe(recipe))


def test_trackio_elsewhere_goes_on_with_the_run_and_is_told_nothing_twice(tiny_recipe, tmp_path):
    pytest.importorskip("trackio")
    environment = {"TRACKIO_DIR": str(tmp_path / "elsewhere")}
    keys = {**LONG, "lr_scheduler_type": "constant_with_warmup"}  # the same however long the run is
    orpo_train(tiny_recipe(output={"trackers": ["trackio"]}, train={**keys, "max_steps": 6}), **environment)
    shutil.rmtree(tmp_path / "run/checkpoints/step-000006")  # as if it had been killed in the midst
    orpo_train(tiny_recipe(output={"trackers": ["trackio"]}, train=keys), "--resume", **environment)
    found, _ = of_trackio(tmp_path / "elsewhere")
    assert without_times(found) == written(tmp_path / "run", times=False)
    assert [path.name for path in (tmp_path / "run/trackers").iterdir()] == ["trackio.jsonl"]


def records(path: Path) -> Iterator[Any]:
    """The records of wandb's file: a header of 7 bytes, then blocks of 32 KiB of (crc, length, kind, data)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_wandb_offline_holds_every_figure_once_after_a_kill(tiny_recipe, tmp_path):
    pytest.importorskip("wandb")
    recipe = tiny_recipe(output={"trackers": ["wandb"]}, train=LONG)
    killed_and_resumed(recipe)
    [path] = (tmp_path / "run/trackers/wandb").glob("offline-run-*/*.wandb")
    found, parameters = [], {}
    for record in records(path):
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        found += [(row["step"], name, value) for name, value in row.items() if "/" in name]
        parameters |= {update.key: json.loads(update.value_json) for update in record.config.update}
        parameters |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
    assert sorted(found) == written(tmp_path / "run")
    assert {key: value for key, value in parameters.items() if key != "_wandb"} == config_of(load_recipe(recipe))
    said = b"".join(file.read_bytes() for file in path.parent.rglob("files/*"))
    assert str(tmp_path).encode() not in said, "neither the command line nor what is printed is sent"
