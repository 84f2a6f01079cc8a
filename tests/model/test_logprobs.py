"""The flat batch against two plain passes of the stock model, family by family: values and gradients."""

import pytest
import torch

from orpo_cli.data.batches import flat_batch
from orpo_cli.model import attention_cpu
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.probe import why_not_shared
from tests.tiny import FAMILIES, random_pairs, tiny_model


def plain_logps(model, ids, start):
    """Log-probs of ids[start:] by one stock pass over one sequence, nothing else in the batch."""
    logits = model(torch.tensor(ids, dtype=torch.int64)[None]).logits[0].float()
    logps = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0]
    return logps[start - 1 :]


def reference(model, pairs):
    chosen = torch.stack([plain_logps(model, p.chosen_ids, p.chosen_start).mean() for p in pairs])
    rejected = torch.stack([plain_logps(model, p.rejected_ids, p.rejected_start).mean() for p in pairs])
    return chosen, rejected


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_flat_batches_give_the_log_probs_and_gradients_of_plain_passes(family):
    model, pairs = tiny_model(family), random_pairs(5, seed=3)
    why = why_not_shared(model)
    assert (why is None) == FAMILIES[family][1], why

    chosen, rejected = reference(model, pairs)
    (2 * chosen - rejected).sum().backward()
    expected = gradients(model)
    model.zero_grad()

    engine = PairLogprobs(model, shares_prefix=why is None)
    batch = flat_batch(pairs, "response")
    logps = engine(batch)
    got_chosen, got_rejected = batch.chosen.means(logps), batch.rejected.means(logps)
    (2 * got_chosen - got_rejected).sum().backward()

    torch.testing.assert_close(got_chosen, chosen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_rejected, rejected, atol=1e-5, rtol=1e-5)
    # A gradient that is zero but for rounding (a key's bias shifts all scores alike) has no relative error.
    floor = 1e-3 * max(gradient.norm() for gradient in expected.values())
    for name, gradient in gradients(model).items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=floor)
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("nll_tokens", ["response", "all", "assistant"])
def test_the_nll_is_that_of_a_plain_pass(nll_tokens):
    model, pairs = tiny_model("llama"), random_pairs(6, seed=5)
    batch = flat_batch(pairs, nll_tokens)
    got = batch.nll.sums(PairLogprobs(model, shares_prefix=True)(batch))
    start = {"response": lambda p: p.chosen_start, "all": lambda p: 1, "assistant": lambda p: p.chosen_start}[
        nll_tokens
    ]
    model.set_attn_implementation("sdpa")
    expected = torch.stack([plain_logps(model, p.chosen_ids, start(p)).sum() for p in pairs])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-5)


def test_what_shares_a_micro_batch_changes_nothing():
    model, pairs = tiny_model("llama"), random_pairs(7, seed=8)
    engine = PairLogprobs(model, shares_prefix=True)
    together = flat_batch(pairs, "response")
    means = together.chosen.means(engine(together))
    for i, pair in enumerate(pairs):
        alone = flat_batch([pair], "response")
        torch.testing.assert_close(alone.chosen.means(engine(alone))[0], means[i], atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing():
    pairs, results = random_pairs(3, seed=1), []
    for checkpointed in (False, True):
        model = tiny_model("llama").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = flat_batch(pairs, "response")
        PairLogprobs(model, shares_prefix=True)(batch).sum().backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient)


def test_a_model_whose_layers_ignore_the_registration_is_found_out():
    assert "0 of its 2 layers attend" in why_not_shared(tiny_model("gpt_neo"))
    assert "soft-capped" in why_not_shared(tiny_model("gemma2"))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_long_segments_take_another_kernel_to_the_same_numbers(family, monkeypatch):
    model, pairs = tiny_model(family), random_pairs(4, seed=9)
    batch, results = flat_batch(pairs, "response"), []
    for folded_keys in (1024, 0):
        monkeypatch.setattr(attention_cpu, "FOLDED_KEYS", folded_keys)
        model.zero_grad()
        logps = PairLogprobs(model, shares_prefix=True)(batch)
        logps.sum().backward()
        results.append((logps.detach(), gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-4, rtol=1e-3)
