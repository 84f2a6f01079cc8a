"""Files that are there whole or not at all, and JSON that is the same text for the same value."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from orpo_cli import files
from orpo_cli.errors import RunError
from orpo_cli.files import (
    make_directory,
    recover,
    recover_all,
    remove,
    require_space,
    to_json,
    to_json_lines,
    write_directory,
    write_file,
)


class Killed(BaseException):
    """Stands for the end of the process."""


def fill(text: str):
    def write(directory: Path) -> None:
        (directory / "inner").mkdir()
        (directory / "a.txt").write_text(text)
        (directory / "inner" / "b.txt").write_text(text)

    return write


def content(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def killed_at_each_call(monkeypatch, names, prepare, act, examine):
    """`act`, ended before its first, second, ... call of these functions of `os`; `examine` what is left."""
    for number in range(100):
        prepare(number)
        calls = 0

        def dying(real):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > number:  # noqa: B023 - used up within this round
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                act(number)
                finished = True
            except Killed:
                finished = False
        examine(number, finished)
        if finished:
            assert number > 2
            return


def test_a_directory_is_made_with_its_parents(tmp_path):
    target = tmp_path / "deep" / "er" / "target"
    write_directory(target, fill("one"))
    assert content(target) == {"a.txt": "one", "inner/b.txt": "one"}
    write_directory(target, lambda directory: (directory / "c.txt").write_text("two"))
    assert content(target) == {"c.txt": "two"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_new_directory_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def examine(number, finished):
        target = tmp_path / str(number) / "target"
        assert finished or not target.exists() or content(target) == {"a.txt": "one", "inner/b.txt": "one"}
        write_directory(target, fill("two"))  # what a death left behind is in nobody's way
        assert content(target) == {"a.txt": "two", "inner/b.txt": "two"}
        assert [path.name for path in target.parent.iterdir()] == ["target"]

    killed_at_each_call(
        monkeypatch,
        ("mkdir", "rename", "fsync", "rmdir", "unlink"),
        lambda number: (tmp_path / str(number)).mkdir(),
        lambda number: write_directory(tmp_path / str(number) / "target", fill("one")),
        examine,
    )


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_directory_that_is_replaced_is_the_old_or_the_new_one(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    elif not files._exchange(make(tmp_path / "one", "1"), make(tmp_path / "other", "2")):
        pytest.skip("this file system cannot let two directories change places")

    def examine(number, finished):
        target = tmp_path / str(number) / "target"
        assert target.exists() or not can_exchange
        recover(target)  # as the next start does
        assert content(target) in [{"a.txt": text, "inner/b.txt": text} for text in ("old", "new")]
        assert [path.name for path in target.parent.iterdir()] == ["target"]
        assert not finished or content(target)["a.txt"] == "new"

    killed_at_each_call(
        monkeypatch,
        ("mkdir", "rename", "fsync", "rmdir", "unlink"),
        lambda number: write_directory(tmp_path / str(number) / "target", fill("old")),
        lambda number: write_directory(tmp_path / str(number) / "target", fill("new")),
        examine,
    )


def make(directory: Path, text: str) -> Path:
    write_directory(directory, fill(text))
    return directory


def test_two_directories_change_places(tmp_path):
    one, other = make(tmp_path / "one", "1"), make(tmp_path / "other", "2")
    if files._exchange(one, other):
        assert (content(one)["a.txt"], content(other)["a.txt"]) == ("2", "1")
    with pytest.raises(FileNotFoundError):
        files._exchange(one, tmp_path / "absent")


def test_what_is_removed_is_never_there_in_part(tmp_path, monkeypatch):
    def examine(number, finished):
        target = tmp_path / str(number) / "target"
        assert not target.exists() or content(target) == {"a.txt": "old", "inner/b.txt": "old"}
        assert not (finished and target.exists())
        recover(target)
        assert [path.name for path in target.parent.iterdir()] == (["target"] if target.exists() else [])

    killed_at_each_call(
        monkeypatch,
        ("rename", "fsync", "rmdir", "unlink"),
        lambda number: make(tmp_path / str(number) / "target", "old"),
        lambda number: remove(tmp_path / str(number) / "target"),
        examine,
    )


def test_removing_a_link_leaves_what_it_leads_to(tmp_path):
    make(tmp_path / "precious", "x")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    remove(tmp_path / "link")
    remove(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert content(tmp_path / "precious")["a.txt"] == "x"


def test_only_what_is_ours_is_cleaned_up(tmp_path):
    for name in (".ours.unfinished", ".ours.deleted", ".theirs.unfinished", ".ours.bak", "ours.unfinished"):
        make(tmp_path / name, "x")
    make(tmp_path / ".lost.replaced", "x")
    recover_all(tmp_path, {"ours", "lost"}.__contains__)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".ours.bak",
        ".theirs.unfinished",
        "lost",
        "ours.unfinished",
    ]


def test_each_directory_that_is_made_is_brought_to_the_disk_by_its_parent(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(path.name))
    make_directory(tmp_path / "a" / "b" / "c")
    make_directory(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path.name, "a", "b"]


def test_no_room_is_told_before_anything_is_written(tmp_path):
    require_space(tmp_path / "not" / "yet", 1, "this")
    with pytest.raises(RunError, match="No space left on device for this: it takes 1,024 GiB, and ") as error:
        require_space(tmp_path / "not" / "yet", 2**40, "this")
    assert str(tmp_path / "not" / "yet") in error.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_old_files(disk):
    def too_much(directory: Path) -> None:
        (directory / "b").write_bytes(bytes(2**20))

    write_file(disk / "file", "old")
    write_directory(disk / "directory", lambda directory: (directory / "a").write_text("old"))
    for name, write in (
        ("file", lambda: write_file(disk / "file", "x" * 2**20)),
        ("directory", lambda: write_directory(disk / "directory", too_much)),
    ):
        with pytest.raises(OSError, match="No space left") as error:
            write()
        assert error.value.filename == str(disk / name)
    assert content(disk) == {"file": "old", "directory/a": "old"}


def test_what_cannot_be_filled_leaves_the_old_directory(tmp_path):
    target = tmp_path / "target"
    write_directory(target, fill("old"))

    def failing(directory: Path) -> None:
        (directory / "a.txt").write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_directory(target, failing)
    assert content(target) == {"a.txt": "old", "inner/b.txt": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["target"]  # a full disk has no room for halves


def test_a_full_disk_that_safetensors_met_is_one(tmp_path):
    def failing(directory: Path) -> None:
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left") as error:
        write_directory(tmp_path / "target", failing)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path / "target"))


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file.json"

    def examine(number, finished):
        assert path.read_text(encoding="utf-8") == "neu ä" if finished else path.read_text() in ("alt", "neu ä")

    killed_at_each_call(
        monkeypatch,
        ("open", "fsync", "replace", "close"),
        lambda number: path.write_text("alt"),
        lambda number: write_file(path, "neu ä"),
        examine,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    link = tmp_path / "link"  # as /dev/stdout is one
    link.symlink_to(pipe)
    write_file(link, "text")
    assert os.read(reader, 10) == b"text"
    assert link.is_symlink()
    assert pipe.is_fifo()
    os.close(reader)


def test_equal_values_are_equal_texts():
    text = to_json({"b": 1, "a": [0.1, None, "ü"]})
    assert text == to_json({"a": [0.1, None, "ü"], "b": 1})
    assert text.endswith("}\n")
    assert "ü" in text
    assert json.loads(text) == {"a": [0.1, None, "ü"], "b": 1}


def test_numbers_that_json_does_not_have_become_null():
    values = {"nan": float("nan"), "list": [float("inf"), 1.5], "deep": {"x": (-float("inf"),)}}
    expected = {"nan": None, "list": [None, 1.5], "deep": {"x": [None]}}
    for text in (to_json(values), to_json_lines([values])):
        assert json.loads(text, parse_constant=pytest.fail) == expected


def test_texts_that_are_no_unicode_can_be_written_and_read_again(tmp_path):
    values = {"key \ud800": "a\udcff\\ud800 ü 🙂"}
    for text in (to_json(values), to_json_lines([values])):
        write_file(tmp_path / "x.json", text)
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == values


def test_json_lines_keep_the_order_of_keys():
    assert to_json_lines([{"b": 1, "a": "x\ny"}, {}]) == '{"b": 1, "a": "x\\ny"}\n{}\n'
    assert to_json_lines([]) == ""


def test_what_is_given_up_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    (tmp_path / "old" / "deep").mkdir(parents=True)
    (tmp_path / "old" / "deep" / "file").write_bytes(bytes(600))
    (tmp_path / "other").write_bytes(bytes(300))
    (tmp_path / "old" / "link").symlink_to(tmp_path / "other")
    given_up = [tmp_path / "old", tmp_path / "absent"]
    require_space(tmp_path, 1600, "this", given_up=given_up)
    with pytest.raises(RunError, match="No space left"):
        require_space(tmp_path, 1601, "this", given_up=given_up)
    require_space(tmp_path, 1601, "this", given_up=[*given_up, tmp_path / "other"])
