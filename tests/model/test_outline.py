"""A model without weights against the real one: the same needs, to the byte."""

from __future__ import annotations

import pytest
import torch

from orpo_cli.model.build import build_for_training, load_text_side
from orpo_cli.model.memory import Needs
from orpo_cli.model.outline import outline, packed
from orpo_cli.recipe import load_recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": {"r": 4, "dropout": 0.1, "use_dora": True}},
        {"lora": None},
        {"lora": None, "model": {"dtype": "bfloat16", "chat_template": "chatml"}},
        {"model": {"chat_template": "chatml", "dtype": "bfloat16"}},
        {"model": {"shared_prefix": False}},
        {"model": {"load_in_4bit": True, "dtype": "bfloat16"}},
        {"model": {"load_in_8bit": True, "dtype": "float16"}},
    ],
)
def test_needs_are_those_of_the_real_model(tiny_recipe, changes):
    """Before and after: what is made without numbers leaves nothing behind that is taken for a number."""
    recipe = load_recipe(tiny_recipe(**changes))
    text = load_text_side(recipe)
    with outline(recipe, text, CPU) as drawn:
        got = Needs.of(drawn.logprobs, 60, "adamw")
        fixed = packed(got.fixed, drawn.base, recipe.model)
        assert all(p.device == CPU for p in drawn.model.parameters())
    built = build_for_training(recipe, text, CPU)
    expected = Needs.of(built.logprobs, 60, "adamw")
    assert drawn.trained_rows == built.trained_rows
    if recipe.model.load_in_4bit or recipe.model.load_in_8bit:
        assert fixed.weights == pytest.approx(expected.fixed.weights, rel=0.05)
        assert fixed.backward == expected.fixed.backward
        assert got.training(500, 0).activations == pytest.approx(expected.training(500, 0).activations, rel=0.15)
        return
    assert fixed == expected.fixed
    if recipe.model.shared_prefix is False:  # torch chooses the kernel of stock attention by what tensors hold
        assert 1 <= got.training(500, 0).activations / expected.training(500, 0).activations < 1.3
    else:
        assert got.activations == expected.activations
    assert (got.head, got.head_row) == (expected.head, expected.head_row)
    assert drawn.fitness.not_shared is None or recipe.model.shared_prefix is False
