"""Log-probs without logits against the plain computation, values and gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from orpo_cli.model import head as head_module
from orpo_cli.model.head import CHUNK_ROWS, Head, _trained_rows

M, E, V = 2 * CHUNK_ROWS + 7, 12, 40


@pytest.fixture(autouse=True, params=[(CHUNK_ROWS, 512), (100, 7)], ids=["one tile", "many tiles"])
def tile(request, monkeypatch):
    monkeypatch.setattr(head_module, "CPU_TILE", request.param)


def draw(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(hidden, targets, weight, bias=None, scale=1.0, cap=None):
    logits = (hidden @ weight.t() + (0 if bias is None else bias)) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.3, None), (1.0, 3.0), (0.5, 2.0)])
@pytest.mark.parametrize("trainable", [False, True])
def test_values_and_gradients_are_those_of_the_plain_computation(bias, scale, cap, trainable):
    linear = nn.Linear(E, V, bias=bias).double()
    linear.requires_grad_(trainable)
    hidden = draw(1, M, E, dtype=torch.float64).requires_grad_()
    targets, upstream = torch.randint(0, V, (M,)), draw(2, M, dtype=torch.float64)

    expected = plain(hidden, targets, linear.weight, linear.bias, scale, cap)
    trained = [linear.weight, *([linear.bias] if bias else [])] if trainable else []
    wanted = [hidden, *trained]
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), wanted)

    single = nn.Linear(E, V, bias=bias).requires_grad_(trainable)
    single.load_state_dict(linear.state_dict())
    h = hidden.detach().float().requires_grad_()
    got = Head(single, scale, cap).target_logps(h, targets)
    assert got.dtype == torch.float32
    trained = [single.weight, *([single.bias] if bias else [])] if trainable else []
    gradients = torch.autograd.grad((got * upstream.float()).sum(), [h, *trained])
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_without_gradients_the_values_are_the_same():
    head = Head(nn.Linear(E, V).requires_grad_(False))
    hidden, targets = draw(3, M, E), torch.randint(0, V, (M,))
    with torch.no_grad():
        assert torch.equal(head.target_logps(hidden, targets), head.target_logps(hidden.requires_grad_(), targets))


def with_trained_rows(tiny_base, tied: bool):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    config = LoraConfig(target_modules="all-linear", trainable_token_indices={name: [5, 17, 200] for name in names})
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(draw(7, *parameter.shape))
    return peft


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_are_trained_by_themselves_get_their_gradient(tiny_base, tied):
    peft = with_trained_rows(tiny_base, tied)
    head = Head.of(peft.get_base_model())
    assert _trained_rows(head.module) is not None
    delta = next(p for n, p in peft.named_parameters() if "trainable_tokens_delta" in n and (tied or "lm_head" in n))
    targets = torch.randint(0, 259, (M,))
    targets[:40] = torch.tensor([5, 17, 200, 3]).repeat(10)
    upstream = draw(4, M)

    h1 = draw(5, M, 32).requires_grad_()
    expected = head.module(h1).log_softmax(-1).gather(1, targets[:, None])[:, 0]  # as peft computes it
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), [h1, delta])
    h2 = draw(5, M, 32).requires_grad_()
    got = head.target_logps(h2, targets)
    gradients = torch.autograd.grad((got * upstream).sum(), [h2, delta])
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_head_with_an_adapter_of_its_own_is_computed_through_it(tiny_base):
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config)
    head = Head.of(peft.get_base_model())
    assert _trained_rows(head.module) is None
    hidden, targets = draw(5, M, 32).requires_grad_(), torch.randint(0, 259, (M,))
    expected = head.module(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(head.target_logps(hidden, targets), expected)


@pytest.mark.parametrize("p", [0.5, 0.99, 0.9999])
def test_in_bfloat16_the_gradient_of_a_confident_token_is_within_five_percent(p):
    """At p near 1 the gradient is what is left of 1 - p: a one-hot taken off after rounding would lose it."""
    weight = draw(6, V, 64).bfloat16()
    hidden = (3 * weight[:1].float() / weight[0].float().norm()).bfloat16()
    for _ in range(200):  # scale the hidden state until the first token has this probability
        now = (hidden.double() @ weight.double().t()).softmax(-1)[0, 0].item()
        hidden = (hidden.double() * (1.01 if now < p else 0.99)).bfloat16()
    target = torch.zeros(1, dtype=torch.int64)

    exact = hidden.double().requires_grad_()
    [expected] = torch.autograd.grad(plain(exact, target, weight.double()).sum(), [exact])
    linear = nn.Linear(64, V, bias=False).bfloat16().requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    h = hidden.clone().requires_grad_()
    [got] = torch.autograd.grad(Head(linear).target_logps(h, target).sum(), [h])
    assert (got.double() - expected).norm() / expected.norm() < 0.05
