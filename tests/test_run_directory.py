"""The run directory: who may write there, what a resumed run must leave alone, and what a verb's target names."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_cli.errors import InputError
from orpo_cli.run_directory import DIRECTORIES, FILES, LOCK, RunDirectory, held, open_run, read_manifest


def contents(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def hold_a_run(directory: Path) -> None:
    directory.mkdir()
    for name in FILES:
        (directory / name).write_text("{}")
    for name in DIRECTORIES:
        (directory / name / "deep").mkdir(parents=True)
        (directory / name / "deep" / "file").write_text("x")


# Who may write


def claim(path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    with RunDirectory(path).claimed(resume=resume, overwrite=overwrite):
        assert path.is_dir()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_a_new_or_empty_directory_may_be_used(tmp_path, options):
    for path in (tmp_path / "runs" / "new", tmp_path / "empty"):
        for _ in range(2):
            claim(path, **options)
            assert contents(path) == set()


@pytest.mark.parametrize("name", [*FILES, *DIRECTORIES])
def test_each_trace_of_a_run_is_one(tmp_path, name):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    (run.path / "notes.txt").write_text("mine")
    assert not run.holds_run()
    (run.path / name).mkdir() if name in DIRECTORIES else (run.path / name).write_text("")
    assert run.holds_run()
    with pytest.raises(InputError, match="already holds a run") as error:
        claim(run.path)
    assert all(option in error.value.hint for option in ("--resume", "--overwrite", "--output-dir"))


def test_resuming_changes_nothing(tmp_path):
    hold_a_run(tmp_path / "run")
    before = contents(tmp_path / "run")
    claim(tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before


def test_overwriting_removes_what_a_run_writes_and_nothing_else(tmp_path):
    run = RunDirectory(tmp_path / "run")
    hold_a_run(run.path)
    (run.path / "notes.txt").write_text("mine")
    (run.path / "plots").mkdir()
    (run.path / "plots" / "loss.png").write_text("mine")
    before = contents(run.path)
    claim(run.path, overwrite=True)
    assert contents(run.path) == before  # nothing is lost before data and model are known to be right
    run.clear()
    assert contents(run.path) == {"notes.txt", "plots", "plots/loss.png"}


def test_overwriting_does_not_follow_a_link(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    (run.path / "merged").symlink_to(elsewhere)
    with pytest.raises(InputError, match="is a link"):
        claim(run.path, overwrite=True)
    run.clear()
    assert not (run.path / "merged").is_symlink()
    assert (elsewhere / "precious").exists()


def test_what_cannot_be_a_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        claim(tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match="cannot be made"):
        claim(tmp_path / "file" / "run")


def test_what_a_kill_left_half_done_is_mended_and_what_is_not_ours_stays(tmp_path):
    run = RunDirectory(tmp_path / "run")
    hold_a_run(run.path)
    run.adapter.rename(run.path / ".adapter.replaced")  # between two renames
    for left in (".merged.unfinished", ".merged.deleted", ".notes.unfinished", ".merged"):
        (run.path / left / "deep").mkdir(parents=True)
    (run.path / ".eval.json.unfinished").write_text("{")
    claim(run.path, resume=True)
    hold_a_run(tmp_path / "as-it-was")
    expected = contents(tmp_path / "as-it-was") | {
        ".notes.unfinished",
        ".notes.unfinished/deep",
        ".merged",
        ".merged/deep",
    }
    assert contents(run.path) == expected


# Who writes there already


HOLD = """
import sys, time
from pathlib import Path
from orpo_cli.run_directory import RunDirectory
with RunDirectory(Path(sys.argv[1])).claimed(resume=True, overwrite=False):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_two_processes_do_not_write_into_one_directory(tmp_path, options):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"{tmp_path} is in use: process {other.pid} on ") as error:
            claim(tmp_path, **options)
        assert error.value.exit_code == 2
    finally:
        other.kill()
        other.wait()
    assert (tmp_path / LOCK).exists()  # it could not tidy up, and yet holds nothing any more
    claim(tmp_path, **options)
    assert contents(tmp_path) == set()


def test_a_lock_is_not_one_once_its_file_is_another(tmp_path):
    """Who waits with the old file open, as its holder leaves and a third one comes, must not hold the new one too."""
    lock = tmp_path / LOCK
    with held(lock, tmp_path):
        lock.unlink()
        with held(lock, tmp_path), pytest.raises(InputError, match="in use"), held(lock, tmp_path):
            pass
    assert contents(tmp_path) == set()


def test_a_lock_is_not_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="cannot be made or written to"):
        claim(tmp_path)
    assert (tmp_path / "precious").read_text() == "x"


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capfd):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("orpo_cli.run_directory.fcntl.flock", flock)
    claim(tmp_path)
    assert f"warning: {tmp_path} cannot be locked (No locks available)" in capfd.readouterr().err
    assert contents(tmp_path) == set()


def test_a_run_writes_only_what_overwriting_removes(tiny_run):
    assert {path.name for path in tiny_run.iterdir()} <= {*FILES, *DIRECTORIES}


# What a finished run says


def test_a_run_is_opened_with_its_recipe(tiny_run):
    run, recipe = open_run(tiny_run)
    assert run.path == tiny_run
    assert recipe.lora.r == 4
    manifest = read_manifest(run)
    assert manifest["seed"] == 42
    assert manifest["data"]["train"]["pairs"] == 56
    assert manifest["data"]["eval"]["pairs"] == 8


def test_a_spoilt_manifest_is_said(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        read_manifest(RunDirectory(tmp_path))


def test_a_directory_without_a_recipe_is_no_run(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        open_run(tmp_path)
    assert read_manifest(RunDirectory(tmp_path)) == {}


# What may change before a run goes on


# What a target names
