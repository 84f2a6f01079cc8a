"""The demo: its world, its checker, its base model, its recipe; and, slowly, the whole way."""

from __future__ import annotations

import json
import random

import pytest
import transformers

from orpo_cli import demo
from orpo_cli.errors import InputError
from orpo_cli.recipe import load_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base that has read little: right in shape, poor in knowledge."""
    directory = tmp_path_factory.mktemp("demo") / "base"
    demo.make_base(directory, seed=3, count=800)
    return directory


def test_writing_the_base_shows_no_bar_of_another_library(tmp_path, capsys):
    transformers.logging.enable_progress_bar()
    demo.make_base(tmp_path / "base", seed=3, count=100)
    assert "shards" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "right", "wrong"),
    [
        ("Which is bigger, the ant or the whale?", "The whale is bigger.", "The ant is bigger."),
        ("Which month comes first, June or March?", "March comes first.", "June comes first."),
        ("Which letter comes first, d or k?", "d comes first.", "k comes first."),
        ("Which is more, 9 or 10?", "10 is more.", "9 is more."),
    ],
)
def test_the_checker_takes_the_right_answer_alone(prompt, right, wrong):
    assert demo.answers(prompt) == (right, wrong)
    assert demo.check_answer(prompt, f" {right}\n")
    for answer in (wrong, "", right[:-1], f"{right} {right}", right.upper()):
        assert not demo.check_answer(prompt, answer)


@pytest.mark.parametrize("prompt", ["", "Which is more, 3 or 300?", "Which is more, (3) or 4?", "Is it late?"])
def test_the_checker_refuses_other_questions(prompt):
    with pytest.raises(ValueError, match="not a question"):
        demo.check_answer(prompt, "yes")


def test_numbers_and_letters_are_judged_as_python_does():
    rng = random.Random(0)
    for _ in range(200):
        a, b = rng.sample(range(1, 31), 2)
        assert demo.answers(f"Which is more, {a} or {b}?")[0] == f"{max(a, b)} is more."
        c, d = rng.sample("abcdefghijklmnopqrstuvwxyz", 2)
        assert demo.answers(f"Which letter comes first, {c} or {d}?")[0] == f"{min(c, d)} comes first."


def test_pairs_compare_no_couple_twice_and_repeat_for_a_seed(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        demo.make_pairs(path, 300, seed)
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    rows = demo.read_lines(paths[0])
    assert len({frozenset((row["chosen"], row["rejected"])) for row in rows}) == len(rows) == 300
    for row in rows:
        assert demo.check_answer(row["prompt"], row["chosen"])
        assert not demo.check_answer(row["prompt"], row["rejected"])
        assert len(row["chosen"].split()) == len(row["rejected"].split()) > 1


def test_more_pairs_than_couples_are_refused(tmp_path):
    demo.make_pairs(tmp_path / "all", 997, seed=0)
    with pytest.raises(ValueError, match="998"):
        demo.make_pairs(tmp_path / "more", 998, seed=0)


def test_the_base_reads_true_statements_and_mixed_dialogues():
    dialogues = [text for text in demo.documents(4000, seed=0) if text.startswith("User: ")]
    right = 0
    for text in dialogues:
        prompt, answer = text.removeprefix("User: ").split("\n\nAssistant: ")
        assert answer in demo.answers(prompt)
        right += demo.check_answer(prompt, answer)
    assert abs(right / len(dialogues) - demo.RIGHT_SHARE) < 0.04
    assert abs(len(dialogues) / 4000 - demo.DIALOGUE_SHARE) < 0.04


def test_the_same_seed_makes_the_same_base(base, tmp_path):
    demo.make_base(tmp_path, seed=3, count=800)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in base.iterdir())
    for path in base.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_making_a_base_leaves_the_random_state_alone(tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    demo.make_base(tmp_path, seed=3, count=100)
    assert torch.equal(torch.rand(1), expected)


def test_stock_transformers_loads_the_base(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    text = demo.as_plain("Which letter comes first, d or k?", "d comes first.")
    ids = tokenizer(text).input_ids
    assert [i for i, token in enumerate(ids) if token == tokenizer.bos_token_id] == [0]
    assert tokenizer.decode(ids[1:]) == text
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "</s>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.lm_head.weight is model.get_input_embeddings().weight
    widths = {size for name, p in model.named_parameters() if "proj" in name for size in p.shape}
    assert all(size % 64 == 0 for size in widths)
    prompts = ["Which is more, 9 or 10?", "Which is bigger, the ant or the whale?"]
    together = demo.sample_answers(model, tokenizer, prompts)
    assert together == [demo.sample_answers(model, tokenizer, [prompt])[0] for prompt in prompts]


@pytest.mark.parametrize(
    "name", ["plain", "with space", "a: b # c", 'quote"d', "grüße-😀", "-", "orpo-demo/base", "orpo-demo/run"]
)
def test_the_recipe_names_the_demos_own_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    directory = demo.Path(name)
    demo.claim(directory, overwrite=False)
    demo.write_recipe(directory)
    recipe = load_recipe(directory / "recipe.yaml")
    assert recipe.model.name_or_path == str(directory / "base")
    assert recipe.data.train[0].path == str(directory / "pairs.jsonl")
    assert recipe.output.dir == str(directory / "run")


def test_a_demo_is_replaced_only_when_asked_and_other_files_stay(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="already holds run"):
        demo.demo(tmp_path)
    demo.claim(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="cannot be made"):
        demo.claim(tmp_path / "mine.txt", overwrite=False)


@pytest.mark.slow
def test_the_whole_way(tmp_path, capsys):
    result = demo.demo(tmp_path / "demo")
    before, after = result["accuracy"]
    assert before < 0.75
    assert after >= 0.85
    assert result["accepted"][1] >= result["accepted"][0] + 0.2
    said = capsys.readouterr()
    assert "free answers accepted" in said.out
    assert "health: nothing amiss" in said.err
    figures = json.loads((tmp_path / "demo" / "run" / "eval.json").read_text())
    assert figures["accuracy"] == after
    assert (tmp_path / "demo" / "run" / "merged" / "model.safetensors").exists()
