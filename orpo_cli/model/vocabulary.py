"""The rows of a model's embedding matrices: one for every token of its tokenizer, none of them without meaning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from orpo_cli.errors import ModelError


def embedding_names(model: PreTrainedModel) -> tuple[str, str | None]:
    """Module names of the input embeddings and of the output ones, None where those share the input's weight."""
    names = {module: name for name, module in model.named_modules()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is None or outputs.weight is inputs.weight
    return names[inputs], None if tied else names[outputs]


@dataclass(frozen=True)
class FreshRows:
    """Token ids whose embedding rows hold nothing learnt and start at the mean of the others; both ascending."""

    added: list[int]
    """Rows that the model had not."""
    untrained: list[int]
    """Rows that it had and that were never trained."""


def fit_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, control_ids: list[int], new_ids: list[int]
) -> FreshRows:
    """Give every token of the tokenizer a row, and every control token a row that can be trained from.

    Rows are added where the tokenizer has more tokens than the model. Those start at the mean of the trained rows, and
    so do rows that were never trained: the ones of `new_ids`, which the tokenizer has just been taught and a model with
    rows to spare has room for, and those of `control_ids` that look it, in the input or the output embeddings.

    Raises ModelError when tokenizer and model do not belong together.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    missing = len(tokenizer) - rows
    if missing > max(len(control_ids), 1) + 256:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens and the model {rows:,}: they do not belong together",
            "use the tokenizer that came with the model",
        )
    added = list(range(rows, len(tokenizer)))
    unlearnt = [
        sorted(i for i in {*control_ids, *new_ids} if i < rows and (i in new_ids or _is_untrained(weight, i)))
        for weight in _embedding_weights(model)
    ]
    if missing > 0:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for weight, untrained in zip(_embedding_weights(model), unlearnt, strict=True):
            if fresh := untrained + added:
                trained = torch.ones(rows, dtype=torch.bool, device=weight.device)
                trained[untrained] = False
                weight[fresh] = weight[:rows][trained].float().mean(0).to(weight.dtype)
        outputs = model.get_output_embeddings()
        if missing > 0 and outputs is not None and getattr(outputs, "bias", None) is not None:
            outputs.bias[rows:] = outputs.bias[:rows].float().mean()
    return FreshRows(added, sorted({row for rows_of_one in unlearnt for row in rows_of_one}))


def _embedding_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """The input embedding matrix (V, E), and the output one where it is another."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    return [inputs.weight] if outputs is None or outputs.weight is inputs.weight else [inputs.weight, outputs.weight]


def _is_untrained(weight: Tensor, row: int) -> bool:
    """Whether a row of (V, E) was never trained: next to zero, or the very same as another reserved token's."""
    typical = weight[: min(len(weight), 4096)].float().norm(dim=1).median()
    return bool(weight[row].float().norm() < 1e-3 * typical or (weight == weight[row]).all(1).sum() > 1)
