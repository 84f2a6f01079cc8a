"""Answers to held-out prompts, and a judge of them, against stock transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from orpo_cli.answers import Answer, Question, judged_text, questions, side_by_side, win_rates
from orpo_cli.data.formats import Message, Pair
from orpo_cli.errors import ModelError
from orpo_cli.evaluate import Extras, evaluate_target
from orpo_cli.generate import Sampling, load_speaker
from orpo_cli.model.build import load_text_side, pair_tokenizer
from orpo_cli.recipe import load_recipe
from orpo_cli.statistics import bootstrap
from tests.conftest import tiny_rows

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


@pytest.fixture(scope="module", params=["plain", "template"])
def judge(request, tiny_base, tmp_path_factory) -> Path:
    """A random reward model on the tiny tokenizer, with a chat template of its own or without."""
    directory = tmp_path_factory.mktemp("judge")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = TEMPLATE if request.param == "template" else None
    tokenizer.save_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=1,
            pad_token_id=0,
            max_position_embeddings=256,
        )
        model = LlamaForSequenceClassification(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    return directory


def test_a_judge_sees_what_stock_transformers_sees(tiny_run, tiny_base, tiny_pairs, judge, tmp_path):
    figures = evaluate_target(
        str(tiny_run),
        data=str(tiny_pairs),
        extras=Extras(str(tiny_base), samples=12, judge=str(judge), max_new_tokens=6),
    )
    rows = [json.loads(line) for line in Path(tiny_pairs).read_text().splitlines()]
    samples = figures["samples"]
    assert len(samples) == len({sample["prompt"] for sample in samples}) == figures["answers"]["prompts"] == 12
    speakers = {
        who: load_speaker(str(target), base=None, sampling=Sampling(6), seed=0)
        for who, target in (("model", tiny_run), ("base", tiny_base))
    }
    tokenizer = AutoTokenizer.from_pretrained(judge)
    reward = AutoModelForSequenceClassification.from_pretrained(judge)
    rewards: dict[str, list[float]] = {"chosen": [], "model": [], "base": []}
    for sample in samples:
        row = rows[sample["index"]]
        assert (sample["prompt"], sample["chosen"]) == (row["prompt"], row["chosen"])
        for who, speaker in speakers.items():
            answer, ended = speaker.answer(row["prompt"])
            assert (sample[who], sample[f"{who}_ended"]) == (answer, ended)
        for who, given in rewards.items():
            if tokenizer.chat_template:
                chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": sample[who]}]
                inputs = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")
            else:
                inputs = tokenizer(row["prompt"], sample[who], return_tensors="pt")
            with torch.no_grad():
                given.append(reward(input_ids=inputs["input_ids"]).logits.item())

    found = figures["judge"]
    assert found["model"] == str(judge)
    for who in rewards:
        assert found[f"{who}_reward"] == pytest.approx(np.mean(rewards[who]), abs=1e-5)
    for who in ("chosen", "base"):
        wins = sum(own > other for own, other in zip(rewards["model"], rewards[who], strict=True))
        losses = sum(own < other for own, other in zip(rewards["model"], rewards[who], strict=True))
        against = found[f"against_{who}"]
        assert (against["wins"], against["ties"], against["losses"]) == (wins, 12 - wins - losses, losses)
        assert against["win_rate"] == pytest.approx((wins + (12 - wins - losses) / 2) / 12)
    assert found["against_chosen"]["wins"] + found["against_chosen"]["losses"] > 0


def test_win_rates_have_bootstrap_intervals_and_sign_tests():
    rng = np.random.default_rng(0)
    rewards = {"chosen": rng.normal(size=50), "model": rng.normal(0.5, 1, 50), "base": np.zeros(50)}
    rewards["model"][:5] = rewards["chosen"][:5]
    figures = win_rates(rewards)
    against = figures["against_chosen"]
    assert against["ties"] == 5
    outcome = np.where(rewards["model"] > rewards["chosen"], 1.0, 0.0)
    outcome[:5] = 0.5
    mean, low, high = bootstrap(outcome[None])
    assert against["win_rate"] == pytest.approx(mean[0])
    assert against["win_rate_ci95"] == pytest.approx([low[0], high[0]])
    assert figures["model_reward"] == pytest.approx(rewards["model"].mean())
    assert (
        figures["against_base"]["p_sign"]
        < 0.05
        < win_rates({"model": rewards["model"], "base": rewards["model"]})["against_base"]["p_sign"]
    )


def test_what_is_no_reward_model_is_refused_before_anything_is_scored(tiny_run, tiny_base, tmp_path, judge):
    with pytest.raises(ModelError, match="is no reward model: LlamaForCausalLM"):
        evaluate_target(str(tiny_run), extras=Extras(judge=str(tiny_base)))
    with pytest.raises(ModelError, match="there is no directory"):
        evaluate_target(str(tiny_run), extras=Extras(judge=str(tmp_path / "absent")))
    config = json.loads((judge / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b", "2": "c"}}))
    with pytest.raises(ModelError, match="3 labels"):
        evaluate_target(str(tiny_run), extras=Extras(judge=str(tmp_path)))


@pytest.mark.parametrize("judge", ["template"], indirect=True)
def test_a_judge_without_system_turns_reads_that_text_in_the_users(tiny_run, tmp_path, judge):
    path, copy = tmp_path / "pairs.jsonl", tmp_path / "judge"
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q"}]
    answered = {"chosen": "yes", "rejected": "no"}
    path.write_text(
        json.dumps({"prompt": "Why?", "system": "Be brief.", **answered})
        + "\n"
        + json.dumps({"prompt": "Be brief.\n\nWhy?", **answered})
    )
    shutil.copytree(judge, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    refusing = (
        "{{% if messages|selectattr('role', 'eq', '{}')|list %}}{{{{ raise_exception('not that') }}}}{{% endif %}}"
    )
    tokenizer.chat_template = refusing.format("system") + TEMPLATE
    tokenizer.save_pretrained(copy)
    [first, second] = [
        judged_text(tokenizer, question.messages, "yes")
        for question in (
            Question(0, Pair("Why?", "", "", system="Be brief.")),
            Question(1, Pair("Be brief.\n\nWhy?", "", "")),
        )
    ]
    assert first == second == "<user>Be brief.\n\nWhy?</s><assistant>yes</s>"
    figures = evaluate_target(str(tiny_run), data=str(path), extras=Extras(judge=str(copy), max_new_tokens=2))
    assert figures["answers"]["prompts"] == 2
    assert np.isfinite(figures["judge"]["model_reward"])

    path.write_text(json.dumps({"prompt": turns, **answered}))
    tokenizer.chat_template = refusing.format("assistant") + TEMPLATE
    tokenizer.save_pretrained(copy)
    with pytest.raises(ModelError, match="refuses a dialogue of user, assistant, user, assistant: not that"):
        evaluate_target(str(tiny_run), data=str(path), extras=Extras(judge=str(copy)))


@pytest.fixture(scope="module")
def long_prompts(tmp_path_factory) -> Path:
    """Pairs of which every other one has a prompt beyond the tiny base's context of 128 bytes."""
    path = tmp_path_factory.mktemp("long") / "pairs.jsonl"
    said = [{**row, "prompt": "word " * (40 * (i % 2)) + row["prompt"]} for i, row in enumerate(tiny_rows(8))]
    path.write_text("".join(json.dumps(row) + "\n" for row in said))
    return path


def test_of_a_prompt_that_was_cut_what_is_left_is_asked(tiny_recipe, tiny_base, long_prompts):
    recipe = tiny_recipe(data={"train": str(long_prompts), "eval": [str(long_prompts)], "overlong": "truncate_prompt"})
    extras = Extras(samples=8, max_new_tokens=4)
    samples = evaluate_target(str(tiny_base), recipe_file=recipe, extras=extras)["samples"]
    assert [len(sample["prompt"]) > 200 for sample in samples] == [False, True] * 4
    resolved = load_recipe(recipe)
    text = load_text_side(resolved)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    for sample, row in zip(samples, map(json.loads, long_prompts.read_text().splitlines()), strict=True):
        if len(row["prompt"]) > 200:
            pair = pair_tokenizer(resolved, text)(Pair(row["prompt"], row["chosen"], row["rejected"]), 0)
            asked = torch.tensor([pair.chosen_ids[: pair.chosen_start].tolist()])
            room = min(4, 128 - asked.shape[1])
            out = model.generate(input_ids=asked, max_new_tokens=room, do_sample=False, eos_token_id=2, pad_token_id=0)
            assert sample["model"] == text.tokenizer.decode(out[0, asked.shape[1] :], skip_special_tokens=True).strip()


def test_prompts_that_the_bases_context_does_not_hold_are_not_asked(tiny_base, long_prompts, tmp_path):
    large = shutil.copytree(tiny_base, tmp_path / "large")
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    extras = Extras(base=str(tiny_base), samples=8, max_new_tokens=2)
    figures = evaluate_target(str(large), data=str(long_prompts), extras=extras)
    assert (figures["pairs"], figures["delta"]["pairs"]) == (8, 4)
    assert [sample["index"] for sample in figures["samples"]] == [0, 2, 4, 6]


def test_answers_to_all_prompts_as_alpaca_eval_reads_them(tiny_run, tmp_path):
    file = tmp_path / "answers.json"
    figures = evaluate_target(str(tiny_run), extras=Extras(answers=file, max_new_tokens=3))
    written = json.loads(file.read_text())
    assert "samples" not in figures
    assert len(written) == figures["answers"]["prompts"] == len({row["instruction"] for row in written})
    assert all(set(row) == {"instruction", "output", "generator"} for row in written)
    assert {row["generator"] for row in written} == {str(tiny_run)}
    speaker = load_speaker(str(tiny_run), base=None, sampling=Sampling(3), seed=0)
    assert [row["output"] for row in written] == [speaker.answer(row["instruction"])[0] for row in written]


def test_different_prompts_evenly_spread():
    pairs = [(10 * i, Pair(f"p{i // 2}", "yes", "no")) for i in range(20)]
    assert [q.index for q in questions(pairs, None)] == [0, 20, 40, 60, 80, 100, 120, 140, 160, 180]
    assert [q.index for q in questions(pairs, 3)] == [0, 60, 120]
    assert [q.index for q in questions(pairs, 99)] == [q.index for q in questions(pairs, None)]


def test_a_dialogue_is_shown_turn_by_turn():
    turns = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Why?"))
    question = Question(3, Pair(turns, "Because.", "No."))
    assert question.text == "user: Hi\n\nassistant: Hello\n\nuser: Why?"
    [shown] = side_by_side({"model": [Answer("So.", True)]}, [question])
    assert shown == {
        "index": 3,
        "prompt": question.text,
        "chosen": "Because.",
        "model": "So.",
        "model_ended": True,
    }
    assert Question(0, Pair("Hi", "a", "b", system="Be brief.")).text == "system: Be brief.\n\nuser: Hi"
