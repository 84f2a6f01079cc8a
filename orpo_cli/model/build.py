"""From a recipe to a model that can be trained or scored: tokenizer, template, base, new rows, adapter, engine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from orpo_cli.data.pairs import Sources, open_data
from orpo_cli.data.templates import ChatTemplate, adds_bos, fit_tokenizer, resolve_template, template_file
from orpo_cli.data.tokenize import PairTokenizer
from orpo_cli.errors import ModelError
from orpo_cli.model.fused_lora import fuse_lora
from orpo_cli.model.fused_mlp import fuse_mlps
from orpo_cli.model.fused_norm import fuse_norms
from orpo_cli.model.load import load_config, load_model, load_tokenizer
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.lora import add_lora, load_adapter
from orpo_cli.model.probe import Fitness
from orpo_cli.model.vocabulary import FreshRows, fit_vocabulary
from orpo_cli.recipe import Recipe
from orpo_cli.recipe.gather import Faults
from orpo_cli.recipe.schema import LoraSection, ModelSection


@dataclass(frozen=True)
class TextSide:
    """Everything between a dialogue and token ids, with no weights loaded."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    starts_with_bos: bool
    """Whether BOS is put before a text that no template has written."""
    added_tokens: list[str]
    """Control tokens that the base's tokenizer did not have."""
    brought_template: bool
    """Whether the base's tokenizer has a chat template of its own."""

    @property
    def control_ids(self) -> list[int]:
        """Ids of the tokens that the template writes."""
        return [self.tokenizer.convert_tokens_to_ids(token) for token in self.template.control_tokens]

    @property
    def added_ids(self) -> list[int]:
        """Ids of the tokens that were added to the vocabulary."""
        return [self.tokenizer.convert_tokens_to_ids(token) for token in self.added_tokens]

    @property
    def stop_id(self) -> int:
        """Id of the token that ends a turn."""
        return self.tokenizer.convert_tokens_to_ids(self.template.end_of_turn)

    def fingerprints(self) -> dict[str, str]:
        """Sixteen hexadecimal digits each that change with what the tokenizer, and what the template does to a text."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for left_by_the_last_call in ("truncation", "padding"):
            tokenizer.pop(left_by_the_last_call, None)
        template = [self.template.source, self.template.end_of_turn, self.template.opening, self.starts_with_bos]
        template += [self.template.day] if self.template.day else []
        return {
            name: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
            for name, content in (("tokenizer", tokenizer), ("template", template))
        }


@dataclass(frozen=True)
class Built:
    """A model ready to be trained or scored."""

    model: PreTrainedModel | PeftModel
    logprobs: PairLogprobs
    trained_rows: list[int]
    """Ids of embedding rows that are trained beside the adapters."""
    fitness: Fitness
    """In which way log-probs are computed, and why not in a faster one."""

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, adapters in place if there are any."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model


def open_text_and_data(recipe: Recipe, faults: Faults) -> tuple[TextSide | None, Sources]:
    """Text side, None where it has faults, and data sources, those without faults; what is wrong is noted."""
    text = None
    if recipe.model.chat_template.endswith(".jinja"):
        with faults.at("model.chat_template"):
            template_file(recipe.model.chat_template)
    with faults.at("model.name_or_path"):
        tokenizer = load_tokenizer(recipe.model)
        with faults.at("model.chat_template"):
            text = text_side(recipe, tokenizer)
    return text, open_data(recipe.data, faults)


def load_text_side(recipe: Recipe, saved_with: Path | None = None) -> TextSide:
    """The base's tokenizer, or the one in the directory `saved_with`, taught the recipe's template."""
    section = recipe.model
    source = section if saved_with is None else section.model_copy(update={"name_or_path": str(saved_with)})
    return text_side(recipe, load_tokenizer(source))


def text_side(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> TextSide:
    """A tokenizer taught the recipe's template. Raises ModelError for a template that cannot be used."""
    section = recipe.model
    brought_template = bool(tokenizer.chat_template)
    template = resolve_template(
        section.chat_template,
        tokenizer,
        eos_token=section.eos_token,
        add_bos=recipe.data.add_bos,
        kwargs=dict(section.chat_template_kwargs),
        day=section.chat_template_date,
    )
    add_bos = recipe.data.add_bos
    starts_with_bos = adds_bos(tokenizer) if add_bos == "auto" else add_bos
    return TextSide(tokenizer, template, starts_with_bos, fit_tokenizer(tokenizer, template), brought_template)


def pair_tokenizer(recipe: Recipe, text: TextSide) -> PairTokenizer:
    """The recipe's way from a pair to token ids."""
    data = recipe.data
    return PairTokenizer(
        text.tokenizer,
        text.template,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        overlong=data.overlong,
        min_response_tokens=data.min_response_tokens,
        add_bos=data.add_bos,
        nll_tokens=recipe.loss.nll_tokens,
    )


def context_tokens(section: ModelSection) -> int | None:
    """The model's context; None where its configuration states none."""
    return context_of(load_config(section))


def context_of(config: PreTrainedConfig) -> int | None:
    """The context of a model of this configuration, in tokens; None where it states none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_max_length(section: ModelSection, max_length: int) -> None:
    """Raise ModelError when `data.max_length` is more than the model's context."""
    context = context_tokens(section)
    if context is not None and max_length > context:
        raise ModelError(
            f"data.max_length is {max_length}, and the context of {section.name_or_path} is {context} tokens",
            f"set data.max_length: {context} or less",
        )


def build_for_training(recipe: Recipe, text: TextSide, device: torch.device) -> Built:
    """Base, new token rows, fresh adapters (or everything trainable with `lora: null`).

    What is drawn at random comes from torch's random state.
    """
    base = load_model(recipe.model, device)
    fresh = fit_vocabulary(base, text.tokenizer, text.control_ids, text.added_ids)
    model: PreTrainedModel | PeftModel = base
    rows = sorted(fresh.untrained + fresh.added)
    if recipe.lora is not None:
        rows = rows_to_train(recipe.lora, text, fresh)
        model = add_lora(base, recipe.lora, rows)
    return _with_engine(recipe.model, model, rows)


def build_for_scoring(
    section: ModelSection,
    text: TextSide,
    device: torch.device,
    *,
    adapter: Path | None = None,
    quantise: bool = True,
) -> Built:
    """Base, or base with a saved adapter, exactly as it was trained; nothing of it will be trained."""
    base = load_model(section, device, quantise=quantise)
    fit_vocabulary(base, text.tokenizer, text.control_ids, text.added_ids)
    model = base if adapter is None else load_adapter(base, adapter)
    model.requires_grad_(False)
    return _with_engine(section, model, [])


def _with_engine(section: ModelSection, model: PreTrainedModel | PeftModel, rows: list[int]) -> Built:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    fuse_norms(base)
    fuse_lora(base)
    fuse_mlps(base)
    unwanted = None
    if section.shared_prefix is False:
        unwanted = "model.shared_prefix is false"
    elif section.attn_implementation != "auto":
        unwanted = f"model.attn_implementation is {section.attn_implementation}"
    fitness = Fitness.of(base, not_shared=unwanted)
    if section.shared_prefix is True and fitness.not_shared is not None:
        raise ModelError(
            f"{section.name_or_path} cannot share prefixes: {fitness.not_shared}",
            "set model.shared_prefix: auto, which then does not",
        )
    return Built(model, fitness.logprobs(base), rows, fitness)


def rows_to_train(section: LoraSection, text: TextSide, fresh: FreshRows) -> list[int]:
    """Token ids whose rows are trained beside the adapters, ascending.

    Fresh rows always are: they start at values that are not the base's, and nobody who loads the adapter could know
    them otherwise. `lora.trainable_tokens` may name more. Raises ModelError for a token that the tokenizer has not.
    """
    if section.trainable_tokens == "auto":
        return sorted(fresh.untrained + fresh.added)
    vocabulary = text.tokenizer.get_vocab()
    unknown = [token for token in section.trainable_tokens if token not in vocabulary]
    if unknown:
        raise ModelError(
            f"lora.trainable_tokens: the tokenizer has no token {', '.join(map(repr, unknown))}",
            "name single tokens of the vocabulary, or leave it auto",
        )
    return sorted({*fresh.untrained, *fresh.added, *(vocabulary[token] for token in section.trainable_tokens)})


def stop_ids(model: PreTrainedModel, text: TextSide) -> list[int]:
    """Ids of the tokens that stop generation: the end of a turn first, then those that the base had."""
    generation = model.generation_config or GenerationConfig()
    before = generation.eos_token_id if generation.eos_token_id is not None else model.config.eos_token_id
    others = before if isinstance(before, list) else [] if before is None else [before]
    return list(dict.fromkeys([text.stop_id, *others]))


def set_stop_tokens(model: PreTrainedModel, text: TextSide) -> None:
    """Write EOS, pad and stop ids into the model's configurations, so that stock generation ends a turn by itself.

    Stop ids that the base had stay: another end of text still stops.
    """
    stops, generation = stop_ids(model, text), model.generation_config or GenerationConfig()
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    generation.pad_token_id = text.tokenizer.pad_token_id
    generation.bos_token_id = text.tokenizer.bos_token_id
    model.generation_config = generation
    settings: dict[str, Any] = {"eos_token_id": text.stop_id, "pad_token_id": text.tokenizer.pad_token_id}
    model.config.update(settings)
