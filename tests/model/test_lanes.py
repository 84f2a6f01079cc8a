"""Micro-batches side by side: the same numbers as one after the other, and the same bits every time."""

import threading
import time

import pytest
import torch
from torch import nn

from orpo_cli.data.batches import flat_batch
from orpo_cli.model import lanes
from orpo_cli.model.checkpointing import checkpoint_layers
from orpo_cli.model.fused_lora import fuse_lora
from orpo_cli.model.fused_norm import fuse_norms
from orpo_cli.model.lanes import in_lanes, lanes_for, most_lanes
from orpo_cli.model.logprobs import PairLogprobs
from orpo_cli.model.lora import add_lora
from orpo_cli.model.probe import Fitness
from orpo_cli.recipe import LoraSection
from tests.model.test_logprobs import SHARING, quantised, with_adapters
from tests.tiny import random_pairs, tiny_model


@pytest.mark.parametrize(
    ("tokens", "cores", "expected"),
    [(1, 2, 1), (1023, 8, 1), (2048, 1, 1), (2047, 2, 1), (2048, 2, 2), (8192, 2, 2), (4096, 16, 4), (16384, 16, 16)],
)
def test_a_lane_has_a_core_and_enough_tokens(tokens, cores, expected):
    assert lanes_for(tokens, cores) == expected


def test_all_run_at_once_and_come_back_in_their_order():
    meeting = threading.Barrier(3, timeout=30)

    def work(number):
        meeting.wait()  # for nobody, unless all three are here
        time.sleep(0.02 * (3 - number))
        return number, threading.get_ident()

    results = in_lanes(work, [1, 2, 3])
    assert [number for number, _ in results] == [1, 2, 3]
    assert len({thread for _, thread in results} | {threading.get_ident()}) == 4


def test_lanes_of_several_cores_give_the_same_bits_again():
    torch.set_num_threads(4)
    model = with_adapters(tiny_model("llama"), "llama")
    fuse_lora(model)
    assert_lanes_change_nothing(model, Fitness.of(model).logprobs(model))


def test_lanes_share_the_cores_and_leave_them_as_they_were():
    torch.set_num_threads(4)
    assert in_lanes(lambda _: torch.get_num_threads(), [1, 2]) == [2, 2]
    assert in_lanes(lambda _: torch.get_num_threads(), [1, 2, 3]) == [1, 1, 1]
    assert torch.get_num_threads() == 4
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [4]


def test_the_first_error_is_raised_when_all_have_ended():
    ended = []

    def work(number):
        if number == 2:
            raise MemoryError("of two")
        time.sleep(0.1)
        ended.append(number)

    with pytest.raises(MemoryError, match="of two"):
        in_lanes(work, [1, 2, 3])
    assert sorted(ended) == [1, 3]


@pytest.fixture(autouse=True)
def two_cores():
    cores = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(cores)


def trains_in_lanes(model) -> bool:
    assert most_lanes(PairLogprobs(model, shares_prefix=False)) == 1
    before = model.config._attn_implementation
    lanes = most_lanes(PairLogprobs(model, shares_prefix=True))
    model.set_attn_implementation(before)
    assert lanes in (1, torch.get_num_threads())
    return lanes > 1


def test_lanes_are_for_few_weights_and_nothing_drawn(monkeypatch):
    assert not trains_in_lanes(tiny_model("llama"))  # all are trained
    adapted = with_adapters(tiny_model("llama"), "llama")
    share = sum(p.numel() for p in adapted.parameters() if p.requires_grad) / sum(
        p.numel() for p in adapted.parameters()
    )
    monkeypatch.setattr(lanes, "TRAINED_SHARE", 1.01 * share)
    assert trains_in_lanes(adapted)
    monkeypatch.setattr(lanes, "TRAINED_SHARE", 0.99 * share)
    assert not trains_in_lanes(adapted)
    monkeypatch.setattr(lanes, "TRAINED_SHARE", 1.0)
    dropping = add_lora(tiny_model("llama"), LoraSection(r=4, dropout=0.1), []).get_base_model()
    assert not trains_in_lanes(dropping)
    assert not trains_in_lanes(with_adapters(tiny_model("llama", attention_dropout=0.1), "llama"))
    assert not trains_in_lanes(with_adapters(tiny_model("phimoe", router_jitter_noise=0.1), "phimoe"))
    assert not trains_in_lanes(with_adapters(tiny_model("mixtral"), "mixtral"))  # adapters of the experts' parameters
    assert not trains_in_lanes(add_lora(tiny_model("llama"), LoraSection(r=4, use_dora=True), []).get_base_model())


@pytest.mark.parametrize("name", SHARING)
def test_what_trains_in_lanes_draws_nothing(name, monkeypatch):
    monkeypatch.setattr(lanes, "TRAINED_SHARE", 1.0)
    model = with_adapters(tiny_model(name), name)
    if not trains_in_lanes(model):
        pytest.skip("not trained in lanes")
    logprobs = Fitness.of(model).logprobs(model)
    model.train()
    before = torch.get_rng_state()
    logprobs(flat_batch(random_pairs(3, seed=3), "response")).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def of_batches(model: nn.Module, logprobs, batches, side_by_side: bool) -> list[list[torch.Tensor]]:
    """The gradients of each micro-batch."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(batch):
        logps = logprobs(batch)
        loss = (2 * batch.chosen.means(logps) - batch.rejected.means(logps)).sum()
        return [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(trained, torch.autograd.grad(loss, trained, allow_unused=True), strict=True)
        ]

    return in_lanes(gradients, batches) if side_by_side else [gradients(batch) for batch in batches]


def assert_lanes_change_nothing(model, logprobs):
    batches = [flat_batch(random_pairs(4, seed=seed), "response") for seed in range(4)]
    expected = of_batches(model, logprobs, batches, side_by_side=False)
    first = of_batches(model, logprobs, batches, side_by_side=True)
    for got, wanted in zip(first, expected, strict=True):
        floor = 1e-3 * max(g.norm() for g in wanted)
        for one, other in zip(got, wanted, strict=True):
            assert (one - other).norm() / other.norm().clamp(min=floor) < 1e-4
    for _ in range(3):
        for got, before in zip(of_batches(model, logprobs, batches, side_by_side=True), first, strict=True):
            assert all(map(torch.equal, got, before))


@pytest.mark.parametrize("checkpointed", [0, 1])
@pytest.mark.parametrize("name", SHARING)
def test_each_family_has_the_same_gradients_in_lanes(name, checkpointed):
    model = with_adapters(tiny_model(name), name)
    fuse_lora(model)
    fuse_norms(model)
    logprobs = Fitness.of(model).logprobs(model)
    model.train()
    if not trains_in_lanes_at_any_share(model):
        pytest.skip("not trained in lanes")
    checkpoint_layers(model, checkpointed)
    assert_lanes_change_nothing(model, logprobs)


def test_a_4bit_base_has_them_too(tmp_path):
    model = with_adapters(quantised(tiny_model("llama"), tmp_path), "llama")
    fuse_lora(model)
    assert trains_in_lanes_at_any_share(model)
    assert_lanes_change_nothing(model, Fitness.of(model).logprobs(model))


def test_token_rows_that_are_trained_have_them_too():
    model = add_lora(tiny_model("llama"), LoraSection(r=4), [5, 9, 11]).get_base_model()
    fuse_lora(model)
    assert trains_in_lanes_at_any_share(model)
    assert_lanes_change_nothing(model, Fitness.of(model).logprobs(model))


def trains_in_lanes_at_any_share(model) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "TRAINED_SHARE", 1.0)
        return trains_in_lanes(model)


def test_most_families_train_in_lanes():
    """Else the tests above would skip what they are for."""
    fit = [name for name in SHARING if trains_in_lanes_at_any_share(with_adapters(tiny_model(name), name))]
    assert len(fit) > 0.6 * len(SHARING), sorted(set(SHARING) - set(fit))
    assert {"llama", "qwen3", "mistral", "gemma3_text"} <= set(fit)
