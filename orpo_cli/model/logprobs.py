"""Backbone and log-probs as one module: a flat batch in, one log-prob a prediction out.

Two ways, the same numbers. `shares_prefix`: the flat row goes through the backbone once with shared-prefix attention,
and only rows that predict something go through the head (head.py). Otherwise (models whose attention cannot be
replaced): chosen and rejected as separate right-padded sequences through the stock forward. `why_not_shared` decides
between them by trying both on a probe.

Shapes: T tokens, P pairs, L padded length, M predictions, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orpo_cli.data.batches import FlatBatch, cut_by_padded_tokens, cut_by_tokens, flat_batch
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.model import attention
from orpo_cli.model.head import Head, target_logps


class PairLogprobs(nn.Module):
    """The model as ORPO uses it. Called with a FlatBatch, returns log-probs (M,) float32 of its targets.

    `model` is a transformers causal LM (with peft layers in place, if any). Callers choose train or eval mode.
    """

    def __init__(self, model: PreTrainedModel, shares_prefix: bool) -> None:
        super().__init__()
        self.model = model
        self.shares_prefix = shares_prefix
        if shares_prefix:  # for good: gradient checkpointing runs the layers again in backward
            model.set_attn_implementation(attention.NAME)

    def forward(self, batch: FlatBatch) -> Tensor:
        """Log-probs (M,) float32 of `batch.targets`."""
        if self.shares_prefix:
            hidden = self.model.base_model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                segments=batch.segments,
                use_cache=False,
            ).last_hidden_state[0]  # (T, E)
            return Head.of(self.model).target_logps(hidden.index_select(0, batch.rows), batch.targets)
        input_ids, attention_mask, sequence, position = padded(batch)
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (2P, L, V)
        return target_logps(logits[sequence[batch.rows], position[batch.rows]], batch.targets)

    def micro_batches(self, pairs: Sequence[TokenizedPair], max_tokens: int) -> list[list[TokenizedPair]]:
        """Cut pairs into micro-batches of at most `max_tokens` tokens, padding counted where there is some."""
        return cut_by_tokens(pairs, max_tokens) if self.shares_prefix else cut_by_padded_tokens(pairs, max_tokens)


def padded(batch: FlatBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The batch as 2P right-padded sequences: pair p's chosen is row 2p, its rejected row 2p + 1.

    Returns input_ids (2P, L), attention_mask (2P, L), and for each token of the flat row the sequence (T,) and the
    position (T,) where it stands there; a shared token stands in the chosen sequence.
    """
    device = batch.input_ids.device
    longest = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in batch.pairs)
    input_ids = torch.zeros(2 * len(batch.pairs), longest, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    sequence = []
    for p, (pair, segment) in enumerate(zip(batch.pairs, batch.segments, strict=True)):
        for row, ids in ((2 * p, pair.chosen_ids), (2 * p + 1, pair.rejected_ids)):
            input_ids[row, : len(ids)] = torch.from_numpy(np.asarray(ids, np.int64))
            mask[row, : len(ids)] = 1
        sequence.append(torch.full((segment.shared + segment.chosen,), 2 * p))
        sequence.append(torch.full((segment.rejected,), 2 * p + 1))
    return input_ids.to(device), mask.to(device), torch.cat(sequence).to(device), batch.position_ids


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Why the model cannot run flat batches with shared prefixes, in words for the log; None when it can.

    Some things no probe of a few tokens would show are read off the configuration; all else is tried: every layer must
    call our attention, with the window its configuration promises, and two pairs in one flat row must give the
    log-probs of the padded stock forward.
    """
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention", "attention"}:
        return f"it has {', '.join(sorted(unknown))} layers"
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "its attention logits are soft-capped"
    rope = getattr(text, "rope_parameters", None) or {}
    flavours = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    if any(flavour.get("rope_type") in ("longrope", "dynamic") for flavour in flavours):
        return "its rotary frequencies depend on the longest sequence of a batch"

    windows: list[int | None] = []

    def counted(module: nn.Module, *args, **kwargs):  # type: ignore[no-untyped-def]
        windows.append(kwargs.get("sliding_window"))
        return attention.shared_prefix_attention(module, *args, **kwargs)

    probe = _probe(text.vocab_size).to(model.get_input_embeddings().weight.device)
    stock_attention = model.config._attn_implementation
    with inference(model), torch.no_grad():
        expected = PairLogprobs(model, shares_prefix=False)(probe)
        try:
            attention.AttentionInterface.register(attention.NAME, counted)
            got = PairLogprobs(model, shares_prefix=True)(probe)
        except Exception as error:  # an unknown architecture may fail in any way; the stock forward is always right
            return f"its forward pass does not take a flat row ({type(error).__name__})"
        finally:
            model.set_attn_implementation(stock_attention)
            attention.AttentionInterface.register(attention.NAME, attention.shared_prefix_attention)
    if len(windows) != text.num_hidden_layers:
        return f"{len(windows)} of its {text.num_hidden_layers} layers take another attention function"
    promised = (getattr(text, "layer_types", None) or []).count("sliding_attention")
    if promised > sum(window is not None for window in windows):
        return "its sliding windows are applied outside its attention function"
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1  # the latter for the rounding of half precision
    if not torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
        return f"its log-probs differ by {(got - expected).abs().max().item():.2g} from the stock forward's"
    return None


def _probe(vocabulary: int) -> FlatBatch:
    """Two pairs of fixed pseudo-random tokens, their prompts long enough that hiding one would show."""
    ids = np.arange(1, 64, dtype=np.int64) * 7919 % (vocabulary - 1) + 1
    return flat_batch(
        [
            TokenizedPair(0, ids[:20], np.concatenate([ids[:12], ids[40:46]]), 12, 12, None),
            TokenizedPair(1, ids[20:33], np.concatenate([ids[20:28], ids[50:60]]), 8, 8, None),
        ],
        "response",
    )


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while: dropout off.

    4-bit layers stay in train mode, where they compute the same: on a CPU with AVX512-BF16, bitsandbytes repacks their
    weights in place at the first forward in evaluation mode, and training afterwards has wrong gradients.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    for module in training:
        if type(module).__name__ == "Linear4bit":
            module.training = True
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model with a stock attention function for a while, for generation and its cache."""
    before = model.config._attn_implementation
    if before == attention.NAME:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
