"""Checkpointing changes what is computed again, and no gradient."""

import pytest
import torch

from orpo_cli.data.batches import flat_batch
from orpo_cli.model.checkpointing import checkpoint_layers, checkpointable_layers
from orpo_cli.model.logprobs import PairLogprobs
from tests.tiny import random_pairs, tiny_model


@pytest.mark.parametrize("shares_prefix", [True, False])
def test_any_number_of_checkpointed_layers_gives_the_same_gradients(shares_prefix):
    batch, results = flat_batch(random_pairs(4, seed=3), "response"), []
    for count in range(5):
        model = tiny_model("llama", num_hidden_layers=4).train()
        checkpoint_layers(model, count)
        assert sum(layer.gradient_checkpointing for layer in checkpointable_layers(model)) == count
        calls = []
        first = checkpointable_layers(model)[0].input_layernorm
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        PairLogprobs(model, shares_prefix)(batch).sum().backward()
        assert len(calls) == (2 if count else 1)
        results.append({name: p.grad for name, p in model.named_parameters()})
    for gradients in results[1:]:
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][name], rtol=1e-6, atol=1e-6)
