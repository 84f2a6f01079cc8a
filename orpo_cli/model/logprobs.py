"""Backbone and log-probs as one module: a flat batch in, one log-prob a prediction out.

Two ways, the same numbers. `shares_prefix`: the flat row goes through the backbone once with shared-prefix attention.
Otherwise (models whose attention cannot be replaced): chosen and rejected as separate right-padded sequences through
the stock backbone. In both, only rows that predict something go through the head (head.py). What a model is fit for is
found by probe.py.

Shapes: T tokens, P pairs, L padded length, M predictions, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel

from orpo_cli.data.batches import FlatBatch, cut_by_padded_tokens, cut_by_tokens, cut_into_rounds, flat_tokens
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.model import attention
from orpo_cli.model.head import Head, target_logps


class PairLogprobs(nn.Module):
    """The model as ORPO uses it. Called with a FlatBatch, returns log-probs (M,) float32 of its targets.

    `model` is a transformers causal LM (with peft layers in place, if any). `ragged` permits the ragged attention
    kernel where there is one; `full_logits` is for a head that is more than Head computes, and rules out shared
    prefixes. Callers choose train or eval mode.
    """

    def __init__(
        self, model: PreTrainedModel, shares_prefix: bool, *, ragged: bool = True, full_logits: bool = False
    ) -> None:
        super().__init__()
        assert not (shares_prefix and full_logits)
        self.model = model
        self.shares_prefix = shares_prefix
        self.ragged = ragged
        self.full_logits = full_logits
        if shares_prefix:  # for good: gradient checkpointing runs the layers again in backward
            model.set_attn_implementation(attention.NAME)

    def forward(self, batch: FlatBatch) -> Tensor:
        """Log-probs (M,) float32 of `batch.targets`."""
        if self.shares_prefix:
            hidden = self.model.base_model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                layout=attention.Layout(batch.segments, batch.input_ids.device, ragged=self.ragged),
                use_cache=False,
            ).last_hidden_state[0]  # (T, E)
            return self._through_head(hidden.index_select(0, batch.rows), batch.targets)
        input_ids, mask, sequence, position = padded(batch)
        rows = sequence[batch.rows], position[batch.rows]
        if self.full_logits:
            return target_logps(self._padded(self.model, "logits", input_ids, mask)[rows], batch.targets)
        hidden = self._padded(self.model.base_model, "last_hidden_state", input_ids, mask)  # (2P, L, E)
        return self._through_head(hidden[rows], batch.targets)

    def _through_head(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probs (M,) of targets (M,) given hidden states (M, E), which a backbone may leave in float32."""
        dtype = self.model.get_output_embeddings().weight.dtype
        return Head.of(self.model).target_logps(hidden.to(dtype), targets)

    def _padded(self, module: nn.Module, output: str, input_ids: Tensor, mask: Tensor) -> Tensor:
        """An output (2P, L, ...) of the model or its backbone for 2P sequences, with nothing but rounding between them.

        One pass; but beyond the length at which rotary frequencies begin to depend on the longest sequence beside
        them, sequences go by themselves.
        """

        def run(input_ids: Tensor, mask: Tensor) -> Tensor:
            return getattr(module(input_ids=input_ids, attention_mask=mask, use_cache=False), output)

        limit = length_dependent_beyond(self.model.config)
        if limit is None or input_ids.shape[1] <= limit:
            return run(input_ids, mask)
        alone = [
            run(ids[None, :length], seen[None, :length])[0]
            for ids, seen, length in zip(input_ids, mask, mask.sum(1).tolist(), strict=True)
        ]
        return pad_sequence(alone, batch_first=True)

    def tokens(self, *pairs: TokenizedPair) -> int:
        """What the pairs take as one micro-batch, padding counted where there is some."""
        if self.shares_prefix:
            return sum(flat_tokens(pair) for pair in pairs)
        return 2 * len(pairs) * max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs)

    def micro_batches(self, pairs: Sequence[TokenizedPair], max_tokens: int) -> list[list[TokenizedPair]]:
        """Cut pairs into micro-batches of at most `max_tokens` tokens, padding counted where there is some."""
        return cut_by_tokens(pairs, max_tokens) if self.shares_prefix else cut_by_padded_tokens(pairs, max_tokens)

    def rounds(self, pairs: Sequence[TokenizedPair], max_tokens: int, lanes: int) -> list[list[list[TokenizedPair]]]:
        """Cut pairs into micro-batches, and those into rounds of up to `lanes` that have `max_tokens` tokens in all."""
        if lanes == 1:
            return [[part] for part in self.micro_batches(pairs, max_tokens)]
        return cut_into_rounds(pairs, max_tokens, lanes)

    def smaller_budget(self, tried: Sequence[TokenizedPair], others: Sequence[TokenizedPair] = ()) -> int | None:
        """The tokens to go on with where memory ran out with the pairs `tried` at once and `others` are still to come.

        Half of what it took, but no less than the longest pair; None where that is no less than what it took.
        """
        took = self.tokens(*tried)
        smaller = max(took // 2, *(self.tokens(pair) for pair in (*tried, *others)))
        return smaller if smaller < took else None


def length_dependent_beyond(config: PreTrainedConfig) -> int | None:
    """The length beyond which a model's rotary frequencies depend on the longest sequence of a batch, if there is one.

    So it is with LongRoPE (arXiv 2402.13753) and with dynamic NTK scaling.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    flavours = rope.values() if rope and all(isinstance(v, dict) for v in rope.values()) else [rope]
    limits = [
        flavour.get("original_max_position_embeddings") or text.max_position_embeddings
        for flavour in flavours
        if flavour.get("rope_type") in ("longrope", "dynamic")
    ]
    return min(limits, default=None)


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
