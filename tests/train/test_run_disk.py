"""What befalls the disk while a run goes on."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest

from orpo_cli.errors import InputError, RunError
from orpo_cli.recipe import load_recipe
from orpo_cli.train import finish as finish_module
from orpo_cli.train import run as run_module
from orpo_cli.train import save as save_module
from orpo_cli.train.checkpoint import newest_sound
from orpo_cli.train.run import Start, train
from tests.conftest import resize
from tests.runs import rows, same_files


def test_what_is_deleted_while_a_run_goes_on_is_written_again(tiny_recipe, tmp_path, monkeypatch):
    real = save_module.save_checkpoint

    def after_a_deletion(directory, step, **keys):
        for name in ("checkpoints", "adapter"):
            shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
        (tmp_path / "run/metrics.jsonl").unlink()
        return real(directory, step, **keys)

    monkeypatch.setattr(save_module, "save_checkpoint", after_a_deletion)
    train(load_recipe(tiny_recipe(train={"max_steps": 6, "save_steps": 2})))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000006"]
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_a_disk_that_is_too_small_is_told_before_the_first_step(tiny_recipe, disk):
    with pytest.raises(
        RunError, match=f"{disk}/run: No space left on device for the run: it takes .* GiB, and "
    ) as error:
        train(load_recipe(tiny_recipe(output={"dir": str(disk / "run")})))
    assert error.value.exit_code == 1
    assert list((disk / "run").iterdir()) == []


def test_a_run_that_is_to_be_overwritten_stays_where_there_is_no_room_for_another(tiny_recipe, tmp_path, monkeypatch):
    train(load_recipe(tiny_recipe()))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    monkeypatch.setattr("orpo_cli.files.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(RunError, match="No space left on device for the run"):
        train(load_recipe(tiny_recipe(lora={"r": 256})), Start(overwrite=True))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize("kib", [60, 150, 250])
def test_a_disk_that_fills_up_midway_costs_nothing_but_time(tiny_recipe, tiny_run, disk, monkeypatch, kib):
    resize(disk, kib)
    recipe = tiny_recipe(output={"dir": str(disk / "run")})
    with monkeypatch.context() as patch:
        for module in (run_module, save_module, finish_module):
            patch.setattr(module, "require_space", lambda *where, **given_up: None)
        with pytest.raises(OSError, match="No space left") as error:
            train(load_recipe(recipe))
    assert error.value.filename.startswith(str(disk / "run"))
    assert newest_sound(disk / "run/checkpoints")[1] == []
    resize(disk, 4096)
    train(load_recipe(recipe), Start(resume=True))
    same_files(tiny_run, disk / "run")


def test_a_disk_that_cannot_be_written_is_the_user_s_to_mend(tiny_recipe, disk):
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for output in (disk / "run", disk / "new"):
        with pytest.raises(InputError, match="Read-only file system") as error:
            train(load_recipe(tiny_recipe(output={"dir": str(output)})))
        assert error.value.exit_code == 2
