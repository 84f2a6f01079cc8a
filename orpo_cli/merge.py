"""`orpo merge`: adapters into full weights that stock transformers loads."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from orpo_cli.data.dataset import load_held_out, load_pairs
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.errors import DataError, InputError
from orpo_cli.files import require_space, to_json, write_directory, write_file
from orpo_cli.model.build import (
    Built,
    TextSide,
    build_for_scoring,
    load_text_side,
    pair_tokenizer,
    set_stop_tokens,
)
from orpo_cli.model.load import load_config
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.recipe import ModelSection, Recipe
from orpo_cli.run_directory import LOCK, RunDirectory, held, read_manifest
from orpo_cli.scores import Scores, score_pairs
from orpo_cli.subject import Subject, find_subject, require_there

# Pairs on which the weights merged from a quantised run are compared with what was trained, on the CPU.
MEASURED_PAIRS = 4


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
    token_budget: int,
) -> dict[str, Any]:
    """Write the merged weights of a model in the state it was trained in; its adapters are spent by it.

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
        return score_pairs(logprobs, pairs, nll_tokens="response", max_tokens=token_budget, device=device)

    trained = measured(built.logprobs) if pairs else None
    # On the CPU: beside the quantised model, the device may have no room for the full one.
    full = build_for_scoring(section, text, torch.device("cpu"), adapter=adapter, quantise=False)
    assert isinstance(full.model, PeftModel)
    merged = merge_into_base(full.model)
    gap: dict[str, Any] = {
        "base": section.name_or_path,
        "base_dtype": str(merged.dtype).removeprefix("torch."),
        "pairs": len(pairs),
    }
    if trained is not None:
        scores = measured(full.fitness.logprobs(merged))
        gap["mean_gap_chosen_logps"] = float(np.abs(scores.chosen_logps - trained.chosen_logps).mean())
        gap["mean_gap_rejected_logps"] = float(np.abs(scores.rejected_logps - trained.rejected_logps).mean())
    save_model(merged, text, section, directory)
    return gap


def merged_bytes(model: PreTrainedModel) -> int:
    """What the weights of a model take on disk, its adapters merged and in its compute dtype."""
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    return (model.num_parameters() - adapters) * model.dtype.itemsize  # a 4-bit weight counts as what it stands for


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
    subject = find_subject(target, None, None, scores=False)
    if subject.adapter is None:
        merged = RunDirectory(Path(target)).merged
        where = merged if merged.is_dir() else target
        raise InputError(f"{target} has no adapter to merge", f"its weights are whole already, in {where}")
    if base:
        require_there(base, "--base")
    changes = {"name_or_path": base, "revision": "main"} if base else {}
    if dtype != "auto":
        changes["dtype"] = dtype
    section = subject.recipe.model.model_copy(update=changes)
    recipe = subject.recipe.model_copy(update={"model": section})
    path = Path(target)
    directory = output or (path / "merged" if (path / "recipe.yaml").exists() else path.with_name("merged"))
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is not empty", "name another --output")
    with held(lock_of(directory), directory):
        merge_into(directory, recipe, subject)
    return directory


def lock_of(directory: Path) -> Path:
    """The lock that a merged model's directory is written under: its run's, or one of its own beside it."""
    run = RunDirectory(directory.parent)
    return (
        run.path / LOCK
        if run.recipe.is_file() and directory == run.merged
        else directory.with_name(f".{directory.name}.lock")
    )


def merge_into(directory: Path, recipe: Recipe, subject: Subject) -> None:
    """Merge the adapter of `subject` into its base, as the recipe says, and write the whole to `directory`."""
    section, adapter = recipe.model, subject.adapter
    assert adapter is not None
    text = load_text_side(recipe, subject.tokenizer)
    quantised = section.load_in_4bit or section.load_in_8bit
    device = PartialState().device if quantised else torch.device("cpu")
    built = build_for_scoring(section, text, device, adapter=adapter)
    require_space(directory, merged_bytes(built.base), "the merged model")
    pairs = some_pairs(recipe, text) if quantised else []
    gaps: list[dict[str, Any]] = []
    write_directory(
        directory,
        lambda unfinished: gaps.append(
            merge_trained(built, text, section, adapter, unfinished, pairs, 2 * recipe.data.max_length)
        ),
    )
    run = RunDirectory(directory.parent)
    if gaps[0] and directory == run.merged and run.manifest.exists():
        write_file(run.manifest, to_json({**read_manifest(run), "merge": gaps[0]}))


def some_pairs(recipe: Recipe, text: TextSide) -> list[TokenizedPair]:
    """Pairs to compare merged and trained weights on: held-out ones, else of the training data; none if it is gone."""
    tokenise = pair_tokenizer(recipe, text)
    try:
        if recipe.data.eval is not None:
            return load_held_out(recipe.data, tokenise, recipe.train).in_source_order()[:MEASURED_PAIRS]
        return [load_pairs(recipe.data, tokenise, recipe.train)[0].first()]
    except DataError:
        return []
