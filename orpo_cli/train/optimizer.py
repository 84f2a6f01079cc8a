"""AdamW over float32 weights, and the learning rate of every step as a pure function."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from orpo_cli.recipe.schema import TrainSection

# Share of the run over which warmup_stable_decay comes down at its end.
DECAY_SHARE = 0.2


class Optimizer:
    """AdamW (Loshchilov, Hutter 2019) that steps float32 weights whatever dtype the model computes in.

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
        self.adamw = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": section.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=(section.adam_beta1, section.adam_beta2),
            eps=section.adam_epsilon,
            fused=next(iter(self.masters.values())).device.type in ("cpu", "cuda"),
        )

    def gradients(self) -> list[Tensor]:
        """The float32 gradients accumulated so far, one for every parameter, in their order.

        A parameter that no pair reached (an idle expert, say) has zeros: what AdamW then does to it must not depend on
        how pairs were spread over micro-batches and processes.
        """
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters.values() if master.grad is not None]

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
        """Forget all gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold to go on: moments, step counts and float32 masters, by name."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            for key, value in self.adamw.state.get(master, {}).items():
                state[f"{key}.{name}"] = value
            if master is not self.parameters[name]:
                state[f"master.{name}"] = master.detach()
        return state

    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `tensors`."""
        with torch.no_grad():
            for name, master in self.masters.items():
                if f"master.{name}" in state:
                    master.copy_(state[f"master.{name}"])
                moments = {
                    key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in state
                }
                if moments:
                    self.adamw.state[master] = {key: value.to(master.device) for key, value in moments.items()}
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself if it is float32; else a float32 copy that collects the parameter's gradients."""
    if parameter.dtype == torch.float32:
        return parameter
    master = nn.Parameter(parameter.detach().float())

    def collect(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
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
