from __future__ import annotations

import json
import shutil

import pytest

from orpo_cli.errors import RunError
from orpo_cli.metrics import MetricsFile, comparable, read_metrics, whole_rows
from tests.conftest import resize


def test_rows_are_appended_and_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(3):
        file.write({"step": step, "loss": 0.5})
    assert file.sync() == path.stat().st_size
    file.close()
    assert read_metrics(path) == [{"step": step, "loss": 0.5} for step in range(3)]


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1})
    length = file.sync()
    file.write({"step": 2})
    file.close()
    with path.open("a") as killed:
        killed.write('{"step": 3, "lo')
    file = MetricsFile(path, length)
    file.write({"step": 2, "again": True})
    assert file.sync() == path.stat().st_size
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "again": True}]


def test_a_new_run_begins_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path).close()
    assert read_metrics(path) == []


def test_a_file_that_lost_its_rows_is_not_filled_with_nul(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 1000)
    file.write({"step": 11})
    assert read_metrics(path) == [{"step": 11}]


def test_rows_that_are_whole_are_told(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert whole_rows(path, 100) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    lengths = [whole_rows(path, length) for length in (0, 5, 12, 13, 24, 100)]
    assert lengths == [0, 0, 12, 12, 24, 24]
    file = MetricsFile(path, 100)  # not even the half row stays
    file.write({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_a_row_that_finds_no_room_is_not_there_in_part(disk):
    resize(disk, 8)
    path = disk / "metrics.jsonl"
    file = MetricsFile(path)

    def fill_up():
        for step in range(100):
            file.write({"step": step, "words": "x" * 1000})

    with pytest.raises(OSError, match="No space left") as error:
        fill_up()
    assert error.value.filename == str(path)
    written = read_metrics(path)
    assert [row["step"] for row in written] == list(range(len(written)))
    assert len(written) > 2
    resize(disk, 1024)
    file.write({"step": "next"})
    assert len(read_metrics(path)) == len(written) + 1
    assert file.sync() == path.stat().st_size
    file.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_someone_deleted_is_written_anew(tmp_path, replaced, capfd):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1})
    path.unlink()
    if replaced:
        path.write_text("mine")
    file.write({"step": 2})
    assert file.sync() == path.stat().st_size
    file.write({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert f"{path} was deleted or replaced" in capfd.readouterr().err


@pytest.mark.parametrize("away", [shutil.rmtree, lambda run: run.rename(run.with_name("moved"))])
def test_a_directory_that_someone_took_away_is_an_error(tmp_path, away):
    run = tmp_path / "run"
    run.mkdir()
    file = MetricsFile(run / "metrics.jsonl")
    file.write({"step": 1})
    away(run)
    for _ in range(2):  # also when there is another one in its place
        with pytest.raises(RunError, match="run was moved or deleted while the run went on"):
            file.sync()
        run.mkdir(exist_ok=True)
    assert list(run.iterdir()) == []


def test_every_row_is_json_whatever_the_numbers(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"loss": float("nan"), "grad_norm": float("inf"), "step": 1})
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: name) == {"loss": None, "grad_norm": None, "step": 1}


def test_times_and_memory_are_not_compared():
    times = {"seconds": 1.0, "tokens_per_second": 2.0, "peak_memory_gib": 3.0}
    row = {"step": 1, "loss": 0.5, "eval_loss": 0.4}
    assert comparable({**row, **times, **{f"eval_{name}": value for name, value in times.items()}}) == row
