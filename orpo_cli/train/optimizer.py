"""AdamW over float32 weights, and the learning rate of every step as a pure function."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from orpo_cli.errors import InputError
from orpo_cli.recipe.schema import TrainSection

# Share of the run over which warmup_stable_decay comes down at its end.
DECAY_SHARE = 0.2
# Numbers that are converted at once: some MiB.
_PIECE = 1 << 22
# bitsandbytes' optimizers by the recipe's names, and the devices it has them for: only CUDA can page memory out.
_BITSANDBYTES = {
    "adamw_8bit": ("AdamW8bit", ("cuda", "cpu")),
    "paged_adamw": ("PagedAdamW", ("cuda",)),
    "paged_adamw_8bit": ("PagedAdamW8bit", ("cuda",)),
}


def check_optimizer(section: TrainSection, device: torch.device) -> None:
    """Raise InputError when the recipe's optimizer does not exist for the device."""
    _, devices = _BITSANDBYTES.get(section.optimizer, ("", (device.type,)))
    if device.type not in devices:
        alike = [name for name, (_, types) in _BITSANDBYTES.items() if device.type in types]
        raise InputError(
            f"train.optimizer: {section.optimizer} runs on {' and '.join(devices)}, and this device is {device.type}",
            f"set train.optimizer: {' or '.join(['adamw', *alike])}",
        )


class Optimizer:
    """AdamW (Loshchilov, Hutter 2019) that steps float32 weights whatever dtype the model computes in.

    Its moments are float32, or 8 bits in blocks of 256 (Dettmers et al. 2021, arXiv 2110.02861); paged, they are moved
    out to the host's memory while the device needs its own.

    A parameter kept in half precision gets a float32 master: its gradient is added to the master's in float32 the
    moment backward has made it, and the parameter is the master's rounding after each step. At the learning rates of
    preference training, steps taken in bfloat16 itself would mostly round to nothing.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], section: TrainSection) -> None:
        self.parameters = {name: p for name, p in named_parameters if p.requires_grad}
        self.masters = {name: _master(p) for name, p in self.parameters.items()}
        self.max_grad_norm = section.max_grad_norm or math.inf
        decayed = [m for m in self.masters.values() if m.ndim > 1]  # norms and biases are not pulled to zero
        plain = [m for m in self.masters.values() if m.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": section.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.adamw = _adamw(groups, section, next(iter(self.masters.values())).device)

    def gradients(self) -> list[Tensor]:
        """The float32 gradients accumulated so far, one for every parameter, in their order.

        A parameter that no pair reached (an idle expert, say) has zeros: what AdamW then does to it must not depend on
        how pairs were spread over micro-batches and processes.
        """
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters.values() if master.grad is not None]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The model's parameters that are trained, in the order of `gradients`."""
        return list(self.parameters.values())

    def add_gradients(self, gradients: Iterable[Tensor | None]) -> None:
        """Add gradients that did not come by a backward pass, one for each of `trained`."""
        for master, gradient in zip(self.masters.values(), gradients, strict=True):
            if gradient is None:
                continue
            if master.grad is None:
                master.grad = gradient.to(torch.float32, copy=True)  # added to in place, and not ours
            else:
                _add(master.grad, gradient)

    def clip(self) -> Tensor:
        """Scale all gradients to a total norm of at most max_grad_norm; the norm before, on the device."""
        return nn.utils.clip_grad_norm_(self.masters.values(), self.max_grad_norm)

    def step(self, learning_rate: float) -> None:
        """One AdamW step; gradients are consumed."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.zero_grad()
        self._publish()

    def zero_grad(self) -> None:
        """Forget all gradients, those as well that a broken-off backward pass has left on their way to a master."""
        self.adamw.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold to go on: moments, step counts and float32 masters, by name."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                is_shared = key.startswith("qmap")  # what the 8 bits stand for: one table for all parameters
                state[key if is_shared else f"{key}.{name}"] = torch.as_tensor(value)
            if master is not self.parameters[name]:
                state[f"master.{name}"] = master.detach()
        return state

    @torch.no_grad()
    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `tensors`. Raises KeyError, RuntimeError or AttributeError for those of another optimizer."""
        saved: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for path, tensor in state.items():
            key, _, name = path.partition(".")
            saved[name][key] = tensor
        shared = saved.pop("", {})
        names = {master: name for name, master in self.masters.items()}
        for g, group in enumerate(self.adamw.param_groups):
            for p, master in enumerate(group["params"]):
                of_master = saved[names[master]]
                if "master" in of_master or master is not self.parameters[names[master]]:
                    master.copy_(of_master.pop("master"))
                if not of_master:
                    continue
                if isinstance(self.adamw, torch.optim.AdamW):
                    if of_master.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                        raise KeyError(f"the state of {names[master]} is not AdamW's")
                    self.adamw.state[master] = {key: value.to(master.device) for key, value in of_master.items()}
                    continue
                self.adamw.init_state(group, master, g, p)  # its buffers may have to lie in paged memory
                own = self.adamw.state[master]
                for key, buffer in own.items():
                    value = of_master[key] if key in of_master else shared[key]
                    own[key] = buffer.copy_(value) if isinstance(buffer, Tensor) else value.item()
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])


def _adamw(groups: list[dict[str, Any]], section: TrainSection, device: torch.device) -> Any:
    settings: dict[str, Any] = {
        "lr": 0.0,
        "betas": (section.adam_beta1, section.adam_beta2),
        "eps": section.adam_epsilon,
    }
    if section.optimizer == "adamw":
        return torch.optim.AdamW(groups, **settings, fused=device.type in ("cpu", "cuda"))
    import bitsandbytes.optim

    name, _ = _BITSANDBYTES[section.optimizer]
    return getattr(bitsandbytes.optim, name)(groups, **settings)


def _add(total: Tensor, more: Tensor) -> None:
    """Add numbers of another dtype in place. On a CPU torch first copies what it converts: there, some rows at once."""
    if total.device.type != "cpu" or total.ndim == 0:
        total.add_(more)
        return
    rows = max(1, _PIECE * len(total) // max(1, total.numel()))
    for piece, of_more in zip(total.split(rows), more.split(rows), strict=True):
        piece.add_(of_more)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself if it is float32; else a float32 copy that collects the parameter's gradients."""
    if parameter.dtype == torch.float32:
        return parameter
    master = nn.Parameter(parameter.detach().float())

    def collect(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            _add(master.grad, parameter.grad)
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(collect)
    return master


def warmup_steps(section: TrainSection, total_steps: int) -> int:
    """Steps over which the learning rate rises; `warmup_steps` wins over `warmup_ratio`, which is rounded up."""
    if section.lr_scheduler_type == "constant":
        return 0
    if section.warmup_steps is not None:
        return section.warmup_steps
    return math.ceil(section.warmup_ratio * total_steps)


def learning_rate(step: int, total_steps: int, section: TrainSection, *, peak: float) -> float:
    """The learning rate that step `step` (from 1) is taken with.

    Warm-up ends at `peak` on its last step, so that no step is taken with a rate of 0; what follows starts at `peak`.
    inverse_sqrt is peak * sqrt(warmup / step), the paper's schedule.
    """
    warmup = warmup_steps(section, total_steps)
    if step <= warmup:
        return peak * step / warmup
    kind, floor = section.lr_scheduler_type, section.min_lr_ratio
    done = (step - warmup - 1) / max(1, total_steps - warmup)  # 0 on the first step after warm-up, < 1 on the last
    if kind in ("constant", "constant_with_warmup"):
        return peak
    if kind == "inverse_sqrt":
        return peak * max(floor, math.sqrt(max(warmup, 1) / max(step, 1)))
    if kind == "linear":
        share = 1 - done
    elif kind == "warmup_stable_decay":
        decay_steps = max(1, math.ceil(DECAY_SHARE * total_steps))
        share = min(1.0, (total_steps - step + 1) / decay_steps)
    else:  # cosine, cosine_with_min_lr
        share = (1 + math.cos(math.pi * done)) / 2
    return peak * (floor + (1 - floor) * share)
