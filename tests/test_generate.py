"""Answers as stock transformers gives them, from the prompt as it is in training."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_cli.data.formats import Pair
from orpo_cli.generate import answers, prompt_ids
from orpo_cli.model.build import build_for_scoring, load_text_side, pair_tokenizer
from orpo_cli.recipe import load_recipe

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


def test_answers_are_greedy_and_end_with_the_turn(tiny_recipe, tiny_base):
    recipe = load_recipe(tiny_recipe())
    text = load_text_side(recipe)
    built = build_for_scoring(recipe.model, text, torch.device("cpu"))
    found = answers(built.base, text, PROMPTS, max_new_tokens=12)

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
    answers(built.base, text, ["x"], max_new_tokens=2)
    assert built.base.training
    assert built.base.config._attn_implementation == before
