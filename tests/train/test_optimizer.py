import math

import pytest
import torch
from torch import nn

from orpo_cli.errors import InputError
from orpo_cli.recipe import TrainSection
from orpo_cli.train import optimizer as optimizer_module
from orpo_cli.train.optimizer import Optimizer, check_optimizer, learning_rate, warmup_steps


def rates(total: int, **keys) -> list[float]:
    section = TrainSection(**keys)
    return [learning_rate(step, total, section, peak=1.0) for step in range(1, total + 1)]


def test_warm_up_rises_to_the_peak_on_its_last_step_and_no_step_is_wasted():
    for kind in ("linear", "cosine", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay"):
        schedule = rates(20, lr_scheduler_type=kind, warmup_steps=4)
        assert schedule[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
        assert min(schedule) > 0


def test_each_schedule_is_its_formula():
    assert rates(10, lr_scheduler_type="linear", warmup_steps=0) == pytest.approx([1 - k / 10 for k in range(10)])
    cosine = rates(10, lr_scheduler_type="cosine", warmup_steps=0)
    assert cosine == pytest.approx([(1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)])
    floored = rates(10, lr_scheduler_type="cosine_with_min_lr", min_lr_ratio=0.1, warmup_steps=0)
    assert floored == pytest.approx([0.1 + 0.9 * value for value in cosine])
    assert rates(10, lr_scheduler_type="constant") == [1.0] * 10
    root = rates(900, lr_scheduler_type="inverse_sqrt", warmup_steps=100)  # the paper's
    assert root[399] == pytest.approx(0.5)
    assert root[899] == pytest.approx(1 / 3)
    stable = rates(100, lr_scheduler_type="warmup_stable_decay", warmup_steps=10)
    assert stable[9:80] == [1.0] * 71
    assert stable[80:] == pytest.approx([(20 - k) / 20 for k in range(20)])


def test_the_warm_up_ratio_is_a_share_of_the_steps_rounded_up_and_steps_win():
    assert warmup_steps(TrainSection(warmup_ratio=0.1), 95) == 10
    assert warmup_steps(TrainSection(warmup_ratio=0.1, warmup_steps=3), 95) == 3
    assert warmup_steps(TrainSection(lr_scheduler_type="constant"), 95) == 0


def layers(dtype: torch.dtype, width: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Linear(width, 1)).to(dtype)


def test_float32_steps_are_those_of_torch_adamw():
    own, stock = layers(torch.float32), layers(torch.float32)
    section = TrainSection(weight_decay=0.1, max_grad_norm=0.5, adam_beta2=0.98)
    optimizer = Optimizer(own.named_parameters(), section)
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in stock.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in stock.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    for step in range(1, 6):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        own(x).square().sum().backward()
        optimizer.clip()
        optimizer.step(0.01 * step)
        stock(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.5)
        for group in reference.param_groups:
            group["lr"] = 0.01 * step
        reference.step()
        reference.zero_grad()
    for mine, theirs in zip(own.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients_of_half_precision_weights_add_up_in_float32():
    model = layers(torch.bfloat16)
    optimizer = Optimizer(model.named_parameters(), TrainSection())
    for scale in (1.0, 1e-3, 1e-3, 1e-3):  # in bfloat16 the later ones would vanish beside the first
        (model[1].bias * scale).sum().backward()
    bias = dict(zip(optimizer.masters, optimizer.gradients(), strict=True))["1.bias"]
    assert bias.dtype == torch.float32
    assert bias.item() == pytest.approx(1.003, rel=1e-3)
    assert all(p.grad is None for p in model.parameters())  # handed over the moment they were made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_handed_in_count_like_those_of_backward(dtype):
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    backward, handed_in = (Optimizer(layers(dtype).named_parameters(), TrainSection()) for _ in range(2))
    for optimizer in (backward, handed_in):
        weight, bias, last, last_bias = optimizer.trained
        for rows in x:
            loss = (torch.tanh(rows @ weight.t() + bias) @ last.t() + last_bias).square().sum()
            if optimizer is backward:
                loss.backward()
            else:
                optimizer.add_gradients(torch.autograd.grad(loss, optimizer.trained))
    handed_in.add_gradients([None] * 4)
    for one, other in zip(backward.gradients(), handed_in.gradients(), strict=True):
        assert one.dtype == torch.float32
        assert one.norm() > 0
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(), (7,), (300, 1000), (1, 5000), (3, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_any_shape_are_added_whole(shape, transposed, monkeypatch):
    monkeypatch.setattr(optimizer_module, "_PIECE", 4096)  # several pieces, the last a short one
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    parameter = nn.Parameter(weight.t() if transposed and weight.ndim == 2 else weight)
    optimizer = Optimizer([("weight", parameter)], TrainSection())
    parts = [torch.randn(parameter.shape).bfloat16() for _ in range(3)]
    for part in parts:
        (parameter * part).sum().backward()
    [total] = optimizer.gradients()
    torch.testing.assert_close(total, sum(part.float() for part in parts), rtol=0, atol=0)


def test_a_parameter_that_nothing_reached_has_a_gradient_of_zeros():
    model = layers(torch.float32)
    optimizer = Optimizer(model.named_parameters(), TrainSection())
    model[1].bias.sum().backward()
    assert [g.abs().sum().item() for g in optimizer.gradients()] == [0, 0, 0, 1]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="paged memory needs CUDA")
PAGED = [pytest.param(kind, marks=needs_cuda) for kind in ("paged_adamw", "paged_adamw_8bit")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", *PAGED])
def test_a_restored_optimizer_goes_on_to_the_same_bits(kind, dtype):
    section = TrainSection(optimizer=kind)
    device = torch.device("cuda" if kind.startswith("paged") else "cpu")

    def steps(model, optimizer, numbers):
        for number in numbers:
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number)).to(device, dtype)
            model(x).square().sum().backward()
            optimizer.clip()
            optimizer.step(1e-3)

    whole = layers(dtype, width=2000).to(device)  # 8 bits from 4,096 numbers on, pages from 100,000: some of either
    optimizer = Optimizer(whole.named_parameters(), section)
    steps(whole, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    weights = {name: p.detach().clone() for name, p in whole.named_parameters()}
    steps(whole, optimizer, range(3, 6))

    resumed = layers(dtype, width=2000).to(device)
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            parameter.copy_(weights[name])
    again = Optimizer(resumed.named_parameters(), section)
    again.load_tensors({name: tensor.cpu() for name, tensor in saved.items()})
    steps(resumed, again, range(3, 6))
    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for name, tensor in optimizer.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


def test_8_bit_moments_step_about_as_float32_ones_do():
    models, section = [], {"weight_decay": 0.1}
    for kind in ("adamw", "adamw_8bit"):
        model = layers(torch.float32, width=2000)
        optimizer = Optimizer(model.named_parameters(), TrainSection(optimizer=kind, **section))
        for number in range(20):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
            model(x).square().sum().backward()
            optimizer.step(1e-3)
        models.append(model)
    state = optimizer.tensors()
    assert state["state1.0.weight"].dtype == state["state2.0.weight"].dtype == torch.uint8
    assert state["absmax1.0.weight"].shape == (math.ceil(12_000 / 256),)
    assert state["state1.1.weight"].dtype == torch.float32  # small ones are not worth it
    start = dict(layers(torch.float32, width=2000).named_parameters())
    for (name, exact), (_, rounded) in zip(*(model.named_parameters() for model in models), strict=True):
        moved = (exact - start[name]).norm()
        assert moved > 0
        assert (rounded - exact).norm() < 0.1 * moved, name


def test_an_optimizer_that_the_device_has_not_is_refused():
    cpu = torch.device("cpu")
    for kind in ("adamw", "adamw_8bit"):
        check_optimizer(TrainSection(optimizer=kind), cpu)
    with pytest.raises(InputError, match="paged_adamw runs on cuda, and this device is cpu") as caught:
        check_optimizer(TrainSection(optimizer="paged_adamw"), cpu)
    assert caught.value.hint == "set train.optimizer: adamw or adamw_8bit"
    check_optimizer(TrainSection(optimizer="paged_adamw_8bit"), torch.device("cuda"))
