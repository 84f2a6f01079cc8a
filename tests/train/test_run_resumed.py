"""What a resumption refuses, and a run that goes back to an earlier checkpoint, killed or not."""

import json
import os
import shutil
from pathlib import Path

import pytest

from orpo_cli.errors import InputError
from orpo_cli.merge import merge_target
from orpo_cli.model.budget import Plan
from orpo_cli.recipe import load_recipe
from orpo_cli.run_directory import LOCK, held
from orpo_cli.train import checkpoint as checkpoint_module
from orpo_cli.train import loop
from orpo_cli.train import run as run_module
from orpo_cli.train.checkpoint import checkpoints
from orpo_cli.train.run import Start, train
from tests.runs import contents, rows, same_files


@pytest.fixture
def old_run(tiny_run, tmp_path) -> Path:
    """A copy of the finished run of the unchanged recipe, where the recipe of `tiny_recipe` goes on with it."""
    shutil.copytree(tiny_run, tmp_path / "run")
    return tmp_path / "run"


def resume(recipe: Path, **options) -> None:
    train(load_recipe(recipe), Start(resume=True, **options))


def resumed(run: Path) -> list[dict]:
    return json.loads((run / "manifest.json").read_text())["resumed"]


def test_each_resumption_is_recorded_with_what_differed(tiny_recipe, old_run):
    other = {"train": {"max_steps": 6}, "loss": {"beta": 0.7}}
    before = contents(old_run)
    with pytest.raises(InputError, match=r"these differ:\n  loss.beta: 0.1 before, now 0.7$"):
        resume(tiny_recipe(**other))
    assert contents(old_run) == before
    assert resumed(old_run) == []
    resume(tiny_recipe(**other), allow_changes=True)
    assert [row["step"] for row in rows(old_run) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    resume(tiny_recipe(loss=other["loss"], train={"max_steps": 8}))  # as it is by now
    changed = {"loss.beta": {"before": 0.1, "now": 0.7}}
    assert resumed(old_run) == [
        {"step": 4, "changed": changed, "noted": {}},
        {"step": 6, "changed": {}, "noted": {}},
    ]


def test_base_tokenizer_and_data_may_move_but_not_change(tiny_recipe, tiny_base, tiny_pairs, old_run, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copy(tiny_pairs, tmp_path / "moved.jsonl")
    moved = {"model": {"name_or_path": str(tmp_path / "base")}, "data": {"train": str(tmp_path / "moved.jsonl")}}
    resume(tiny_recipe(**moved, train={"max_steps": 5}))
    assert [row["step"] for row in rows(old_run) if "loss" in row] == [1, 2, 3, 4, 5]

    tokenizer = tmp_path / "base/tokenizer.json"
    tokenizer.write_text(
        tokenizer.read_text()
        .replace('"<s> $A"', '"$A"')
        .replace('"add_prefix_space": false', '"add_prefix_space": true')
    )
    weights = tmp_path / "base/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with (tmp_path / "moved.jsonl").open("a") as file:
        file.write('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    with pytest.raises(InputError) as error:
        resume(tiny_recipe(**moved, train={"max_steps": 6}))
    keys = [line.split(":")[0].strip() for line in error.value.message.splitlines()[1:]]
    assert keys == ["data.train (content)", "model (content)", "tokenizer"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"r": 8}}, "holds other weights than are to be trained"),
        ({"lora": None}, "holds other weights than are to be trained"),
        ({"train": {"optimizer": "adamw_8bit"}}, "holds the state of another optimizer"),
    ],
)
def test_what_does_not_fit_is_refused_even_if_changes_are_allowed(tiny_recipe, old_run, changes, message):
    train_keys = {"max_steps": 6, **changes.get("train", {})}
    with pytest.raises(InputError, match=message):
        resume(tiny_recipe(**{**changes, "train": train_keys}), allow_changes=True)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_rows_missing_in_the_metrics_are_not_passed_over(tiny_recipe, old_run, damage):
    metrics = old_run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:3]) + lines[3][:20]) if damage == "cut" else metrics.unlink()
    with pytest.raises(InputError, match=r"  metrics\.jsonl: .* bytes. before, now .* of them"):
        resume(tiny_recipe(train={"max_steps": 6}))
    resume(tiny_recipe(train={"max_steps": 6}), allow_changes=True)
    expected = [json.loads(line)["step"] for line in lines[:3]] if damage == "cut" else []
    assert [row["step"] for row in rows(old_run)] == [*expected, 5, 6, 6]
    assert list(resumed(old_run)[0]["changed"]) == ["metrics.jsonl"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_by_itself(tiny_recipe, old_run):
    for checkpoint in (old_run / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    before = contents(old_run)
    with pytest.raises(InputError, match=r"no checkpoint of .* is sound:\n  step-000004: .*\n  step-000002: ") as error:
        resume(tiny_recipe())
    assert "--overwrite" in error.value.hint
    with pytest.raises(InputError, match=r"step-000002 is damaged: state\.json has changed"):
        train(load_recipe(tiny_recipe()), Start(resume_from=old_run / "checkpoints/step-000002"))
    assert contents(old_run) == before
    shutil.rmtree(old_run / "checkpoints")
    with pytest.raises(InputError, match="holds a trained model and no checkpoint"):
        resume(tiny_recipe())


# Going back


class Kill(BaseException):
    """The end of the process, as far as what it would still have written goes."""


def kill(*args, **keys) -> None:
    raise Kill


def killed_at_the_second_removal(monkeypatch) -> None:
    calls = iter([checkpoint_module.remove, kill])
    monkeypatch.setattr(checkpoint_module, "remove", lambda path: next(calls)(path))


def killed_with_all_metrics(monkeypatch) -> None:
    monkeypatch.setattr(run_module, "MetricsFile", kill)


def killed_before_the_first_step(monkeypatch) -> None:
    monkeypatch.setattr(Plan, "is_roomy", False)
    monkeypatch.setattr(run_module, "rehearse", kill)


def killed_before_the_next_save(monkeypatch) -> None:
    monkeypatch.setattr(loop, "checkpoint", kill)


KILLS = {
    killed_at_the_second_removal: ["step-000002", "step-000004"],
    killed_with_all_metrics: ["step-000002"],
    killed_before_the_first_step: ["step-000002"],
    killed_before_the_next_save: ["step-000002"],
}


@pytest.fixture
def course(tiny_recipe, tmp_path):
    """A run of six steps with all of its checkpoints, and a copy with its recipe."""
    train_keys = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "save_total_limit": 9, "sample_prompts": ["Which?"]}
    train(load_recipe(tiny_recipe(train=train_keys, output={"dir": str(tmp_path / "whole")})))
    shutil.copytree(tmp_path / "whole", tmp_path / "back")
    return load_recipe(tiny_recipe(train=train_keys, output={"dir": str(tmp_path / "back")}))


def saved_by(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run / "checkpoints")]


def test_a_run_that_goes_back_ends_in_the_same_bytes(course, tmp_path):
    train(course, Start(resume_from=tmp_path / "back/checkpoints/step-000002"))
    same_files(tmp_path / "whole", tmp_path / "back")


@pytest.mark.parametrize("die", KILLS)
def test_a_kill_while_a_run_goes_back_leaves_one_course(course, tmp_path, monkeypatch, die):
    back = tmp_path / "back"
    with monkeypatch.context() as patch:
        die(patch)
        with pytest.raises(Kill):
            train(course, Start(resume_from=back / "checkpoints/step-000002"))
    assert saved_by(back) == KILLS[die]
    train(course, Start(resume=True))
    same_files(tmp_path / "whole", back)


def test_a_run_that_may_not_go_back_keeps_all_it_has(course, tmp_path):
    back = tmp_path / "back"
    before = contents(back)
    named = Start(resume_from=back / "checkpoints/step-000004")
    for changes in ({"loss": {"beta": 0.7}}, {"train": {"max_steps": 2}}):
        tree = course.model_dump(mode="json")
        other = type(course).model_validate({k: {**v, **changes.get(k, {})} for k, v in tree.items()})
        with pytest.raises(InputError, match=r"these differ|lies behind"):
            train(other, named)
    assert contents(back) == before


def test_changes_are_allowed_only_to_a_run_that_goes_on(tiny_recipe):
    with pytest.raises(InputError, match="--allow-changes says how to go on"):
        train(load_recipe(tiny_recipe()), Start(allow_changes=True))


def test_a_run_that_is_under_way_is_neither_resumed_nor_merged_into(tiny_recipe, old_run):
    with held(old_run / LOCK, old_run):
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=f"run is in use: process {os.getpid()} on "):
                train(load_recipe(tiny_recipe()), Start(**options))
        for target in (old_run, old_run / "adapter"):
            with pytest.raises(InputError, match="merged is in use"):
                merge_target(str(target), output=None, base=None, dtype="auto")
        assert merge_target(str(old_run), output=old_run.parent / "else" / "where", base=None, dtype="auto").is_dir()
