"""A model without weights against the real one: the same needs, to the byte."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from orpo_cli.errors import ModelError
from orpo_cli.model.build import build_for_training, load_text_side
from orpo_cli.model.load import load_model
from orpo_cli.model.lora import add_lora, save_adapter
from orpo_cli.model.memory import Needs
from orpo_cli.model.outline import outline, packed
from orpo_cli.recipe import LoraSection, load_recipe

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


def saved(recipe, directory: Path, **keys) -> Path:
    """An adapter of the recipe's base."""
    model = add_lora(load_model(recipe.model, CPU), LoraSection(**keys), [])
    save_adapter(model, directory, base=recipe.model.name_or_path, revision="main")
    return directory


@pytest.mark.parametrize("keys", [{"r": 3}, {"r": 5, "use_dora": True}, {"target_modules": ["q_proj"], "dropout": 0.1}])
def test_an_adapter_to_go_on_from_is_drawn_as_it_is_trained(tiny_recipe, tmp_path, keys):
    adapter = saved(load_recipe(tiny_recipe()), tmp_path / "adapter", **keys)
    recipe = load_recipe(tiny_recipe(lora=None), [f"lora.adapter={adapter}"])
    text = load_text_side(recipe)
    with warnings.catch_warnings(record=True) as told, outline(recipe, text, CPU) as drawn:
        warnings.simplefilter("always")
        got = Needs.of(drawn.logprobs, 60, "adamw")
        shapes = {name: (p.shape, p.dtype, p.requires_grad) for name, p in drawn.model.named_parameters()}
    assert not [warning for warning in told if "meta parameter" in str(warning.message)]
    built = build_for_training(recipe, text, CPU)
    assert shapes == {name: (p.shape, p.dtype, p.requires_grad) for name, p in built.model.named_parameters()}
    assert got == Needs.of(built.logprobs, 60, "adamw")


def gone(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def without_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def of_another_kind(adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))


def of_another_shape(adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 7}))


@pytest.mark.parametrize(
    ("spoil", "model", "said"),
    [
        (gone, {}, "is no adapter"),
        (without_weights, {}, r"has no adapter_model\.safetensors"),
        (of_another_kind, {}, "of the kind IA3"),
        (of_another_shape, {}, "does not fit the base"),
        (lambda adapter: None, {"chat_template": "chatml"}, "no rows for the template's new tokens"),
    ],
)
def test_an_adapter_that_is_refused_in_training_is_refused_before(tiny_recipe, tmp_path, spoil, model, said):
    adapter = saved(load_recipe(tiny_recipe()), tmp_path / "adapter", r=3)
    spoil(adapter)
    recipe = load_recipe(tiny_recipe(lora=None, model=model), [f"lora.adapter={adapter}"])
    text = load_text_side(recipe)
    with pytest.raises(ModelError, match=said) as caught, outline(recipe, text, CPU):
        pass
    with pytest.raises(ModelError) as in_training:
        build_for_training(recipe, text, CPU)
    assert str(caught.value) == str(in_training.value)
