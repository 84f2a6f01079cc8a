"""A recipe's model without its weights: shapes and dtypes alone, for all that can be told of its memory beforehand.

It is built from the base's configuration on torch's meta device and then pretends to lie on the real one, so that
whatever looks at the device decides as it would there. Only what takes numbers to find out is taken for granted: that
the faster ways of computing log-probs are right (probe.py), and that the base has trained rows for all of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from orpo_cli.errors import OrpoError
from orpo_cli.model.build import Built, TextSide, rows_to_train
from orpo_cli.model.fused_lora import fuse_lora
from orpo_cli.model.fused_mlp import fuse_mlps
from orpo_cli.model.fused_norm import fuse_norms
from orpo_cli.model.load import checked_config, compute_dtype
from orpo_cli.model.lora import add_lora, names_modules
from orpo_cli.model.memory import Memory
from orpo_cli.model.probe import Fitness, why_not_flat
from orpo_cli.model.vocabulary import FreshRows
from orpo_cli.recipe import Recipe
from orpo_cli.recipe.schema import ModelSection


@contextmanager
def outline(recipe: Recipe, text: TextSide, device: torch.device) -> Iterator[Built]:
    """As build_for_training, with tensors that hold nothing; to be used within the context. Not quantised: see packed.

    Raises ModelError as build_for_training does.
    """
    section = recipe.model
    base = _without_weights(section, device)
    with torch.device("meta"):
        rows = base.get_input_embeddings().weight.shape[0]
        if len(text.tokenizer) > rows:
            base.resize_token_embeddings(len(text.tokenizer), mean_resizing=False)
        fresh = FreshRows([*range(rows, len(text.tokenizer))], [i for i in text.added_ids if i < rows])
        model: PreTrainedModel | PeftModel = base
        trained = sorted(fresh.untrained + fresh.added)
        if recipe.lora is not None:
            trained = rows_to_train(recipe.lora, text, fresh)
            with catch_warnings():  # the numbers of lora.adapter have no place to go to here
                filterwarnings("ignore", message=".*copying from a non-meta parameter")
                model = add_lora(base, recipe.lora, trained)
    fuse_norms(base)
    if not section.load_in_8bit:  # over 8-bit layers, LoRA's run through peft
        fuse_lora(base)
    fuse_mlps(base)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _pretend(model, device)
        unwanted = section.shared_prefix is False or section.attn_implementation != "auto"
        not_shared = "the recipe says so" if unwanted else why_not_flat(base)
        fitness = Fitness(not_shared, None, None)
        yield Built(model, fitness.logprobs(base), trained, fitness)


def check_lora(recipe: Recipe, device: torch.device) -> None:
    """Raise ModelError for an adapter that the model has no place for, before any data is read or weights loaded."""
    if recipe.lora is None or not names_modules(recipe.lora):
        return
    try:
        base = _without_weights(recipe.model, device)
        with torch.device("meta"):
            add_lora(base, recipe.lora, [])
    except OrpoError:
        raise
    except Exception:  # a model's own code may need numbers: what is wrong then, building it with its weights tells
        return


def _without_weights(section: ModelSection, device: torch.device) -> PreTrainedModel:
    """The base on the meta device, in the dtype that it would compute in on another one."""
    config = checked_config(section)
    arguments = {} if section.attn_implementation == "auto" else {"attn_implementation": section.attn_implementation}
    with torch.device("meta"):
        base: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=compute_dtype(section, config, device),
            trust_remote_code=section.trust_remote_code,
            **arguments,
        )
    return base.train()


def _pretend(model: nn.Module, device: torch.device) -> None:
    """Replace each of a module's tensors by one that claims to lie on a device; what was shared stays shared."""
    made: dict[int, Tensor] = {}

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in own:
            tensors.update({name: twin(tensor) for name, tensor in tensors.items() if tensor is not None})


def packed(memory: Memory, model: PreTrainedModel, section: ModelSection) -> Memory:
    """The memory of the model if its linear layers were quantised as the recipe says, all but the output embeddings.

    4 bits: half a byte a weight, a byte for each 64 of them as their scale, and for 256 such scales one of their own
    (arXiv 2305.14314). 8 bits: a byte a weight and a float32 scale an output (arXiv 2208.07339).
    """
    if not (section.load_in_4bit or section.load_in_8bit):
        return memory
    outputs = model.get_output_embeddings()
    saved = unpacked = 0
    for name, layer in model.named_modules():
        if type(layer) is not nn.Linear or layer is outputs or "lora_" in name:
            continue
        numbers, tables = layer.weight.numel(), 4 * (16 + 256 + 1)
        scales = -(-numbers // 64)
        in_4bit = -(-numbers // 2) + scales + 4 * -(-scales // 256) + tables
        saved += layer.weight.nbytes - (in_4bit if section.load_in_4bit else numbers + 4 * layer.out_features)
        unpacked = max(unpacked, 2 * numbers)
    return replace(memory, weights=memory.weights - saved, backward=memory.backward + unpacked)
