"""What a run takes but the weights: all that its recipe names is opened; what is wrong with it is told at once."""

from __future__ import annotations

import torch

from orpo_cli.data.dataset import PairSet, load_pairs
from orpo_cli.data.survey import Tell, tell_nobody
from orpo_cli.generate import check_sample_prompts
from orpo_cli.model.build import TextSide, check_max_length, open_text_and_data, pair_tokenizer
from orpo_cli.model.load import checked_config
from orpo_cli.model.lora import adapter_directory
from orpo_cli.model.outline import check_lora
from orpo_cli.recipe import Recipe
from orpo_cli.recipe.gather import Faults
from orpo_cli.report.trackers import check_trackers
from orpo_cli.train.optimizer import check_optimizer


def load_inputs(
    recipe: Recipe, device: torch.device, tell: Tell = tell_nobody
) -> tuple[TextSide, PairSet, PairSet | None]:
    """All that a run takes but the weights: text side, training pairs, held-out pairs, None if it has none.

    Raises InputError kinds with every fault that can be found before the data is read, or those of the data.
    """
    faults = Faults(recipe)
    with faults.at("train.optimizer"):
        check_optimizer(recipe.train, device)
    with faults.at("output.trackers"):
        check_trackers(recipe.output.trackers)
    with faults.at("lora.adapter"):
        if recipe.lora is not None and recipe.lora.adapter is not None:
            adapter_directory(recipe.lora.adapter)
    with faults.at("model.name_or_path"):
        checked_config(recipe.model)
        with faults.at("data.max_length"):
            check_max_length(recipe.model, recipe.data.max_length)
        with faults.at("lora"):
            check_lora(recipe, device)
    text, sources = open_text_and_data(recipe, faults)
    if text is not None:
        with faults.at("train.sample_prompts"):
            check_sample_prompts(recipe, text)
    faults.raise_any()
    assert text is not None
    with faults.at("data"):
        pairs = load_pairs(recipe.data, pair_tokenizer(recipe, text), recipe.train, tell, sources)
    faults.raise_any()
    return text, *pairs
