from __future__ import annotations

import json

from orpo_cli.report.metrics import MetricsFile, comparable, read_metrics


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


def test_every_row_is_json_whatever_the_numbers(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"loss": float("nan"), "grad_norm": float("inf"), "step": 1})
    [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: name) == {"loss": None, "grad_norm": None, "step": 1}


def test_times_and_memory_are_not_compared():
    times = {"seconds": 1.0, "tokens_per_second": 2.0, "peak_memory_gib": 3.0}
    row = {"step": 1, "loss": 0.5, "eval_loss": 0.4}
    assert comparable({**row, **times, **{f"eval_{name}": value for name, value in times.items()}}) == row
