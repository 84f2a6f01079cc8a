"""Shared-prefix attention, each way of computing it, against every token's own row of a mask over the whole flat row.

The ragged kernel needs a GPU. Without one, a brute-force function that takes its arguments stands in for it, so that
what it is given is tested everywhere, and what it computes where there is one.
"""

import pytest
import torch
from torch import nn

from orpo_cli.data.batches import Segment, flat_batch
from orpo_cli.model import attention_cpu, attention_ragged
from orpo_cli.model.attention import Layout, shared_prefix_attention
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.probe import Fitness, why_not_ragged
from tests.tiny import random_pairs, tiny_model

CPU = torch.device("cpu")
HEADS, KEY_HEADS, SIZE = 4, 2, 8


def segments(*sizes):
    """One segment for each (shared, chosen, rejected), one behind the other."""
    starts = [sum(sum(size) for size in sizes[:i]) for i in range(len(sizes))]
    return [Segment(start, *size) for start, size in zip(starts, sizes, strict=True)]


ROW = segments((5, 3, 6), (0, 4, 1), (9, 1, 1), (1, 7, 2))
TOKENS = ROW[-1].stop


def ragged_causal(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch's varlen_attn is documented to compute, with queries aligned to the last keys, by brute force."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert len(cu_seq_q) == len(cu_seq_k)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    lengths = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max(lengths[0]), max(lengths[1])) == (max_q, max_k)
    assert (sum(lengths[0]), sum(lengths[1])) == (len(query), len(key))
    left, right = window_size
    outputs = []
    sequences = zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True)
    for q, k, v in sequences:  # (Q, H, D), (K, G, D), (K, G, D)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        ahead = torch.arange(len(k), device=q.device) - torch.arange(len(k) - len(q), len(k), device=q.device)[:, None]
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if left >= 0:
            seen &= ahead >= -left
        if right >= 0:
            seen &= ahead <= right
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(outputs)


def whole_row(query, key, value, scaling, sliding_window):
    """The definition: token t sees u of its own pair, at or before it, not across branches, within the window."""
    seen = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    for s in ROW:
        branch = s.start + s.shared + s.chosen
        for t in range(s.start, s.stop):
            for u in range(s.start, t + 1):
                crosses = t >= branch and s.start + s.shared <= u < branch
                apart = t - u - (s.chosen if t >= branch and u < s.start + s.shared else 0)
                seen[t, u] = not crosses and (sliding_window is None or apart < sliding_window)
    key, value = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (SIZE**-0.5 if scaling is None else scaling)
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(1, 2)


def draw(key_heads=KEY_HEADS, dtype=torch.float64, device=CPU):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, TOKENS, SIZE) for heads in (HEADS, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


def with_gradients(function, inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, upstream)]


@pytest.fixture
def ragged_everywhere(monkeypatch):
    """The ragged way for every device and dtype, its kernel by brute force; the windows that it is called with."""
    windows = []

    def counted(*args, window_size, **kwargs):
        windows.append(window_size)
        return ragged_causal(*args, window_size=window_size, **kwargs)

    monkeypatch.setattr(attention_ragged, "is_offered", lambda device: True)
    monkeypatch.setattr(attention_ragged, "takes", lambda query, value: True)
    monkeypatch.setattr(attention_ragged, "varlen_attn", counted)
    return windows


@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS, 1])
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 100])
@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("way", ["blocks", "many blocks", "sdpa", "ragged"])
def test_every_way_is_attention_over_the_whole_row(
    key_heads, sliding_window, scaling, way, monkeypatch, ragged_everywhere
):
    inputs = draw(key_heads)
    if way == "sdpa":
        monkeypatch.setattr(attention_cpu, "LONGEST", 0)
    if way == "many blocks":
        monkeypatch.setattr(attention_cpu, "BLOCK", 3)
        monkeypatch.setattr(attention_cpu, "PAIR", 4)
    layout = Layout(ROW, CPU, ragged=way == "ragged")

    def attend(q, k, v):
        return shared_prefix_attention(
            nn.Module(), q, k, v, None, layout=layout, scaling=scaling, sliding_window=sliding_window
        )[0]

    expected = with_gradients(lambda q, k, v: whole_row(q, k, v, scaling, sliding_window), inputs)
    for got, wanted in zip(with_gradients(attend, inputs), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert len(ragged_everywhere) == (way == "ragged")


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_values_may_be_narrower_than_keys_and_not_all_need_a_gradient(wanted):
    query, key, value = draw()
    value = value[..., :5]
    upstream = torch.linspace(-1, 1, TOKENS * HEADS * 5, dtype=torch.float64).view(1, TOKENS, HEADS, 5)

    def gradients(function):
        inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((query, key, value))]
        output = function(*inputs)
        return [output, *torch.autograd.grad(output, [inputs[i] for i in wanted], upstream)]

    blocks = attention_cpu.blocks_of(ROW, 3, torch.float64)
    got = gradients(lambda q, k, v: attention_cpu.attention(q, k, v, blocks, 0.2))
    for ours, brute in zip(got, gradients(lambda q, k, v: whole_row(q, k, v, 0.2, 3)), strict=True):
        torch.testing.assert_close(ours, brute)


def test_the_ragged_sequences_are_each_pairs_two_branches():
    ragged = attention_ragged.Ragged.of(segments((2, 1, 3), (0, 2, 1)), CPU)
    assert ragged.query_starts.tolist() == [0, 3, 6, 8, 9]
    assert ragged.key_starts.tolist() == [0, 3, 8, 10, 11]
    assert ragged.keys.tolist() == [0, 1, 2, *[0, 1, 3, 4, 5], 6, 7, 8]
    assert (ragged.longest_queries, ragged.longest_keys) == (3, 5)


@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS])
def test_torchs_kernel_takes_the_call_as_it_is_made(key_heads):
    """Its arguments and shapes, forward and backward, with tensors that hold no values."""
    meta = torch.device("meta")
    inputs = [x.requires_grad_() for x in draw(key_heads, torch.bfloat16, meta)]
    output = attention_ragged.Ragged.of(ROW, meta).attention(*inputs, 0.3, 7)
    assert output.shape == (1, TOKENS, HEADS, SIZE)
    assert [g.shape for g in torch.autograd.grad(output.sum(), inputs)] == [x.shape for x in inputs]


def test_what_the_kernel_does_not_take():
    half, single = torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16), torch.zeros(1, 2, 3, 64)
    assert attention_ragged.takes(half, half)
    assert attention_ragged.takes(half.half(), half.half())
    assert not attention_ragged.takes(single, single)
    assert not attention_ragged.takes(half[..., :60], half[..., :60])
    assert not attention_ragged.takes(half, half[..., :32])  # values narrower than keys
    assert not attention_ragged.takes(half.repeat(1, 1, 1, 5), half.repeat(1, 1, 1, 5))
    assert not attention_ragged.is_offered(CPU)


def test_dropout_keeps_the_ragged_kernel_out(ragged_everywhere):
    q, k, v = draw()
    shared_prefix_attention(nn.Module(), q, k, v, None, layout=Layout(ROW, CPU), dropout=0.5)
    assert not ragged_everywhere
    shared_prefix_attention(nn.Module(), q, k, v, None, layout=Layout(ROW, CPU))
    assert len(ragged_everywhere) == 1


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_a_model_through_the_ragged_kernel_gives_the_same(family, ragged_everywhere, monkeypatch):
    made = []
    of = attention_ragged.Ragged.of
    monkeypatch.setattr(attention_ragged.Ragged, "of", lambda *args: made.append(of(*args)) or made[-1])
    model, batch, results = tiny_model(family), flat_batch(random_pairs(4, seed=9), "response"), []
    for ragged in (False, True):
        model.zero_grad()
        logps = PairLogprobs(model, shares_prefix=True, ragged=ragged)(batch)
        logps.sum().backward()
        results.append((logps.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert len(made) == 1  # once a batch, not once a layer
    layers = {"llama": [-1, -1], "mistral": [6, 6], "gemma3_text": [6, -1]}[family]
    assert ragged_everywhere == [(left, 0) for left in layers]
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, atol=1e-4, rtol=1e-3)


def aligned_at_the_start(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **keywords):
    """A kernel whose queries are the first of their sequence's tokens: they see too few keys."""
    kept = torch.cat(
        [
            torch.arange(start, start + queries)
            for start, queries in zip(cu_seq_k.tolist(), cu_seq_q.diff().tolist(), strict=False)
        ]
    )
    return ragged_causal(query, key[kept], value[kept], cu_seq_q, cu_seq_q, max_q, max_q, **keywords)


def one_key_too_many(*args, window_size, **keywords):
    return ragged_causal(*args, window_size=(window_size[0] + (window_size[0] > 0), 0), **keywords)


def no_gradient_for_keys(query, key, *args, **keywords):
    return ragged_causal(query, key.detach() + 0 * key, *args, **keywords)


def refuses(*args, **keywords):
    raise RuntimeError("no kernel for this machine")


@pytest.mark.parametrize(
    ("family", "kernel", "fault"),
    [
        ("llama", ragged_causal, None),
        ("mistral", ragged_causal, None),
        ("gpt_neo", refuses, None),  # attends without it
        ("llama", aligned_at_the_start, "output is off"),
        ("mistral", one_key_too_many, "output is off"),
        ("llama", no_gradient_for_keys, "gradient for the keys is off by 100%"),
        ("llama", refuses, "it fails with RuntimeError"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_finds_a_kernel_at_fault_and_still_shares_prefixes(
    family, kernel, fault, dtype, ragged_everywhere, monkeypatch
):
    monkeypatch.setattr(attention_ragged, "varlen_attn", kernel)
    model = tiny_model(family).to(dtype)
    found = why_not_ragged(model)
    assert found is None if fault is None else fault in found
    fitness = Fitness.of(model)
    assert (fitness.not_shared is None) == (family != "gpt_neo")
    if fault is not None:
        assert fitness.remark.endswith(found)
        assert "branch by branch" in fitness.remark
        batch = flat_batch(random_pairs(2), "response")
        expected = PairLogprobs(model, shares_prefix=False)(batch)
        tolerance = 1e-4 if dtype == torch.float32 else 0.5
        torch.testing.assert_close(fitness.logprobs(model)(batch), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the ragged kernel needs a CUDA device")
@pytest.mark.parametrize("key_heads", [HEADS, KEY_HEADS, 1])
@pytest.mark.parametrize("sliding_window", [None, 1, 3, 40, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_cuda_the_kernel_is_the_brute_force_one(key_heads, sliding_window, dtype):
    """Alignment for fewer queries than keys, windows, shared keys, gradients; lengths beyond a block of the kernel."""
    device = torch.device("cuda")
    if not attention_ragged.is_offered(device):
        pytest.skip("this GPU has no FlashAttention")
    row = segments((300, 3, 150), (0, 4, 1), (9, 1, 1), (1, 200, 2), (130, 1, 1))
    ragged, generator = attention_ragged.Ragged.of(row, device), torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, row[-1].stop, 64, generator=generator).to(device, dtype)
        for heads in (HEADS, key_heads, key_heads)
    ]

    def brute(q, k, v):
        q, k, v = (x[0].transpose(0, 1).float() for x in (q, k, v))
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        lengths = ragged.query_starts, ragged.key_starts, ragged.longest_queries, ragged.longest_keys
        gqa = key_heads != HEADS
        out = ragged_causal(q, k[ragged.keys], v[ragged.keys], *lengths, window_size=window, enable_gqa=gqa)
        return out[None].to(dtype)

    got = with_gradients(lambda q, k, v: ragged.attention(q, k, v, None, sliding_window), inputs)
    expected = with_gradients(brute, inputs)
    floor = 0.01 * max(wanted.float().norm() for wanted in expected)  # a window of 1 leaves q and k no gradient
    for name, mine, wanted in zip(("output", "q", "k", "v"), got, expected, strict=True):
        assert (mine - wanted).float().norm() < 0.02 * wanted.float().norm().clamp(min=floor), name
