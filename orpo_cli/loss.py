"""The ORPO objective as pure functions of log-probabilities (Hong, Lee, Thorne 2024, arXiv 2403.07691v2).

    L = L_SFT + beta * L_OR                                               (eq. 6; beta is the paper's lambda)
    L_OR = -log sigmoid(log odds(chosen) - log odds(rejected))            (eq. 7)
    odds(y|x) = P(y|x) / (1 - P(y|x))                                     (eq. 4)
    log P(y|x) = mean over the response's tokens of their log-prob        (eq. 3)

All is float32 and in log space: log odds = log P - log(1 - P), and log(1 - P) = log1mexp(log P) never forms P.
Shapes: P pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The largest log-prob that still has a finite odds in float32. Above it P rounds to 1 and log(1 - P) to -inf.
MAX_LOGP = -1e-7
_LN2 = math.log(2.0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, finite with a finite gradient for every x <= 0.

    Computed as log(-expm1(x)) near zero and log1p(-exp(x)) further down (Maechler 2012), each branch fed an
    argument of its own domain: a single `where` would send 0 * inf = NaN back through the branch not taken.
    x is clamped to MAX_LOGP, above which the gradient is zero.
    """
    x = x.clamp(max=MAX_LOGP)
    near = x > -_LN2
    x_near = torch.where(near, x, -_LN2)
    x_far = torch.where(near, -_LN2, x)
    return torch.where(near, torch.log(-torch.expm1(x_near)), torch.log1p(-torch.exp(x_far)))


def log_odds(logps: Tensor) -> Tensor:
    """log(P / (1 - P)) of length-averaged log-probs (P,), float32 or float64 (eq. 4).

    Only log(1 - P) is clamped: where P rounds to 1 the gradient is 1, so that such a rejected answer still falls.
    """
    return logps - log1mexp(logps)


def odds_ratio_loss(chosen_logps: Tensor, rejected_logps: Tensor) -> tuple[Tensor, Tensor]:
    """L_OR of each pair (eq. 7), without beta, and the log odds ratio it is the negative log sigmoid of.

    Both arguments are mean log-probs per response token (P,) (eq. 3). Returns ((P,), (P,)).
    """
    log_odds_ratio = log_odds(chosen_logps) - log_odds(rejected_logps)
    return -F.logsigmoid(log_odds_ratio), log_odds_ratio


def odds_ratio_gradient(chosen_logps: Tensor, rejected_logps: Tensor, log_odds_ratio: Tensor) -> Tensor:
    """How hard L_OR of each pair (P,) pulls: the sum of |dL_OR / d log-prob| over the tokens of both responses (P,).

    By eqs. 8 to 10 that is delta / (1 - P) of each side, delta = 1 / (1 + odds ratio), however many tokens share it.
    The same sum of the NLL is 1, whether it is a mean over pairs or tokens, so that the two tell each term's weight.
    """
    sides = [-1 / torch.expm1(logps.clamp(max=MAX_LOGP)) for logps in (chosen_logps, rejected_logps)]
    return torch.sigmoid(-log_odds_ratio) * (sides[0] + sides[1])


# What a step reports of its pairs, each summed over them; the order of `pair_metrics`' rows.
METRICS = ("nll_loss", "or_loss", "log_odds_ratio", "accuracy", "chosen_logps", "rejected_logps", "or_gradient")


def orpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, nll: Tensor, *, beta: float, nll_total: float, pairs: float
) -> tuple[Tensor, Tensor]:
    """The share of one micro-batch in the loss of its optimizer step, and what it adds to the step's metrics.

    `nll` (P,) is each pair's negative log-likelihood: the mean over its tokens, with `nll_total` the step's pairs,
    or the sum over its tokens, with `nll_total` the step's tokens. `pairs` is the step's number of pairs. Both
    totals are those of the whole step over all devices, so that the micro-batches' shares add up to the same loss
    however the step is cut.

    Returns the scalar to differentiate and a detached (7,): METRICS in their order, each likewise a share.
    """
    or_losses, log_odds_ratio = odds_ratio_loss(chosen_logps, rejected_logps)
    nll_loss = nll.sum() / nll_total
    or_loss = or_losses.sum() / pairs
    chosen, rejected, ratio = chosen_logps.detach(), rejected_logps.detach(), log_odds_ratio.detach()
    of_pairs = torch.stack(
        [ratio, (ratio > 0).to(ratio.dtype), chosen, rejected, odds_ratio_gradient(chosen, rejected, ratio)]
    )
    shares = torch.cat([torch.stack([nll_loss.detach(), or_loss.detach()]), of_pairs.sum(1) / pairs])
    # beta 0 is plain SFT: the odds ratio is reported, and nothing of it, not even 0 * inf, reaches the gradient.
    loss = nll_loss + beta * or_loss if beta else nll_loss
    return loss, shares
