"""What a target names."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from orpo_cli.errors import InputError
from orpo_cli.recipe import load_recipe
from orpo_cli.subject import find_subject


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


@pytest.mark.parametrize("own", [{"columns": {"prompt": "q", "chosen": "good"}}, {"format": "messages"}])
def test_other_data_is_read_as_the_runs_if_it_can_be(tiny_run, tiny_pairs, tmp_path, own):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] |= own
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    asked = {"role": "user", "content": "p"}
    alike = {"q": "p", "good": "a", "chosen": [asked, {"role": "assistant", "content": "b"}], "rejected": "c"}
    alike["rejected"] = [asked, {"role": "assistant", "content": "c"}] if "format" in own else "c"
    (tmp_path / "alike.jsonl").write_text(json.dumps(alike))
    [of_alike, of_other, by_recipe] = [
        find_subject(str(run), given, str(data)).recipe.data
        for given, data in (
            (None, tmp_path / "alike.jsonl"),
            (None, tiny_pairs),
            (load_recipe(run / "recipe.yaml"), tiny_pairs),
        )
    ]
    for section in (of_alike, by_recipe):
        assert {key: getattr(section, key) for key in own} == own
    assert (of_other.columns, of_other.format) == ({}, "auto")


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
