"""What a training step needs of its device's memory, for any token budget and number of checkpointed layers.

What is there for the whole run is counted from the model's own tensors. What grows with a micro-batch is counted in a
forward pass over the longest possible pair: all that autograd saves there is noted and let go at once. A layer under
gradient checkpointing keeps its input alone and computes the rest again in the backward pass.

Shapes: T tokens of a flat batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from orpo_cli.data.batches import flat_batch
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.model import attention_cpu
from orpo_cli.model.checkpointing import checkpointable_layers, not_checkpointed
from orpo_cli.model.head import CHUNK_ROWS, CPU_TILE, GPU_TILE, Head
from orpo_cli.model.lanes import most_lanes
from orpo_cli.model.logprobs import PairLogprobs

# Tokens of a side of the pairs that are tried; what longer ones keep follows from these two.
_TRIED_LENGTHS = (512, 1024)


@dataclass(frozen=True)
class Memory:
    """Bytes of a step on one device, by part."""

    weights: int
    """As they were loaded, whatever the precision; an adapter's are counted apart."""
    adapters: int = 0
    """Weights that are trained beside a frozen base."""
    masters: int = 0
    """Float32 copies of trained weights that compute in half precision."""
    gradients: int = 0
    """In float32; those of each lane, and their sum."""
    optimizer: int = 0
    """Its moments."""
    activations: int = 0
    """Kept from the forward pass for the backward pass."""
    backward: int = 0
    """What a layer needs for a moment in the backward pass."""
    logprobs: int = 0
    """What the head needs for a moment."""

    @property
    def total(self) -> int:
        """The highest sum; head and layers are not computed at the same time."""
        return sum(asdict(self).values()) - min(self.backward, self.logprobs)


@dataclass(frozen=True)
class Activations:
    """Bytes that a token leaves for the backward pass."""

    layers: tuple[float, ...]
    """In each layer that can be checkpointed."""
    layer_input: float
    """All that such a layer keeps when it is."""
    outside: float
    """Before, between and behind them."""
    widest: float
    """In the layer that keeps the most."""

    def with_each(self, combine: Callable[[float, float], float], other: Activations) -> Activations:
        """Each figure combined with the other's."""
        return Activations(
            tuple(map(combine, self.layers, other.layers)),
            combine(self.layer_input, other.layer_input),
            combine(self.outside, other.outside),
            combine(self.widest, other.widest),
        )

    def of_token(self, checkpointed: int) -> float:
        """With the first `checkpointed` layers under gradient checkpointing."""
        return self.outside + checkpointed * self.layer_input + sum(self.layers[checkpointed:])


@dataclass(frozen=True)
class Needs:
    """What a model needs, for any token budget and number of checkpointed layers."""

    fixed: Memory
    """Whatever does not depend on the budget."""
    activations: Activations
    head: int
    """Bytes that the head takes for a moment, however many rows go through it."""
    head_row: int
    """Bytes that each of these takes besides."""
    longest_pair: int = 0
    """Tokens of the longest pair, where it is known."""
    most_lanes: int = 1
    """How many lanes training may use (lanes.py)."""

    @classmethod
    def of(cls, logprobs: PairLogprobs, max_length: int, optimizer: str | None, *, longest_pair: int = 0) -> Needs:
        """Those of a model with pairs of `max_length` tokens a side; without an optimizer nothing of it is trained."""
        activations = measure_activations(logprobs, max_length)
        lanes = 1 if optimizer is None else most_lanes(logprobs)
        fixed, head = fixed_memory(logprobs.model, optimizer), _head_memory(logprobs)
        return cls(fixed, activations, *head, longest_pair, lanes)

    @property
    def layers(self) -> int:
        """Layers that can be checkpointed."""
        return len(self.activations.layers)

    def training(self, tokens: int, checkpointed: int, lanes: int = 1) -> Memory:
        """A training step with so many tokens at once, in lanes, its first `checkpointed` layers computed twice."""
        # Gradients appear while activations go: beside all of these there are about half a layer's. Of a checkpointed
        # layer, the activations come back; but those of one that is not are gone by then.
        layers = 1.25 if self.layers and checkpointed == self.layers else 0.5
        return self._with(
            tokens,
            lanes,
            gradients=self.fixed.gradients * (1 if lanes == 1 else 1 + lanes),
            activations=math.ceil(tokens * self.activations.of_token(checkpointed)),
            backward=lanes * self.fixed.backward + math.ceil(layers * tokens * self.activations.widest),
        )

    def scoring(self, tokens: int) -> Memory:
        """A pass without gradients: a layer's own activations, one after the other."""
        return self._with(tokens, 1, backward=self.fixed.backward + math.ceil(tokens * self.activations.widest))

    def _with(self, tokens: int, lanes: int, **parts: int) -> Memory:
        return replace(self.fixed, logprobs=lanes * self.head + tokens * self.head_row, **parts)


# ---- what is there for the whole run ----


def fixed_memory(model: PreTrainedModel, optimizer: str | None) -> Memory:
    """Weights, what belongs to those that are trained, and what single weights need on their way."""
    trained = [p for p in model.parameters() if p.requires_grad] if optimizer is not None else []
    tensors = [*model.parameters(), *model.buffers(), *_of_quantisation(model)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    own = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in trained}
    beside = sum(own.values()) if any(not p.requires_grad for p in model.parameters()) else 0
    in_half = [p.numel() for p in trained if p.dtype != torch.float32]
    return Memory(
        weights=sum(storages.values()) - beside,
        adapters=beside,
        masters=4 * sum(in_half),
        gradients=4 * sum(p.numel() for p in trained),
        optimizer=sum(_moments(p.numel(), optimizer) for p in trained) if optimizer is not None else 0,
        backward=max((_unpacked_bytes(module) for module in model.modules()), default=0),
    )


def _head_memory(logprobs: PairLogprobs) -> tuple[int, int]:
    """Bytes that the head takes for a moment: by itself, and for each row (head.py)."""
    module = logprobs.model.get_output_embeddings()
    (words, width), size = module.weight.shape, module.weight.element_size()
    computed_again = 2 * size + 12  # of a logit: itself and its gradient, in the head's dtype and in float32
    if logprobs.full_logits:
        return 0, words * computed_again
    if isinstance(module, nn.Linear) or isinstance(getattr(module, "token_adapter", module), TrainableTokensLayer):
        rows, run = CPU_TILE if module.weight.device.type == "cpu" else GPU_TILE
        of_logit = (size + 4 if size < 4 else 4) + (4 if Head.of(logprobs.model).cap is not None else 0)
        itself = rows * min(run, words) * of_logit
    else:
        itself = CHUNK_ROWS * words * computed_again
    # A trained head's gradient is made before any activation is gone.
    return itself + (words * width * size if module.weight.requires_grad else 0), 8 * width


def _moments(numbers: int, optimizer: str) -> int:
    """Bytes of Adam's two moments of a weight on the device."""
    if optimizer.startswith("paged"):  # they give way to whatever else needs room
        return 0
    if optimizer == "adamw_8bit" and numbers >= 4096:  # bitsandbytes leaves small ones in float32
        return 2 * numbers + 8 * math.ceil(numbers / 256)
    return 8 * numbers


def _of_quantisation(model: nn.Module) -> Iterator[Tensor]:
    """The scales that belong to bitsandbytes' quantised weights."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))
            state = state.state2
        if isinstance(scales := getattr(parameter, "SCB", None), Tensor):
            yield scales


def _unpacked_bytes(module: Any) -> int:
    """Bytes of a quantised layer's weight as it is multiplied, in half precision."""
    if type(module).__name__ not in ("Linear4bit", "Linear8bitLt"):
        return 0
    base = getattr(module, "base_layer", module)  # peft's own have the same name
    return 2 * base.in_features * base.out_features


# ---- what grows with the micro-batch ----


def measure_activations(logprobs: PairLogprobs, max_length: int) -> Activations:
    """What the forward pass keeps of a token, in the pairs of up to `max_length` tokens a side that keep the most.

    Very long ones are not tried. An attention that keeps its probabilities keeps the more of a token, the longer its
    sequence; all else is the same for every token: both are a straight line over the length.
    """
    on_cpu = logprobs.model.device.type == "cpu"
    if max_length <= _TRIED_LENGTHS[1]:
        kept = _kept_of_a_pair(logprobs, max_length)
        one_block = attention_cpu.PAIR // 2
        # A pair that is one block keeps more of a token than somewhat longer ones, which are cut into several.
        if on_cpu and one_block < max_length < 2 * attention_cpu.PAIR:
            kept = kept.with_each(max, _kept_of_a_pair(logprobs, one_block))
        return kept
    short, long = (_kept_of_a_pair(logprobs, length) for length in _TRIED_LENGTHS)
    # On a CPU, even longer sequences take a kernel that keeps no probabilities.
    longest = min(max_length, attention_cpu.LONGEST) if on_cpu else max_length
    reach = (longest - _TRIED_LENGTHS[0]) / (_TRIED_LENGTHS[1] - _TRIED_LENGTHS[0])
    return short.with_each(lambda short, long: short + reach * (long - short), long)


def _kept_of_a_pair(logprobs: PairLogprobs, length: int) -> Activations:
    model = logprobs.model
    layers = checkpointable_layers(model)
    batch = flat_batch([made_up_pair(length, model.config.get_text_config().vocab_size)], "all").to(model.device)
    # What is there anyway, then whatever has been counted. The references keep no memory, but keep a later storage from
    # being taken for an earlier one.
    tensors = [*model.parameters(), *model.buffers(), *_of_quantisation(model)]
    known = {t.untyped_storage()._cdata: StorageWeakRef(t.untyped_storage()) for t in tensors}
    kept = dict.fromkeys([None, *layers], 0)
    inside: list[nn.Module | None] = [None]
    inputs = 0

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known[storage._cdata] = StorageWeakRef(storage)
            kept[inside[-1]] += storage.nbytes()

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal inputs
        inside.append(layer)
        hidden = next(x for x in [*args, *kwargs.values()] if isinstance(x, Tensor))
        inputs = hidden.untyped_storage().nbytes()

    def leave(layer: nn.Module, args: Any, output: Any) -> None:
        inside.pop()

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        if not any(p.requires_grad for p in model.parameters()):  # a frozen model keeps as much as one that is trained
            stack.callback(model.get_input_embeddings().register_forward_hook(_wants_gradient).remove)
        stack.enter_context(not_checkpointed(layers))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(note, _unreachable))
        logprobs(batch)
    tokens = batch.tokens
    of_layers = tuple(kept[layer] / tokens for layer in layers)
    outside = kept[None] / tokens
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    return Activations(of_layers, inputs / tokens, outside, max(of_layers, default=outside / depth))


def made_up_pair(length: int, vocabulary: int) -> TokenizedPair:
    """A pair of fixed pseudo-random tokens whose sides have `length` each and share the first."""
    ids = np.arange(2 * length, dtype=np.int64) * 7919 % (vocabulary - 1) + 1
    sides = ids[:length], np.concatenate([ids[:1], ids[length + 1 :]])
    return TokenizedPair(0, *sides, 1, 1, np.ones(length, dtype=bool))


def _wants_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


def _unreachable(packed: None) -> Tensor:
    raise AssertionError("there is no backward pass")
