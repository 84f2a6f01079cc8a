"""Gradient checkpointing of some layers: they keep their input alone, and are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpointable_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers that transformers can checkpoint one by one, in the order of the model."""
    return [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint_layers(model: PreTrainedModel, count: int) -> None:
    """Have the first `count` layers computed again in the backward pass, the others not.

    The first, since their turn comes last: what the others have kept is gone by then.
    """
    if count:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()  # for reentrant checkpoints; here it would cost gradients that nobody wants
    for i, layer in enumerate(checkpointable_layers(model)):
        layer.gradient_checkpointing = i < count


@contextmanager
def not_checkpointed(layers: Sequence[GradientCheckpointingLayer]) -> Iterator[None]:
    """The layers without gradient checkpointing for a while."""
    before = [layer.gradient_checkpointing for layer in layers]
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.gradient_checkpointing = was
