"""The run directory: who may write there, what a resumed run must leave alone, and what a verb's target names."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_cli.errors import InputError
from orpo_cli.recipe import Recipe, load_recipe
from orpo_cli.run import (
    DIRECTORIES,
    FILES,
    LOCK,
    RunDirectory,
    check_unchanged,
    find_subject,
    held,
    identity,
    open_run,
    read_manifest,
)


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
from orpo_cli.run import RunDirectory
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

    monkeypatch.setattr("orpo_cli.run.fcntl.flock", flock)
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


def changed(recipe: Recipe, section: str, **keys) -> Recipe:
    tree = recipe.model_dump(mode="json")
    tree[section] = {**tree[section], **keys} if keys else None
    return Recipe.model_validate(tree)


def check(run: RunDirectory, recipe: Recipe, manifest: dict | None = None, **options) -> dict:
    now = read_manifest(run) if manifest is None else manifest
    return check_unchanged(run, recipe, now, options.pop("lost", {}), allow=options.pop("allow", False))


def test_the_same_recipe_goes_on(tiny_run):
    assert check(*open_run(tiny_run)) == {"changed": {}, "noted": {}}


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("train", {"max_steps": 100}),
        ("train", {"num_train_epochs": 3.0}),
        ("train", {"save_steps": 1, "eval_steps": 2, "logging_steps": 5, "save_total_limit": 9}),
        ("train", {"max_tokens_per_microbatch": 200}),
        ("output", {"dir": "elsewhere", "merge": False}),
        ("model", {"name_or_path": "moved", "chat_template": "auto"}),  # what is found there is the same
        ("data", {"train": [{"path": "moved.jsonl"}], "strict": True}),
    ],
)
def test_what_leaves_the_result_as_it_is_may_change(tiny_run, section, keys):
    run, recipe = open_run(tiny_run)
    assert check(run, changed(recipe, section, **keys))["changed"] == {}


def test_all_that_changed_is_listed_at_once(tiny_run):
    run, recipe = open_run(tiny_run)
    other = changed(changed(recipe, "loss", beta=0.2), "train", learning_rate=0.5, seed=1, max_steps=9)
    manifest = read_manifest(run)
    manifest["versions"]["torch"] = "0.1+cpu"
    manifest["fingerprints"]["tokenizer"] = "another"
    manifest["base"]["content"] = "another"
    manifest["data"]["train"]["sources"][0]["fingerprint"] = "another"
    manifest["threads"] = 64
    lost = {"metrics.jsonl": {"before": "9 bytes", "now": "0 of them"}}
    with pytest.raises(InputError) as error:
        check(run, other, manifest, lost=lost)
    lines = error.value.message.splitlines()
    assert lines[0] == f"{run.path} is not what it was; these differ:"
    keys = ["data.train (content)", "loss.beta", "model (content)", "tokenizer", "train.learning_rate", "train.seed"]
    assert [line.split(":")[0].strip() for line in lines[1:]] == [*keys, "versions.torch", "metrics.jsonl"]
    assert "  loss.beta: 0.1 before, now 0.2" in lines
    assert "--allow-changes" in error.value.hint

    entry = check(run, other, manifest, lost=lost, allow=True)
    assert list(entry["changed"]) == [*keys, "versions.torch", "metrics.jsonl"]
    assert entry["changed"]["train.seed"] == {"before": 42, "now": 1}
    assert entry["noted"]["threads"]["now"] == 64


def test_a_build_for_another_device_is_no_other_version(tiny_run):
    run, recipe = open_run(tiny_run)
    manifest = read_manifest(run)
    manifest["versions"]["torch"] = manifest["versions"]["torch"].partition("+")[0] + "+cu999"
    manifest["versions"]["bitsandbytes"] = "0.0.1"  # which this run does not use
    assert check(run, recipe, manifest) == {"changed": {}, "noted": {}}


@pytest.mark.parametrize(("keys", "expected"), [({}, "lora"), ({"r": 8}, "lora.r")])
def test_another_adapter_is_another_run(tiny_run, keys, expected):
    run, recipe = open_run(tiny_run)
    assert list(check(run, changed(recipe, "lora", **keys), allow=True)["changed"]) == [expected]


def test_streamed_data_come_in_another_order(tiny_run):
    run, recipe = open_run(tiny_run)
    manifest = read_manifest(run)
    manifest["data"]["train"]["sources"][0]["streamed"] = True
    assert list(check(run, recipe, manifest, allow=True)["changed"]) == ["data.train (streamed)"]


def test_held_out_data_of_their_own_count_too(tiny_run):
    _, recipe = open_run(tiny_run)
    manifest = {"data": {"eval": {"sources": [{"fingerprint": "some", "streamed": False}]}}}
    other = changed(recipe, "data", eval=[{"path": "held-out.jsonl"}])
    assert identity(other, manifest)["data.eval (content)"] == ["some"]


def test_a_run_that_says_nothing_of_itself_is_another_one(tiny_run, tmp_path):
    shutil.copy(tiny_run / "recipe.yaml", tmp_path)
    run, recipe = open_run(tmp_path)
    with pytest.raises(InputError, match=r"versions\.torch: .None. before"):
        check(run, recipe, read_manifest(RunDirectory(tiny_run)))


def test_only_a_run_goes_on(tiny_run, tmp_path):
    with pytest.raises(InputError, match="holds no run to go on with"):
        check(RunDirectory(tmp_path), open_run(tiny_run)[1])


# What a target names


def test_a_run_is_its_base_with_its_adapter(tiny_run, tiny_base):
    subject = find_subject(str(tiny_run), None, None)
    assert subject.recipe.model.name_or_path == str(tiny_base)
    assert subject.adapter == tiny_run / "adapter"
    assert subject.recipe.data.eval.holdout == 8


@pytest.mark.parametrize("part", ["adapter", "checkpoints/step-000004"])
def test_an_adapter_within_a_run_is_read_as_the_run_says(tiny_run, tiny_base, part):
    subject = find_subject(str(tiny_run / part), None, None)
    assert subject.adapter == tiny_run / part
    assert subject.recipe.model.name_or_path == str(tiny_base)
    assert subject.recipe.model.chat_template == "plain"
    assert subject.recipe.data.eval.holdout == 8


def test_merged_weights_stand_by_themselves_and_know_their_run(tiny_run):
    subject = find_subject(str(tiny_run / "merged"), None, None)
    assert subject.recipe.model.name_or_path == str(tiny_run / "merged")
    assert (subject.adapter, subject.recipe.lora) == (None, None)
    assert subject.recipe.model.chat_template == "auto"  # it brings its own
    assert subject.recipe.data.eval.holdout == 8


def test_an_adapter_that_left_its_run_needs_data(tiny_run, tiny_base, tiny_pairs, tmp_path):
    adapter = tmp_path / "alone" / "adapter"
    shutil.copytree(tiny_run / "adapter", adapter)
    with pytest.raises(InputError, match="nothing says which pairs to score"):
        find_subject(str(adapter), None, None)
    subject = find_subject(str(adapter), None, str(tiny_pairs))
    assert (subject.adapter, subject.tokenizer) == (adapter, adapter)
    assert subject.recipe.model.name_or_path == str(tiny_base)
    assert [source.path for source in subject.recipe.data.eval] == [str(tiny_pairs)]


def test_a_recipe_says_how_to_use_what_has_none(tiny_base, tiny_recipe):
    recipe = load_recipe(tiny_recipe(loss={"beta": 0.7}))
    subject = find_subject(str(tiny_base), recipe, None)
    assert subject.recipe.loss.beta == 0.7
    assert subject.recipe.model.name_or_path == str(tiny_base)
    assert subject.adapter is None


def test_other_data_takes_the_place_of_the_held_out_set(tiny_run, tiny_pairs):
    subject = find_subject(str(tiny_run), None, str(tiny_pairs))
    assert [source.path for source in subject.recipe.data.eval] == [str(tiny_pairs)]


def test_an_unfinished_run_is_no_model(tiny_run, tmp_path):
    for name in ("recipe.yaml", "manifest.json"):
        (tmp_path / "run").mkdir(exist_ok=True)
        shutil.copy(tiny_run / name, tmp_path / "run" / name)
    with pytest.raises(InputError, match="is not finished: it has no adapter/"):
        find_subject(str(tmp_path / "run"), None, None)


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"base_model_name_or_path": null}', '{"base_model_name_or_path"'])
def test_an_adapter_that_names_no_base_is_refused(tmp_path, config):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(InputError, match="does not name the adapter's base"):
        find_subject(str(tmp_path), None, "pairs.jsonl")


@pytest.mark.parametrize(("target", "data"), [("", "x.jsonl"), ("model", "")])
def test_an_empty_name_is_refused(target, data):
    with pytest.raises(InputError, match="empty"):
        find_subject(target, None, data)


def test_a_checkpoint_directory_on_its_own_is_an_adapter(tiny_run, tiny_pairs, tmp_path):
    shutil.copytree(tiny_run / "checkpoints" / "step-000002", tmp_path / "kept")
    subject = find_subject(str(tmp_path / "kept"), None, str(tiny_pairs))
    assert subject.adapter == tmp_path / "kept"
    assert subject.tokenizer is None
    config = json.loads((tmp_path / "kept" / "adapter_config.json").read_text())
    assert subject.recipe.model.name_or_path == config["base_model_name_or_path"]
