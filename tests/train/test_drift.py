"""The prompts' and ends' log-probs of an evaluation, against stock transformers and peft on each text by itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from orpo_cli.inspect import kept_pairs, open_data
from orpo_cli.metrics import read_metrics
from orpo_cli.recipe import load_recipe
from orpo_cli.train.drift import PAIRS
from orpo_cli.train.run import train


@torch.no_grad()
def expected(model, pairs) -> tuple[float, float]:
    of_prompts, ends = [], []
    for pair in pairs:
        ids = torch.tensor(np.asarray(pair.chosen_ids, np.int64))
        logps = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        of_prompts += logps[: pair.chosen_start - 1].tolist()
        ends.append(logps[-1].item())
    return float(np.mean(of_prompts)), float(np.median(ends))


@pytest.mark.parametrize("holdout", [8, 40])
@pytest.mark.parametrize("lora", [{}, None])
def test_the_figures_are_those_of_stock_transformers(tiny_recipe, tiny_base, tmp_path, holdout, lora):
    recipe = load_recipe(tiny_recipe(lora=lora, data={"eval": {"holdout": holdout}}, train={"max_steps": 2}))
    train(recipe)
    first, last = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row]
    held_out = open_data(recipe).held_out
    pairs = sorted(kept_pairs(held_out), key=lambda pair: pair.index)
    pairs = pairs[:: -(-len(pairs) // PAIRS)]
    assert len(pairs) == {8: 8, 40: 14}[holdout]

    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    prompts, ends = expected(base, pairs)
    assert first["eval_prompt_logps"] == pytest.approx(prompts, abs=1e-5)
    assert first["eval_end_logps"] == pytest.approx(ends, abs=1e-5)
    if lora is None:
        assert "eval_base_prompt_logps" not in last
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged")
    else:
        assert last["eval_base_prompt_logps"] == first["eval_base_prompt_logps"] == first["eval_prompt_logps"]
        model = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    prompts, ends = expected(model, pairs)
    assert abs(prompts - first["eval_prompt_logps"]) > 1e-3
    assert last["eval_prompt_logps"] == pytest.approx(prompts, abs=1e-5)
    assert last["eval_end_logps"] == pytest.approx(ends, abs=1e-5)


def test_looking_at_the_base_leaves_training_as_it_is(tiny_recipe, tmp_path):
    """Adapters off and on again in the middle: the same steps as without an evaluation there."""
    weights = []
    for name, every in (("a", 1), ("b", None)):
        train(load_recipe(tiny_recipe(train={"eval_steps": every}, output={"dir": str(tmp_path / name)})))
        rows = [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        weights.append([(row["loss"], row["grad_norm"]) for row in rows])
        weights[-1].append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "a" / "eval.json").read_text()) == json.loads(
        (tmp_path / "b" / "eval.json").read_text()
    )
