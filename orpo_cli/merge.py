"""`orpo merge`: adapters into full weights that stock transformers loads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.errors import InputError
from orpo_cli.evaluate import Scores, score_pairs
from orpo_cli.files import write_directory
from orpo_cli.model.build import Built, TextSide, build_for_scoring, load_text_side, set_stop_tokens
from orpo_cli.model.load import load_config
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.recipe.schema import ModelSection
from orpo_cli.run import find_subject


def merge_into_base(model: PeftModel) -> PreTrainedModel:
    """Fold the adapters into their base, in place, and return it without a trace of them.

    Each layer is widened to float32 for the addition, so that a bfloat16 base is rounded once, at the end.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft warns that what is merged already is not merged twice
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                dtype = weight.dtype
                weight.data = weight.data.float()
                layer.merge(safe_merge=True)
                weight = layer.get_base_layer().weight
                weight.data = weight.data.to(dtype)
        return model.merge_and_unload()


def merge_trained(
    built: Built,
    text: TextSide,
    section: ModelSection,
    adapter: Path,
    directory: Path,
    pairs: Sequence[TokenizedPair],
    max_tokens: int,
) -> dict[str, Any]:
    """Write the merged weights of a model that has just been trained; its adapters are spent by it.

    Rounding a quantised base's weights anew would lose the adapter, so there the full-precision base is loaded and the
    adapter merged onto that. The answer then says onto what, and how far the merged model's log-probs of `pairs` are
    from the trained one's; it is empty for a base that was not quantised.
    """
    assert isinstance(built.model, PeftModel)
    if not (section.load_in_4bit or section.load_in_8bit):
        save_model(merge_into_base(built.model), text, section, directory)
        return {}

    def measured(logprobs: PairLogprobs) -> Scores:
        device = logprobs.model.device
        return score_pairs(logprobs, pairs, nll_tokens="response", max_tokens=max_tokens, device=device)

    trained = measured(built.logprobs)
    # On the CPU: beside the quantised model, the device may have no room for the full one.
    full = build_for_scoring(section, text, torch.device("cpu"), adapter=adapter, quantise=False)
    assert isinstance(full.model, PeftModel)
    merged = merge_into_base(full.model)
    scores = measured(PairLogprobs(merged, full.logprobs.shares_prefix))
    save_model(merged, text, section, directory)
    return {
        "base": section.name_or_path,
        "base_dtype": str(merged.dtype).removeprefix("torch."),
        "pairs": len(pairs),
        "mean_gap_chosen_logps": float(np.abs(scores.chosen_logps - trained.chosen_logps).mean()),
        "mean_gap_rejected_logps": float(np.abs(scores.rejected_logps - trained.rejected_logps).mean()),
    }


def save_model(model: PreTrainedModel, text: TextSide, section: ModelSection, directory: Path) -> None:
    """Write config.json, model*.safetensors, generation_config.json and the tokenizer into `directory`.

    The base's own dropout probabilities, which training may have switched off, are written as they were.
    """
    set_stop_tokens(model, text)
    original = load_config(section)
    for name, value in vars(original).items():
        if isinstance(value, float) and "drop" in name:
            setattr(model.config, name, value)
    model.config.use_cache = True
    model.save_pretrained(directory)
    text.tokenizer.save_pretrained(directory)


def merge_target(target: str, *, output: Path | None, base: str | None, dtype: str) -> Path:
    """`orpo merge`: a run's or any adapter's weights, merged; where they were written.

    Raises InputError kinds for what is no adapter, and for an `output` that holds something.
    """
    if not Path(target).is_dir():
        raise InputError(f"there is no run or adapter {target}", "name a run's directory, or an adapter's")
    subject = find_subject(target, None, data="-")
    if subject.adapter is None:
        raise InputError(f"{target} has no adapter to merge", "a full fine-tune is whole in RUN/merged already")
    changes = {"name_or_path": base, "revision": "main"} if base else {}
    if dtype != "auto":
        changes["dtype"] = dtype
    section = subject.recipe.model.model_copy(update=changes)
    recipe = subject.recipe.model_copy(update={"model": section})
    path = Path(target)
    directory = output or (path / "merged" if (path / "recipe.yaml").exists() else path.with_name("merged"))
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is not empty", "name another --output")
    text = load_text_side(recipe, subject.tokenizer)
    built = build_for_scoring(section, text, torch.device("cpu"), adapter=subject.adapter, quantise=False)
    assert isinstance(built.model, PeftModel)
    merged = merge_into_base(built.model)
    write_directory(directory, lambda unfinished: save_model(merged, text, section, unfinished))
    return directory
