"""Files that are there whole or not at all, and JSON that is the same text for the same value."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from orpo_cli.files import to_json, to_json_lines, write_directory, write_file


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


def test_a_directory_that_is_replaced_is_never_a_mixture(tmp_path, monkeypatch):
    def examine(number, finished):
        target = tmp_path / str(number) / "target"
        if target.exists():
            assert content(target) in [{"a.txt": text, "inner/b.txt": text} for text in ("old", "new")]
        write_directory(target, fill("newest"))
        assert [path.name for path in target.parent.iterdir()] == ["target"]

    killed_at_each_call(
        monkeypatch,
        ("mkdir", "rename", "fsync", "rmdir", "unlink"),
        lambda number: write_directory(tmp_path / str(number) / "target", fill("old")),
        lambda number: write_directory(tmp_path / str(number) / "target", fill("new")),
        examine,
    )


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


def test_json_lines_keep_the_order_of_keys():
    assert to_json_lines([{"b": 1, "a": "x\ny"}, {}]) == '{"b": 1, "a": "x\\ny"}\n{}\n'
    assert to_json_lines([]) == ""
