"""Which way a model's log-probs are computed, found by trying it on a few tokens.

The faster ways of logprobs.py are right for most architectures, and no list of those would last. So each way is tried
beside the stock model, in the dtype and on the device at hand; what a few tokens would not show is read off the
configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orpo_cli.data.batches import FlatBatch, flat_batch
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.model import attention, attention_ragged
from orpo_cli.model.attention import CannotShareError, Layout, shared_prefix_attention
from orpo_cli.model.head import Head
from orpo_cli.model.logprobs import PairLogprobs, inference, length_dependent_beyond, padded


@dataclass(frozen=True)
class Fitness:
    """Why a model is not computed in the faster ways, each None where it is."""

    not_shared: str | None
    """Why a pair's answers do not share their prompt."""
    not_ragged: str | None
    """Why the ragged attention kernel is not used, where there is one."""
    full_logits: str | None
    """Why the logits of all tokens are computed."""

    @classmethod
    def of(cls, model: PreTrainedModel, *, not_shared: str | None = None) -> Fitness:
        """Try the model; `not_shared` is a reason not to share prompts that is known beforehand."""
        full = why_full_logits(model)
        not_shared = not_shared or full
        ragged = None if not_shared else why_not_ragged(model)
        return cls(not_shared or why_not_shared(model, ragged=ragged is None), ragged, full)

    def logprobs(self, model: PreTrainedModel) -> PairLogprobs:
        """The model, to be computed in the fastest way that is right."""
        return PairLogprobs(
            model, self.not_shared is None, ragged=self.not_ragged is None, full_logits=self.full_logits is not None
        )

    @property
    def remark(self) -> str | None:
        """What is slower than it might be, and why: a line for the log."""
        if self.full_logits:
            return f"the logits of all tokens are computed: {self.full_logits}"
        if self.not_shared:
            return f"prompts are not shared between a pair's answers: {self.not_shared}"
        if self.not_ragged:
            return f"attention goes branch by branch, without torch's ragged kernel: {self.not_ragged}"
        return None


def why_full_logits(model: PreTrainedModel) -> str | None:
    """Why log-probs must come from the model's own logits: its head is more than Head computes. None if it is not."""
    input_ids, mask, _, _ = padded(probe_batch(model))
    with inference(model), torch.no_grad():
        stock = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[mask.bool()].float()
        try:
            hidden = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
            hidden = hidden[mask.bool()].to(model.get_output_embeddings().weight.dtype)
            logits = Head.of(model).logits(hidden)
            apart = ((logits - stock).norm() / stock.norm()).item()
        except Exception as error:  # an unknown architecture may fail in any way; its own logits are always right
            return f"its head cannot be computed apart from its backbone ({type(error).__name__})"
    if not apart <= (1e-4 if model.dtype == torch.float32 else 0.02):
        return "its head does more than multiply hidden states by its weights"
    return None


def why_not_ragged(model: PreTrainedModel) -> str | None:
    """Why the ragged attention kernel must not be used: in some layer it is not what attention by branches is.

    None as well where no layer would use it.
    """
    if not attention_ragged.is_offered(model.get_input_embeddings().weight.device):
        return None
    faults: list[str] = []

    def compared(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        by_branches = {**kwargs, "layout": Layout(kwargs["layout"].segments, query.device, ragged=False)}
        if kwargs["layout"].ragged is not None and (fault := _fault(module, query, key, value, kwargs, by_branches)):
            faults.append(fault)
        return shared_prefix_attention(module, query, key, value, mask, **by_branches)

    with inference(model), torch.no_grad(), _registered(model, compared):
        try:
            PairLogprobs(model, shares_prefix=True)(probe_batch(model))
        except Exception:  # then prefixes are not shared at all, and why_not_shared says why
            return None
    return faults[0] if faults else None


def _fault(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, ragged: dict[str, Any], by_branches: dict[str, Any]
) -> str | None:
    """How the two ways of attention differ for a layer's inputs, in values or gradients; None if in rounding only."""
    shape = query.transpose(1, 2).shape
    upstream = torch.linspace(-1, 1, query.numel(), dtype=query.dtype, device=query.device).view(shape)

    def attended(keywords: dict[str, Any]) -> list[Tensor]:
        if keywords.get("sliding_window") is not None:
            keywords = {**keywords, "sliding_window": 3}  # short enough to show in a few tokens
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            output, _ = shared_prefix_attention(module, inputs[0], inputs[1], inputs[2], None, **keywords)
            return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]

    expected = attended(by_branches)
    try:
        got = attended(ragged)
    except Exception as error:  # a kernel may refuse in any way
        return f"it fails with {type(error).__name__}"
    floor = 0.01 * max(other.float().norm() for other in expected)  # of a gradient that is zero but for rounding
    for name, one, other in zip(("output", "queries", "keys", "values"), got, expected, strict=True):
        apart = ((one - other).float().norm() / other.float().norm().clamp(min=floor)).item()
        if not apart <= 0.1:
            return f"its {name if name == 'output' else f'gradient for the {name}'} is off by {apart:.0%}"
    return None


def why_not_shared(model: PreTrainedModel, *, ragged: bool = True) -> str | None:
    """Why the model cannot run flat batches with shared prefixes; None if it can. `ragged` permits that kernel.

    Every layer must call our attention, with the window that its configuration promises, and two pairs in one flat row
    must give the log-probs of the padded stock forward, but for a few times what those vary by themselves. Where a
    layer chooses, as among experts, rounding may make it choose anew: so one probe in a few is enough.
    """
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    if (fault := _why_not_by_configuration(model)) is not None:
        return fault
    # A model without layer types has one window for all layers, or none.
    one_for_all = not kinds and getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    promised = text.num_hidden_layers if one_for_all else kinds.count("sliding_attention")
    floor = 1e-4 if model.dtype == torch.float32 else 3e-3

    apart = own = float("nan")
    for seed in range(3):
        batch = probe_batch(model, seed)
        windows: list[int | None] = []
        with inference(model), torch.no_grad():
            try:
                got = _shared(model, batch, ragged, windows)
            except CannotShareError as error:
                return str(error)
            except Exception as error:  # an unknown architecture may fail in any way; the stock forward is always right
                return f"its forward pass does not take a flat row ({type(error).__name__})"
            if len(windows) != text.num_hidden_layers:
                called = f"{len(windows)} of its {text.num_hidden_layers} layers"
                return f"{called} attend through transformers' attention interface"
            if promised > sum(window is not None for window in windows):
                return "its sliding windows are applied outside its attention function"
            expected, own = _stock(model, batch)
        apart = (got - expected).abs().mean().item()
        if apart <= floor + 3 * own:
            return None
    return f"its log-probs differ by {apart:.2g} from the stock forward's, which vary by {own:.2g} by themselves"


def why_not_flat(model: PreTrainedModel) -> str | None:
    """Of why_not_shared what can be told of a model without weights: by its configuration, and whether it runs."""
    if (fault := _why_not_by_configuration(model)) is not None:
        return fault
    windows: list[int | None] = []
    with inference(model), torch.no_grad():
        try:
            _shared(model, probe_batch(model), False, windows)
        except Exception as error:  # as in why_not_shared
            return f"its forward pass does not take a flat row ({type(error).__name__})"
    layers = model.config.get_text_config().num_hidden_layers
    return None if len(windows) == layers else f"{len(windows)} of its {layers} layers attend through transformers"


def _why_not_by_configuration(model: PreTrainedModel) -> str | None:
    """Layers that cannot share prefixes, or frequencies that depend on what is computed beside."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    if unknown := set(kinds) - {"full_attention", "sliding_attention", "attention"}:
        return f"it has {', '.join(sorted(unknown))} layers"
    if length_dependent_beyond(model.config) is not None:
        return "its rotary frequencies depend on the longest sequence of a batch"
    return None


def _shared(model: PreTrainedModel, batch: FlatBatch, ragged: bool, windows: list[int | None]) -> Tensor:
    """Log-probs (M,) by the flat row; appends the window of each call of the attention function."""

    def counted(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        windows.append(kwargs.get("sliding_window"))
        return shared_prefix_attention(module, *args, **kwargs)

    with _registered(model, counted):
        return PairLogprobs(model, shares_prefix=True, ragged=ragged)(batch)


def _stock(model: PreTrainedModel, batch: FlatBatch) -> tuple[Tensor, float]:
    """Log-probs (M,) by the stock forward, and how far they vary, in the mean, between equal ways of computing them.

    Those are another attention function, for rounding, and each pair by itself, since 8-bit products depend on what is
    computed beside them.
    """
    stock = PairLogprobs(model, shares_prefix=False, full_logits=True)
    expected = stock(batch)
    others = [torch.cat([stock(flat_batch([pair], "response").to(batch.rows.device)) for pair in batch.pairs])]
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("sdpa" if before == "eager" else "eager")
        others.append(stock(batch))
    except Exception:  # some architectures forbid the one or the other
        pass
    finally:
        model.set_attn_implementation(before)
    return expected, max((other - expected).abs().mean().item() for other in others)


@contextmanager
def _registered(model: PreTrainedModel, function: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Another function in the place of shared_prefix_attention for a while; the model's own is put back."""
    before = model.config._attn_implementation
    attention.AttentionInterface.register(attention.NAME, function)
    try:
        yield
    finally:
        attention.AttentionInterface.register(attention.NAME, attention.shared_prefix_attention)
        model.set_attn_implementation(before)


def probe_batch(model: PreTrainedModel, seed: int = 0) -> FlatBatch:
    """Two pairs of fixed random tokens, their prompts long enough that hiding one shows, within the model's context."""
    embeddings = model.get_input_embeddings().weight
    ids = np.random.default_rng(seed).integers(1, len(embeddings), 64)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 20
    longest = min(context, 20)

    def pair(index: int, ids: np.ndarray, prompt: float, chosen: float, rejected: float) -> TokenizedPair:
        """Lengths of the prompt and of the answers as shares of the longest sequence."""
        p, c, r = (max(1, int(share * longest)) for share in (prompt, chosen, rejected))
        return TokenizedPair(index, ids[: p + c], np.concatenate([ids[:p], ids[-r:]]), p, p, None)

    pairs = [pair(0, ids[:32], 0.6, 0.4, 0.3), pair(1, ids[32:], 0.4, 0.25, 0.5)]
    return flat_batch(pairs, "response").to(embeddings.device)
