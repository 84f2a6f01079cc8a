"""The engine against plain passes of the stock model, family by family: values and gradients."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orpo_cli.data.batches import flat_batch
from orpo_cli.model import attention_cpu
from orpo_cli.model.fused_lora import fuse_lora
from orpo_cli.model.head import Head
from orpo_cli.model.logprobs import PairLogprobs, padded
from orpo_cli.model.lora import add_lora
from orpo_cli.model.probe import Fitness
from orpo_cli.recipe import LoraSection
from tests.tiny import FAMILIES, random_pairs, tiny_model

SHARING = [name for name, family in FAMILIES.items() if family.not_shared is None]
# Linear layers that are more than called, on which peft's adapters fail.
NOT_FOR_LORA = {"mamba": ["out_proj", "conv1d"], "mamba2": ["out_proj", "conv1d"], "phimoe": ["router"]}


def plain_logps(model, ids, start):
    """Log-probs of ids[start:] by one stock pass over one sequence, nothing else in the batch."""
    logits = model(torch.tensor(ids, dtype=torch.int64)[None], use_cache=False).logits[0].float()
    logps = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0]
    return logps[start - 1 :]


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def by_plain_passes(model, pairs):
    """Mean log-probs (P,) of chosen and rejected, and the gradients of 2 chosen - rejected."""
    model.zero_grad()
    chosen = torch.stack([plain_logps(model, p.chosen_ids, p.chosen_start).mean() for p in pairs])
    rejected = torch.stack([plain_logps(model, p.rejected_ids, p.rejected_start).mean() for p in pairs])
    (2 * chosen - rejected).sum().backward()
    return chosen.detach(), rejected.detach(), gradients(model)


def by_engine(model, pairs, logprobs):
    model.zero_grad()
    batch = flat_batch(pairs, "response")
    logps = logprobs(batch)
    chosen, rejected = batch.chosen.means(logps), batch.rejected.means(logps)
    (2 * chosen - rejected).sum().backward()
    return chosen.detach(), rejected.detach(), gradients(model)


def assert_same(got, expected, atol=1e-5, relative=1e-4):
    for mine, theirs in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=1e-5)
    assert got[2].keys() == expected[2].keys()
    # A gradient that is zero but for rounding (a key's bias shifts all scores alike) has no relative error.
    floor = 1e-3 * max(gradient.norm() for gradient in expected[2].values())
    for name, gradient in got[2].items():
        error = (gradient - expected[2][name]).norm() / expected[2][name].norm().clamp(min=floor)
        assert error < relative, (name, error)


def with_adapters(model, family):
    """LoRA as a run has it, with adapters that have left zero."""
    torch.manual_seed(1)
    adapted = add_lora(model, LoraSection(r=4, alpha=8, exclude_modules=NOT_FOR_LORA.get(family, [])), [])
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted.get_base_model()


def quantised(model, directory):
    """In evaluation mode but for the 4-bit layers, as `inference` has it."""
    model.save_pretrained(directory)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    ).eval()
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert layers
    for layer in layers:
        layer.train()
    return model


@pytest.mark.parametrize("trained", ["all", "adapters"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_gives_the_log_probs_and_gradients_of_plain_passes(name, trained):
    family, model, pairs = FAMILIES[name], tiny_model(name), random_pairs(5, seed=3)
    if trained == "adapters":
        model = with_adapters(model, name)
    expected = by_plain_passes(model, pairs)
    fuse_lora(model)

    fitness = Fitness.of(model)
    if family.not_shared is None:
        assert fitness.remark is None
    else:
        assert family.not_shared in fitness.not_shared
        assert fitness.remark.endswith(fitness.full_logits if family.full_logits else fitness.not_shared)
    assert (fitness.full_logits is not None) == family.full_logits
    assert_same(by_engine(model, pairs, fitness.logprobs(model)), expected)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"mamba"}))  # stock Mamba multiplies packed weights by itself
def test_a_4bit_base_gives_those_of_its_own_plain_passes(name, tmp_path):
    model, pairs = with_adapters(quantised(tiny_model(name), tmp_path), name), random_pairs(5, seed=3)
    fuse_lora(model)
    expected = by_plain_passes(model, pairs)
    fitness = Fitness.of(model)
    assert (fitness.not_shared is None) == (name in SHARING), fitness.not_shared
    assert_same(by_engine(model, pairs, fitness.logprobs(model)), expected)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.without])
def test_caps_windows_and_scales_are_felt(name):
    """Otherwise the test above would pass without them."""
    batch = flat_batch(random_pairs(5, seed=3), "response")
    with torch.no_grad():
        logps = PairLogprobs(tiny_model(name), shares_prefix=False, full_logits=True)(batch)
        for setting, value in FAMILIES[name].without.items():
            other = PairLogprobs(tiny_model(name, **{setting: value}), shares_prefix=False, full_logits=True)(batch)
            assert (other - logps).abs().mean() > 0.05, setting


@pytest.mark.parametrize("name", SHARING)
def test_positions_are_felt(name):
    batch, model = flat_batch(random_pairs(5, seed=3), "response"), tiny_model(name)
    with torch.no_grad():
        logprobs = PairLogprobs(model, shares_prefix=True)
        running_on = replace(batch, position_ids=torch.arange(batch.tokens) % 100)  # not restarted after the prompt
        apart = (logprobs(running_on) - logprobs(batch)).abs()
    assert apart[batch.rejected.index].mean() > 0.05


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


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_neo", "mamba", "phi3_longrope", "hyperclovax"])
def test_what_shares_a_micro_batch_changes_nothing(name):
    model, pairs = tiny_model(name), random_pairs(7, seed=8)
    logprobs = Fitness.of(model).logprobs(model)
    together = flat_batch(pairs, "response")
    means = together.chosen.means(logprobs(together))
    for i, pair in enumerate(pairs):
        alone = flat_batch([pair], "response")
        torch.testing.assert_close(alone.chosen.means(logprobs(alone))[0], means[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "gemma2", "mamba"])
def test_only_rows_with_a_target_go_through_the_head(name, monkeypatch):
    model, batch, rows, called = tiny_model(name), flat_batch(random_pairs(5, seed=3), "response"), [], []
    logprobs, target_logps = Fitness.of(model).logprobs(model), Head.target_logps

    def counted(head, hidden, targets):
        rows.append(hidden.shape[:-1])
        return target_logps(head, hidden, targets)

    monkeypatch.setattr(Head, "target_logps", counted)
    model.register_forward_hook(lambda *args: called.append(args))
    with torch.no_grad():
        logprobs(batch)
    assert rows == [(len(batch.targets),)]
    assert not called  # the whole model would make all logits


@pytest.mark.parametrize(("name", "confidence"), [("llama", 4), ("granite", 12), ("gemma2", 3), ("gpt_neo", 4)])
@pytest.mark.parametrize("trained_head", [False, True])
def test_in_bfloat16_the_gradients_of_confident_tokens_reach_the_backbone(name, confidence, trained_head):
    """At p = 0.9999 they are what is left of 1 - p, which a careless rounding takes for nothing."""
    model = tiny_model(name, **({"final_logit_softcapping": 30.0} if name == "gemma2" else {}))
    batch = flat_batch(random_pairs(8, seed=3), "response")
    logprobs, weights = Fitness.of(model).logprobs(model), model.get_output_embeddings()
    weights.weight = torch.nn.Parameter(confidence * weights.weight.detach())
    model.to(torch.bfloat16)
    weights.requires_grad_(trained_head)
    states = []  # (1, T, E), or (2P, L, E) padded
    model.base_model.register_forward_hook(lambda module, args, output: states.append(output.last_hidden_state))
    _, _, sequence, position = padded(batch)
    rows = (0, batch.rows) if logprobs.shares_prefix else (sequence[batch.rows], position[batch.rows])

    def exact_logps(hidden):
        head = Head.of(model)
        logits = hidden[rows] @ weights.weight.detach().double().t() * head.scale
        logits = logits if head.cap is None else head.cap * torch.tanh(logits / head.cap)
        return logits.log_softmax(-1)

    logprobs(batch)
    batch.targets = exact_logps(states.pop().double()).argmax(-1)
    logps = logprobs(batch)
    [hidden] = states
    [got] = torch.autograd.grad(logps.sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    wanted = exact_logps(exact).gather(1, batch.targets[:, None])[:, 0]
    [expected] = torch.autograd.grad(wanted.sum(), exact)
    error = (got[rows] - expected[rows]).norm(dim=1) / expected[rows].norm(dim=1)
    confident = wanted.exp() > 0.99
    assert confident.sum() >= 9
    assert error[confident].mean() < 0.05


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


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_long_segments_take_another_kernel_to_the_same_numbers(family, monkeypatch):
    model, pairs = tiny_model(family), random_pairs(4, seed=9)
    batch, results = flat_batch(pairs, "response"), []
    for longest in (1024, 0):
        monkeypatch.setattr(attention_cpu, "LONGEST", longest)
        model.zero_grad()
        logps = PairLogprobs(model, shares_prefix=True)(batch)
        logps.sum().backward()
        results.append((logps.detach(), gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-4, rtol=1e-3)
