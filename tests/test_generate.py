"""Answers as stock transformers gives them, from the prompt as it is in training."""

from __future__ import annotations

import io
import itertools
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_cli.data.formats import Message, Pair
from orpo_cli.errors import InputError
from orpo_cli.generate import (
    Sampling,
    Speaker,
    answer_to,
    answers_to,
    dialogue_ids,
    load_speaker,
    prompt_ids,
    written_lines,
)
from orpo_cli.model.build import build_for_scoring, load_text_side, pair_tokenizer
from orpo_cli.recipe import load_recipe
from tests.tiny import FAMILIES, tiny_model

PROMPTS = ["Which is larger, 3 or 4?", "x", "Häuser "]


@pytest.mark.parametrize(
    ("template", "add_bos"),
    [*itertools.product(["plain", "chatml", "llama3"], ["auto", True, False]), ("none", "auto"), ("none", True)],
)
def test_a_prompt_is_what_stands_before_the_answer_in_training(tiny_recipe, template, add_bos):
    recipe = load_recipe(tiny_recipe(model={"chat_template": template}, data={"add_bos": add_bos, "max_length": 1024}))
    text = load_text_side(recipe)
    for prompt in PROMPTS:
        pair = pair_tokenizer(recipe, text)(Pair(prompt, "yes", "no"), 0)
        before = pair.chosen_ids[: pair.chosen_start].tolist()
        # After `plain`'s "Assistant:" the model writes the blank itself: in most vocabularies it begins the next word.
        blank = text.tokenizer(" ", add_special_tokens=False).input_ids if template == "plain" else []
        assert prompt_ids(text, prompt) + blank == before


@pytest.mark.parametrize("template", ["plain", "chatml", "llama3"])
def test_a_dialogue_and_a_system_turn_are_what_they_are_in_training(tiny_recipe, template):
    recipe = load_recipe(tiny_recipe(model={"chat_template": template}, data={"max_length": 1024}))
    text = load_text_side(recipe)
    tokenise = pair_tokenizer(recipe, text)
    blank = text.tokenizer(" ", add_special_tokens=False).input_ids if template == "plain" else []
    turns = (Message("system", "Be brief."), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    pair = tokenise(Pair(turns, "yes", "no"), 0)
    assert dialogue_ids(text, turns) + blank == pair.chosen_ids[: pair.chosen_start].tolist()
    pair = tokenise(Pair("a", "yes", "no", system="Be brief."), 0)
    assert prompt_ids(text, "a", "Be brief.") + blank == pair.chosen_ids[: pair.chosen_start].tolist()


def test_answers_are_greedy_and_end_with_the_turn(tiny_recipe, tiny_base):
    recipe = load_recipe(tiny_recipe())
    text = load_text_side(recipe)
    built = build_for_scoring(recipe.model, text, torch.device("cpu"))
    found = [answer_to(built.base, text, prompt_ids(text, prompt), Sampling(12)) for prompt in PROMPTS]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)
    for prompt, (answer, ended) in zip(PROMPTS, found, strict=True):
        ids = tokenizer(f"User: {prompt}\n\nAssistant:").input_ids
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 12 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
        assert ended == (ids[-1] == tokenizer.eos_token_id)


def test_answering_leaves_the_engine_and_the_model_as_they_were(tiny_recipe):
    recipe = load_recipe(tiny_recipe())
    text = load_text_side(recipe)
    built = build_for_scoring(recipe.model, text, torch.device("cpu"))
    built.base.train()
    before = built.base.config._attn_implementation
    answer_to(built.base, text, prompt_ids(text, "x"), Sampling(2))
    assert built.base.training
    assert built.base.config._attn_implementation == before


# ---- orpo generate


@pytest.fixture(scope="module")
def speaker(tiny_run) -> Speaker:
    return load_speaker(str(tiny_run), base=None, sampling=Sampling(12), seed=0)


def test_pieces_are_the_answer(speaker):
    for prompt in PROMPTS:
        pieces: list[str] = []
        answer, _ = speaker.answer(prompt, pieces.append)
        assert "".join(pieces).strip() == answer
        assert not "".join(pieces)[:1].isspace()


def test_a_run_answers_as_peft_does(speaker, tiny_run, tiny_base):
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tiny_run / "adapter").eval()
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert speaker.answer(prompt)[0] == answer


def test_what_is_drawn_depends_on_seed_and_temperature(speaker):
    def drawn(seed: int, temperature: float) -> str:
        torch.manual_seed(seed)
        ids = prompt_ids(speaker.text, "x")
        return answer_to(speaker.model, speaker.text, ids, Sampling(12, temperature))[0]

    assert drawn(1, 1.0) == drawn(1, 1.0)
    assert len({drawn(seed, 1.0) for seed in range(4)}) > 1
    assert drawn(1, 1e-4) == drawn(2, 1e-4) == drawn(1, 0)


def test_a_chat_remembers_until_a_new_dialogue_begins(speaker):
    def ignore(_: str) -> None:
        pass

    first, second, again = speaker.chat(["one", "two", "/new", "one"], ignore)
    assert first == again == speaker.answer("one")[0]
    turns = [Message("user", "one"), Message("assistant", first), Message("user", "two")]
    assert second == answer_to(speaker.model, speaker.text, dialogue_ids(speaker.text, turns), speaker.sampling)[0]


def test_the_base_before_training_by_its_name(tiny_run, tiny_base, speaker):
    bare = load_speaker(str(tiny_base), base=None, sampling=Sampling(12), seed=0)
    other = load_speaker(str(tiny_run / "adapter"), base=str(tiny_base), sampling=Sampling(12), seed=0)
    assert [other.answer(p) for p in PROMPTS] == [speaker.answer(p) for p in PROMPTS]
    assert [bare.answer(p) for p in PROMPTS] != [speaker.answer(p) for p in PROMPTS]
    with pytest.raises(InputError, match="has no adapter to put into"):
        load_speaker(str(tiny_base), base=str(tiny_base), sampling=Sampling(), seed=0)


def test_a_context_is_not_left(speaker):
    long = Speaker(speaker.model, speaker.text, None, Sampling(1000))
    room = 128 - len(prompt_ids(speaker.text, "x" * 80))
    assert 0 < len(long.answer("x" * 80)[0]) <= room  # a token is a byte
    with pytest.raises(InputError, match="and the model's context is 128"):
        long.answer("x" * 128)


@pytest.mark.parametrize("template", ["plain", "none"])
def test_bytes_that_are_no_text_are_refused(tiny_recipe, template):
    text = load_text_side(load_recipe(tiny_recipe(model={"chat_template": template})))
    with pytest.raises(InputError, match=r"the prompt 'a\\udcff' is not UTF-8"):
        prompt_ids(text, os.fsdecode(b"a\xff"))
    with pytest.raises(InputError, match="stdin is not UTF-8"):
        list(written_lines(io.TextIOWrapper(io.BytesIO(b"a\n\xff\n"), encoding="utf-8")))


def test_a_chat_goes_on_after_a_line_that_is_too_long(speaker, capsys):
    [answer] = speaker.chat(["x" * 128, "one"], print)
    assert answer == speaker.answer("one")[0]
    assert "context is 128: /new begins a new dialogue" in capsys.readouterr().err


# ---- many at once


def random_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 100, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_made_together_are_those_made_one_by_one(speaker, family):
    model, prompts, sampling = tiny_model(family), random_prompts([3, 17, 9, 40, 120, 123]), Sampling(12)
    together = answers_to(model, speaker.text, prompts, sampling)
    assert together == [answer_to(model, speaker.text, prompt, sampling) for prompt in prompts]
    assert len(set(together)) == len(prompts)


def sizes_of_batches(model, monkeypatch, memory_for: int = 1000) -> list[int]:
    """The number of prompts in each call of the model's `generate`, which fails above `memory_for` of them."""
    sizes, generate = [], model.generate

    def counting(input_ids, **settings):
        sizes.append(len(input_ids))
        if len(input_ids) > memory_for:
            raise torch.OutOfMemoryError("out of memory")
        return generate(input_ids=input_ids, **settings)

    monkeypatch.setattr(model, "generate", counting)
    return sizes


def test_a_batch_is_bounded_by_prompts_by_tokens_and_by_memory(speaker, monkeypatch):
    prompts, sampling = random_prompts([8] * 20), Sampling(12)
    alone = [answer_to(speaker.model, speaker.text, prompt, sampling) for prompt in prompts]
    for tokens, memory_for, sizes in (
        (16_384, 1000, [16, 4]),
        (5 * 20, 1000, [5, 5, 5, 5]),
        (1, 1000, [1] * 20),
        (16_384, 4, [16, 8, 4, 4, 4, 4, 4]),
    ):
        with monkeypatch.context() as patched:
            patched.setattr("orpo_cli.generate.CACHED_TOKENS", tokens)
            seen = sizes_of_batches(speaker.model, patched, memory_for)
            assert answers_to(speaker.model, speaker.text, prompts, sampling) == alone
            assert seen == sizes
    sizes_of_batches(speaker.model, monkeypatch, memory_for=0)
    with pytest.raises(torch.OutOfMemoryError):
        answers_to(speaker.model, speaker.text, prompts, sampling)


def test_prompts_with_less_room_do_not_shorten_the_others_answers(speaker, monkeypatch):
    prompts, sampling = random_prompts([100, 100, 8, 120, 8]), Sampling(64)
    alone = [answer_to(speaker.model, speaker.text, prompt, sampling) for prompt in prompts]
    sizes = sizes_of_batches(speaker.model, monkeypatch)
    assert answers_to(speaker.model, speaker.text, prompts, sampling) == alone
    assert sizes == [1, 2, 2]
    assert answers_to(speaker.model, speaker.text, [], sampling) == []
