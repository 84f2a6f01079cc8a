"""A checkpoint is there whole or not at all, whenever the machine dies and whichever byte of it changes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orpo_cli.errors import InputError
from orpo_cli.files import remove
from orpo_cli.train import checkpoint
from orpo_cli.train.checkpoint import (
    checkpoints,
    fault,
    give_up_later,
    load_checkpoint,
    newest_sound,
    save_checkpoint,
    step_of,
)

FILES = ["MANIFEST.json", "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json"]


def tensors(step: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(7, 3, generator=generator) + step, "b": torch.arange(5) + step}


def save(directory: Path, step: int, keep: int = 2, protect: int | None = None, extra: float = 0.0) -> Path:
    def write_weights(unfinished: Path) -> None:
        save_file(tensors(step, 0), unfinished / "adapter_model.safetensors")
        (unfinished / "adapter_config.json").write_text(json.dumps({"r": 4}))

    state = {"step": step, "position": {"epoch": 0, "offset": 3 * step}, "best_value": extra}
    return save_checkpoint(
        directory,
        step,
        write_weights=write_weights,
        optimizer=tensors(step, 1),
        state=state,
        keep=keep,
        protect=protect,
    )


def is_whole(checkpoint: Path, step: int, extra: float = 0.0) -> bool:
    weights, optimizer, state = load_checkpoint(checkpoint)
    equal = all(torch.equal(weights[name], tensor) for name, tensor in tensors(step, 0).items())
    equal &= all(torch.equal(optimizer[name], tensor) for name, tensor in tensors(step, 1).items())
    return equal and state == {"step": step, "position": {"epoch": 0, "offset": 3 * step}, "best_value": extra}


def names(directory: Path) -> list[str]:
    return [path.name for path in checkpoints(directory)]


def test_what_is_saved_is_loaded(tmp_path):
    target = save(tmp_path, 7)
    assert target == tmp_path / "step-000007"
    assert sorted(path.name for path in target.iterdir()) == FILES
    assert fault(target) is None
    assert is_whole(target, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000007"]


def test_equal_states_are_equal_bytes(tmp_path):
    first, second = save(tmp_path / "a", 7), save(tmp_path / "b", 7)
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_tensors_that_are_views_are_saved(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    optimizer = {"transposed": whole.T, "row": whole[1]}
    target = save_checkpoint(
        tmp_path,
        1,
        write_weights=lambda d: save_file({"w": whole}, d / "model.safetensors"),
        optimizer=optimizer,
        state={},
        keep=1,
    )
    loaded = load_checkpoint(target)[1]
    assert torch.equal(loaded["transposed"], whole.T)
    assert torch.equal(loaded["row"], whole[1])


# Names and retention


def test_names_sort_by_step_and_others_are_not_touched(tmp_path):
    for step in (2, 999_999, 1_000_000):
        save(tmp_path, step, keep=10)
    for other in ("step-12", "step-abcdef", "notes", "step-000003.bak"):
        (tmp_path / other).mkdir()
    (tmp_path / "step-000004").write_text("a file")
    assert names(tmp_path) == ["step-000002", "step-999999", "step-1000000"]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [2, 999_999, 1_000_000]
    assert step_of(tmp_path / "notes") == -1
    assert checkpoints(tmp_path / "absent") == []
    assert newest_sound(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize(("keep", "protect"), [(1, None), (2, None), (3, None), (1, 2), (2, 2), (2, 5), (1, 6)])
def test_the_newest_are_kept_and_the_best_besides(tmp_path, keep, protect):
    for step in range(1, 7):
        save(tmp_path, step, keep=keep, protect=protect if protect and protect <= step else None)
    newest = [step for step in range(6, 0, -1) if step != protect][:keep]
    if protect == 6:  # the new one itself: it always stays, and counts among the kept
        newest = [6, *range(5, 0, -1)][:keep]
    assert names(tmp_path) == [f"step-{step:06d}" for step in sorted({*newest, *([protect] if protect else [])})]


def test_going_on_from_an_earlier_one_gives_up_the_later_ones(tmp_path, monkeypatch):
    for step in (2, 4, 6, 8):
        save(tmp_path, step, keep=4)
    left = []
    monkeypatch.setattr(checkpoint, "remove", lambda path: (remove(path), left.append(names(tmp_path))))
    give_up_later(tmp_path, 4)
    assert left == [["step-000002", "step-000004", "step-000006"], ["step-000002", "step-000004"]]
    assert is_whole(tmp_path / "step-000004", 4)


def test_a_file_that_someone_else_put_there_does_no_harm(tmp_path):
    target = save(tmp_path, 3)
    (target / "other.safetensors").write_bytes(b"?")
    (target / ".DS_Store").write_bytes(b"?")
    assert is_whole(target, 3)


# Damage


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(tmp_path, name):
    save(tmp_path, 1)
    target = save(tmp_path, 2)
    path = target / name
    original = path.read_bytes()
    for place in range(0, len(original), max(1, len(original) // 40)):
        damaged = bytearray(original)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert fault(target) is not None
        assert newest_sound(tmp_path)[0] == tmp_path / "step-000001"
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(target)
    path.write_bytes(original)
    assert newest_sound(tmp_path) == (target, [])


def test_every_flipped_bit_of_the_manifest_is_found(tmp_path):
    """It has no hash of its own; what it says must agree with the files, and the text with what it says."""
    target = save(tmp_path, 2)
    path = target / "MANIFEST.json"
    original = path.read_bytes()
    for place in range(8 * len(original)):
        damaged = bytearray(original)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert fault(target) is not None, damaged


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_found(tmp_path, name):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    for damage in (lambda: path.write_bytes(content[:-2]), lambda: path.write_bytes(b""), path.unlink):
        damage()
        newest, damaged = newest_sound(tmp_path)
        assert newest == tmp_path / "step-000001"
        assert damaged[0].startswith("step-000002: ")
        assert name in damaged[0]


def test_links_and_paths_outside_are_not_followed(tmp_path):
    target = save(tmp_path / "checkpoints", 2)
    outside = tmp_path / "state.json"
    shutil.move(target / "state.json", outside)
    (target / "state.json").symlink_to(outside)
    assert "state.json" in fault(target)
    manifest = json.loads((target / "MANIFEST.json").read_text())
    manifest["files"]["../../state.json"] = manifest["files"].pop("state.json")
    (target / "MANIFEST.json").write_text(json.dumps(manifest))
    assert fault(target) is not None


NO_WEIGHTS = '{"files": {"state.json": 1, "optimizer.safetensors": 1, "adapter_config.json": 1}}'


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "null", "{}", '{"files": {}}', '{"files": []}', '{"files": {"state.json": 3}}', NO_WEIGHTS, "\xff"],
)
def test_any_nonsense_in_the_manifest_is_a_fault(tmp_path, manifest):
    target = save(tmp_path, 2)
    (target / "MANIFEST.json").write_bytes(manifest.encode("latin-1"))
    assert fault(target) is not None


def test_a_damaged_new_checkpoint_deletes_none_of_the_old(tmp_path, monkeypatch):
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    monkeypatch.setattr("orpo_cli.train.checkpoint.fault", lambda checkpoint: "the disk lies")
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]


# Death between any two steps of writing

CALLS = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "open")


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it and tidy up."""


def die_at(monkeypatch: pytest.MonkeyPatch, number: int) -> list[str]:
    """Let the `number`-th call that changes the file system be the last thing that happens; the calls made."""
    made: list[str] = []

    def dying(name: str):
        real = getattr(os, name)

        def call(*args, **kwargs):
            made.append(name)
            if len(made) > number:
                raise Killed
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, dying(name))
    return made


def deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare, write, examine) -> None:
    """`write` in a directory that `prepare` made, killed before each of its calls in turn; `examine` what is left."""
    number = 0
    while True:
        directory = tmp_path / f"death-{number}"
        prepare(directory)
        with monkeypatch.context() as patch:
            made = die_at(patch, number)
            try:
                write(directory)
                finished = True
            except Killed:
                finished = False
        examine(directory, finished)
        if finished:
            assert number > 10, made
            return
        number += 1


def test_a_kill_at_any_moment_leaves_a_sound_checkpoint(tmp_path, monkeypatch):
    def prepare(directory: Path) -> None:
        for step in (1, 2):
            save(directory, step)

    def examine(directory: Path, finished: bool) -> None:
        newest, damaged = newest_sound(directory)
        assert newest is not None
        assert step_of(newest) in (2, 3)
        assert is_whole(newest, step_of(newest))
        # Only the deletion of the oldest may be left half done; the new one appears by one rename.
        assert damaged == []
        # The run goes on, writes this checkpoint again and the next, and nothing unfinished stays.
        for step in (3, 4):
            save(directory, step)
            assert is_whole(directory / f"step-{step:06d}", step)
        assert names(directory) == ["step-000003", "step-000004"]
        if finished:
            assert sorted(path.name for path in directory.iterdir()) == names(directory)

    deaths(tmp_path, monkeypatch, prepare, lambda directory: save(directory, 3), examine)


def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two(tmp_path, monkeypatch):
    """As when a resumed run comes by a step that it had saved already."""

    def prepare(directory: Path) -> None:
        save(directory, 1)
        save(directory, 2, extra=1.0)

    def examine(directory: Path, finished: bool) -> None:
        newest, _ = newest_sound(directory)
        assert newest is not None
        if finished:
            assert is_whole(newest, 2, extra=2.0)
        elif step_of(newest) == 2:
            assert load_checkpoint(newest)[2]["best_value"] in (1.0, 2.0)
        else:  # between the two renames the older one has to do
            assert is_whole(newest, 1)

    deaths(tmp_path, monkeypatch, prepare, lambda directory: save(directory, 2, extra=2.0), examine)


def test_all_is_synced_before_the_rename_that_makes_it_exist(tmp_path, monkeypatch):
    events = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        events.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        real_fsync(descriptor)

    def rename(source, target, **kwargs):
        events.append(("rename", Path(target).name))
        real_rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    directory = tmp_path / "checkpoints"
    save(directory, 3)
    made = events.index(("rename", "step-000003"))
    synced = {name for kind, name in events[:made] if kind == "fsync"}
    assert synced >= {*FILES, ".step-000003.unfinished"}
    assert ("fsync", "checkpoints") in events[made:]
