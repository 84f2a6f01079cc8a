"""What may change before a run goes on, and what may not."""

from __future__ import annotations

import shutil

import pytest

from orpo_cli.errors import InputError
from orpo_cli.recipe import Recipe
from orpo_cli.run_directory import RunDirectory, open_run, read_manifest
from orpo_cli.train.resume import check_unchanged, identity


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
