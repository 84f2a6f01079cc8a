"""What a recipe names and is not there, or does not fit: all of it at once, each with its line."""

from __future__ import annotations

import json
import shutil

import pytest

FAULTY = """\
model:
  name_or_path: {model}
  chat_template: gone.jinja
lora:
  adapter: gone-adapter
data:
  train:
    - {pairs}
    - path: gone.jsonl
  eval: gone-too.jsonl
train:
  optimizer: paged_adamw_8bit
  sample_prompts: [{prompt}]
"""


@pytest.fixture
def faulty(tmp_path, tiny_base, tiny_pairs):
    """A recipe whose model and first source are right, and everything else it names is not."""
    path = tmp_path / "faulty.yaml"
    path.write_text(FAULTY.format(model=tiny_base, pairs=tiny_pairs, prompt="x" * 200))
    return path


def faults_of(err: str) -> dict[str, str]:
    """Where each fault of a list stands -> what is wrong."""
    lines = [line.strip() for line in err.splitlines() if line.startswith("  ")]
    return {where: what for where, _, what in (line.partition(": ") for line in lines)}


@pytest.mark.parametrize("verb", ["check", "train"])
def test_every_fault_is_told_at_once_in_the_order_of_the_recipe(faulty, tmp_path, orpo, verb):
    code, _, err = orpo(verb, faulty, "--output-dir", tmp_path / "run")
    assert code == 2
    assert err.startswith("error: the recipe has 6 faults:\n")
    found = faults_of(err)
    wrong = {3: "gone.jinja", 5: "gone-adapter", 6: "data.max_length", 9: "gone.jsonl", 10: "gone-too.jsonl", 12: "cpu"}
    assert list(found) == [f"{faulty}:{line}" for line in wrong]
    for line, words in wrong.items():
        assert words in found[f"{faulty}:{line}"]

    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}")
    code, _, err = orpo(
        *(verb, faulty, "--output-dir", tmp_path / "run", "--set", f"model.chat_template={tmp_path}/mine.jinja"),
        *("--set", "data.max_length=100", "--set", "data.eval=null", "--set", "data.train.1.path=also-gone.jsonl"),
    )
    assert code == 2
    wrong = {f"{faulty}:5": "gone-adapter", f"{faulty}:12": "cpu", f"{faulty}:13": "train.sample_prompts"}
    found = faults_of(err)
    assert list(found) == [*wrong, "--set data.train.1.path=also-gone.jsonl"]
    assert not (tmp_path / "run").exists()


def test_one_fault_is_told_as_one(tiny_recipe, tiny_base, orpo):
    recipe = tiny_recipe(data={"train": "gone.jsonl"})
    line = next(i for i, line in enumerate(recipe.read_text().splitlines(), 1) if "gone.jsonl" in line)
    for verb in ("check", "data", "train"):
        code, _, err = orpo(verb, recipe)
        assert code == 2
        assert err.startswith(f"error: {recipe}:{line}: there is no file or directory gone.jsonl\n")
    _, _, err = orpo("check", tiny_recipe(data={"max_length": 1024}))
    told, hint = (
        f"data.max_length is 1024, and the context of {tiny_base} is 128 tokens",
        "set data.max_length: 128 or less",
    )
    assert err.endswith(f": {told}\nhint: {hint}\n")


def test_what_follows_from_a_fault_is_not_told_beside_it(tiny_recipe, orpo):
    recipe = tiny_recipe(model={"name_or_path": "./gone"}, data={"train": ["gone.jsonl"], "max_length": 10**6})
    code, _, err = orpo("check", recipe)
    assert code == 2
    assert err.startswith("error: the recipe has 2 faults:\n")
    assert "there is no directory ./gone" in err
    assert "gone.jsonl" in err


def test_data_without_a_usable_pair_is_told_with_its_line(tiny_recipe, tmp_path, orpo):
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    recipe = tiny_recipe(data={"train": str(tmp_path / "bad.jsonl")})
    line = next(i for i, line in enumerate(recipe.read_text().splitlines(), 1) if line.startswith("data:"))
    for verb in ("check", "data", "train"):
        code, _, err = orpo(verb, recipe)
        assert code == 2
        assert err.startswith(f"error: {recipe}:{line}: {tmp_path}/bad.jsonl holds no usable pair\n")


def test_data_can_be_looked_at_with_a_tokenizer_alone(tiny_recipe, tiny_base, tmp_path, orpo):
    shutil.copytree(tiny_base, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    recipe = tiny_recipe(model={"name_or_path": str(tmp_path / "tokenizer")})
    assert orpo("data", recipe, "--summary")[0] == 0
    code, _, err = orpo("check", recipe)
    assert (code, err.count("error:"), "config.json" in err) == (2, 1, True)


def test_an_adapter_that_the_model_has_no_place_for_is_told_with_the_other_faults(tmp_path, tiny_base, orpo):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {tiny_base}, chat_template: plain}}\n"
        "lora: {target_modules: [q_proj, v_prj]}\n"
        "data: {train: gone.jsonl}\n"
    )
    code, _, err = orpo("train", recipe, "--output-dir", tmp_path / "run")
    assert code == 2
    found = faults_of(err)
    assert list(found) == [f"{recipe}:2", f"{recipe}:3"]
    assert found[f"{recipe}:2"].startswith("lora.target_modules: no module is called v_prj")
    assert "gone.jsonl" in found[f"{recipe}:3"]
