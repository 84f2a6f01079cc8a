"""Losses that go by the name of ORPO and are not: what each makes of a log-prob, and of a model.

    python benchmarks/wrong_losses.py [--model MODEL --data PAIRS] [--beta 0.5] [--seeds 1,2,3] [--pairs 320]
        [--held-out 200] [--epochs 2] [--learning-rate 2e-3] [--keep DIR]

First the log odds of a mean log-prob and their gradient, in float32 as in a training, beside the truth in float64.
Then short trainings, all as in `claims.py` (`--keep` may name the same directory), with the wrong loss in the place of
ours in that process alone; judged, as there, by the right figures on held-out pairs.

softplus       log odds as log p - softplus(-log p)
log1p          log(1 - p) as log1p(-exp(log p))
one where      log(1 - p) by the better of two forms in one `where`, which differentiates the other one too
epsilon        odds as p / (1 - p + 1e-8), log of that plus 1e-8
summed         the right formula on the sum of an answer's log-probs in the place of their mean
beta inside    -log sigmoid(beta * log odds ratio), as in DPO
style term     rejected - chosen log-prob in the place of the NLL
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import HERE, Learnt, Study, kept, learn_ours, machine, open_study, run_process, spread, study_arguments

if TYPE_CHECKING:
    from torch import Tensor

POINTS = (-20.0, -2.0, -0.05, -1e-4, -1e-6, -1e-8)
EPSILON = 1e-8
FIGURES = ("accuracy", "chosen_logps", "rejected_logps", "log_odds_ratio")


def log_odds_variants() -> dict[str, Callable[[Tensor], Tensor]]:
    """Log odds of mean log-probs, rightly and otherwise."""
    import torch
    import torch.nn.functional as F

    from orpo_cli.loss import log_odds

    def epsilon(logps: Tensor) -> Tensor:
        p = logps.exp()
        return torch.log(p / (1 - p + EPSILON) + EPSILON)

    def one_where(logps: Tensor) -> Tensor:
        near = logps > -math.log(2)
        return logps - torch.where(near, torch.log(-torch.expm1(logps)), torch.log1p(-torch.exp(logps)))

    return {
        "ours": log_odds,
        "softplus": lambda logps: logps - F.softplus(-logps),
        "log1p": lambda logps: logps - torch.log1p(-torch.exp(logps)),
        "one where": one_where,
        "epsilon": epsilon,
    }


@dataclass(frozen=True)
class Wrong:
    """A wrong loss to train by."""

    log_odds: str = "ours"
    beta_inside: bool = False
    style_term: bool = False
    summed: bool = False


TRAINED = {
    "softplus": Wrong(log_odds="softplus"),
    "epsilon": Wrong(log_odds="epsilon"),
    "summed": Wrong(summed=True),
    "beta inside": Wrong(beta_inside=True),
    "style term": Wrong(style_term=True),
}


def loss_of(wrong: Wrong) -> Callable[..., tuple[Tensor, Tensor]]:
    """In the shape of `orpo_cli.loss.orpo_loss`; the step's metrics stay the right ones."""
    import torch.nn.functional as F

    from orpo_cli.loss import orpo_loss

    log_odds = log_odds_variants()[wrong.log_odds]

    def loss(
        chosen: Tensor, rejected: Tensor, nll: Tensor, *, beta: float, nll_total: float, pairs: float
    ) -> tuple[Tensor, Tensor]:
        _, metrics = orpo_loss(chosen, rejected, nll, beta=beta, nll_total=nll_total, pairs=pairs)
        ratio = log_odds(chosen) - log_odds(rejected)
        contrast = -F.logsigmoid(beta * ratio) if wrong.beta_inside else -beta * F.logsigmoid(ratio)
        first = (rejected - chosen).sum() / pairs if wrong.style_term else nll.sum() / nll_total
        return first + contrast.sum() / pairs, metrics

    return loss


def learn_wrong(study: Study, directory: Path, seed: int, name: str) -> Learnt:
    """One training by a wrong loss."""
    run = directory / "run"
    command = [sys.executable, HERE / "wrong_training.py", name, "train", study.recipe, "--output-dir", run]
    settings = [f"train.seed={seed}", f"loss.beta={study.options.beta}"]
    process = run_process([*command, "--overwrite", *(a for s in settings for a in ("--set", s))], study.directory)
    return Learnt.read(json.loads((run / "eval.json").read_text()), process)


def print_points() -> None:
    """Print log odds and gradients."""
    import torch

    def cell(value: float, gradient: float) -> str:
        return f"{value:.4g}; {gradient:.4g}"

    print(f"| log p | {' | '.join(f'{point:g}' for point in POINTS)} |")
    print("|---|" + "---|" * len(POINTS))
    truth = [cell(x - math.log(-math.expm1(x)), -1 / math.expm1(x)) for x in POINTS]
    print(f"| truth | {' | '.join(truth)} |")
    for name, log_odds in log_odds_variants().items():
        logps = torch.tensor(POINTS, requires_grad=True)
        values = log_odds(logps)
        (gradients,) = torch.autograd.grad(values.sum(), logps)
        cells = map(cell, values.tolist(), gradients.tolist())
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = study_arguments(__doc__)
    parser.add_argument("--beta", default="0.5")
    options = parser.parse_args()

    print("Log odds; their derivative by log p:\n")
    print_points()
    with open_study(options) as study:
        print(f"\n{machine()}\nbeta {options.beta}, {options.pairs} pairs, {study.steps} steps; ", end="")
        print(f"{options.held_out} held-out pairs; seeds {options.seeds}: median (lowest to highest)\n")
        print("| | accuracy | chosen log-prob | rejected log-prob | log odds ratio |\n|---|---|---|---|---|")
        for name in ("ours", *TRAINED):
            runs = []
            for seed in study.seeds:
                if name == "ours":
                    runs.append(learn_ours(study, seed, options.beta))
                else:
                    directory = study.run(seed, f"{name}, beta {options.beta}")
                    runs.append(
                        kept(directory, Learnt, lambda it, seed=seed, name=name: learn_wrong(study, it, seed, name))
                    )
            cells = [spread(getattr(run, figure) for run in runs) for figure in FIGURES]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
