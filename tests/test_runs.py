"""A table of runs: what became of each by what its files say, and the held-out figures that it wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orpo_cli.errors import InputError
from orpo_cli.report.page import write_report
from orpo_cli.run_directory import LOCK, RunDirectory
from orpo_cli.runs import describe, find_runs, list_runs, table


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> RunDirectory:
    """A finished run that may be changed."""
    return RunDirectory(shutil.copytree(tiny_run, tmp_path / "runs" / "one"))


def test_a_finished_run_shows_what_its_files_say(run):
    figures = json.loads(run.eval.read_text())
    found = describe(run)
    assert (found["state"], found["step"], found["pairs"], found["beta"]) == ("finished", 4, 8, 0.1)
    for name in ("accuracy", "log_odds_ratio", "chosen_perplexity", "loss"):
        assert found[name] == pytest.approx(figures[name])


def test_what_is_not_finished(run):
    shutil.rmtree(run.merged)
    assert describe(run)["state"] == "interrupted"  # the recipe asks for it
    run.recipe.write_text(run.recipe.read_text().replace("merge: true", "merge: false"))
    assert describe(run)["state"] == "finished"
    # Prolonged: what it had made is still there, and a step follows the last evaluation.
    with run.metrics.open("a") as metrics:
        metrics.write(json.dumps({"step": 5, "loss": 1.0}) + "\n")
    assert (describe(run)["state"], describe(run)["step"]) == ("interrupted", 5)


def test_a_run_that_is_written_to_is_running(run):
    with run.claimed(resume=True, overwrite=False):
        assert describe(run)["state"] == "running"
    assert describe(run)["state"] == "finished"
    (run.path / LOCK).touch()  # the file stays when a run is killed; the lock does not
    assert describe(run)["state"] == "finished"


def test_what_is_half_written_or_damaged_spoils_nothing(run):
    with run.metrics.open("a") as metrics:
        metrics.write('{"step": 6, "lo')
    assert (describe(run)["state"], describe(run)["step"]) == ("finished", 4)
    run.metrics.unlink()
    assert (describe(run)["step"], describe(run)["accuracy"]) == (0, None)
    run.recipe.write_text("{")
    assert describe(run)["state"] == "unreadable"
    assert "unreadable" in table([describe(run)])


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_run_with_a_damaged_evaluation_does_not_hide_the_others(run, tmp_path, content):
    """Which evaluation is that of the best weights only the file says."""
    spoilt = RunDirectory(shutil.copytree(run.path, tmp_path / "runs" / "spoilt"))
    best = (
        spoilt.recipe.read_text().replace("at_end: false", "at_end: true").replace("eval_steps: null", "eval_steps: 2")
    )
    spoilt.recipe.write_text(best)
    assert describe(spoilt)["accuracy"] == json.loads(spoilt.eval.read_text())["accuracy"]
    spoilt.eval.write_text(content)
    found = {Path(about["run"]).name: about for about in list_runs([tmp_path], sort="accuracy")}
    assert {name: about["state"] for name, about in found.items()} == {run.path.name: "finished", "spoilt": "damaged"}
    assert found["spoilt"]["accuracy"] is None
    assert found[run.path.name]["accuracy"] is not None
    with pytest.raises(InputError, match=r"eval\.json is damaged") as refused:
        write_report([spoilt.path])
    assert refused.value.hint == f"orpo eval {spoilt.path} --output {spoilt.eval} writes it anew"


def test_runs_are_found_at_any_depth_but_not_in_one_another(run, tmp_path):
    for place in ("runs/deep/er/two", "runs/.hidden/three", "runs/one/checkpoints/four"):
        shutil.copytree(run.path, tmp_path / place, ignore=shutil.ignore_patterns("*checkpoints*"))
    (tmp_path / "runs" / "no-run").mkdir()
    shutil.copy(run.recipe, tmp_path / "runs" / "no-run")
    found = {str(path.relative_to(tmp_path)) for path in find_runs(tmp_path / "runs")}
    assert found == {"runs/one", "runs/deep/er/two"}
    assert list(find_runs(run.path)) == [run.path]


def test_runs_are_sorted_with_the_best_first_and_those_without_a_figure_last(run, tmp_path):
    for name, accuracy in (("a", 0.7), ("b", 0.9), ("c", None)):
        copy = RunDirectory(shutil.copytree(run.path, tmp_path / "runs" / name))
        rows = [json.loads(line) for line in copy.metrics.read_text().splitlines()]
        for row in rows:
            if "eval_loss" in row:
                row |= {"eval_accuracy": accuracy, "eval_loss": accuracy}
        copy.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.rmtree(run.path)

    def names(sort: str | None) -> list[str]:
        return [Path(row["run"]).name for row in list_runs([tmp_path / "runs"], sort)]

    assert names(None) == ["a", "b", "c"]
    assert names("accuracy") == ["b", "a", "c"]
    assert names("loss") == ["a", "b", "c"]
    with pytest.raises(InputError, match="cannot be sorted by 'acuracy'"):
        list_runs([tmp_path / "runs"], "acuracy")
    with pytest.raises(InputError, match="is no directory"):
        list_runs([tmp_path / "absent"])
    lines = table(list_runs([tmp_path / "runs"], "accuracy")).splitlines()
    assert lines[0].split()[:3] == ["run", "state", "step"]
    assert "90.0%" in lines[1]
    assert lines[1].index("90.0%") + 5 == lines[0].index("accuracy") + 8  # figures stand below each other
    assert len(lines) == 4
