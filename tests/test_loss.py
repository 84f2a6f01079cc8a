"""The objective against fifty-digit arithmetic, and against the paper's own gradient formula."""

from __future__ import annotations

import itertools
import math

import mpmath
import pytest
import torch

from orpo_cli.loss import MAX_LOGP, METRICS, log1mexp, log_odds, odds_ratio_gradient, odds_ratio_loss, orpo_loss

LOGPS = [-200.0, -103.0, -88.0, -20.0, -5.0, -1.5, -0.7, -math.log(2), -0.6, -0.1, -1e-2, -1e-4, -1e-6, -2e-7, -1e-7]
LOGPS_TO_ONE = [*LOGPS, -1e-8, -1e-30, -0.0, 0.0]


@pytest.fixture(autouse=True)
def many_digits():
    with mpmath.workdps(50):
        yield


def exact_log1mexp(x: float) -> mpmath.mpf:
    return mpmath.log(-mpmath.expm1(mpmath.mpf(min(x, MAX_LOGP))))


def exact_log_odds(x: float) -> mpmath.mpf:
    return mpmath.mpf(x) - exact_log1mexp(x)


def exact_or_loss(chosen: float, rejected: float) -> mpmath.mpf:
    return mpmath.log1p(mpmath.exp(exact_log_odds(rejected) - exact_log_odds(chosen)))


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("logp", LOGPS_TO_ONE)
def test_log_odds_from_no_chance_to_certainty(logp, dtype, rtol):
    x = torch.tensor(logp, dtype=dtype)
    assert log1mexp(x).item() == pytest.approx(float(exact_log1mexp(x.item())), rel=rtol, abs=1e-44)
    # At P = 1/2 the odds are 1 and their logarithm is a difference of equal numbers.
    assert log_odds(x).item() == pytest.approx(float(exact_log_odds(x.item())), rel=rtol, abs=rtol)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_the_odds_ratio_loss_of_every_two_log_probs(dtype, rtol):
    couples = list(itertools.product(LOGPS_TO_ONE, repeat=2))
    chosen, rejected = torch.tensor(couples, dtype=dtype).T
    losses, ratios = odds_ratio_loss(chosen, rejected)
    for loss, ratio, w, l in zip(losses.tolist(), ratios.tolist(), chosen.tolist(), rejected.tolist(), strict=True):  # noqa: E741
        assert ratio == pytest.approx(float(exact_log_odds(w) - exact_log_odds(l)), rel=rtol, abs=20 * rtol)
        assert loss == pytest.approx(float(exact_or_loss(w, l)), rel=20 * rtol, abs=20 * rtol)


def test_loss_and_gradient_are_finite_everywhere_in_float32():
    couples = torch.tensor(list(itertools.product(LOGPS_TO_ONE, repeat=2)))
    chosen, rejected = couples.T.clone().requires_grad_().unbind()
    chosen.retain_grad()
    rejected.retain_grad()
    loss, shares = orpo_loss(chosen, rejected, -chosen, beta=0.5, nll_total=len(couples), pairs=len(couples))
    loss.backward()
    for values in (loss, shares, chosen.grad, rejected.grad):
        assert torch.isfinite(values).all()


def test_a_rejected_answer_of_probability_one_is_still_pushed_down():
    chosen, rejected = torch.tensor([-1.0]), torch.tensor([0.0], requires_grad=True)
    odds_ratio_loss(chosen, rejected)[0].sum().backward()
    assert rejected.grad.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("chosen", [-30.0, -5.0, -1.5, -0.7, -0.6, -0.1, -1e-3])
@pytest.mark.parametrize("rejected", [-30.0, -5.0, -0.7, -0.6, -0.1, -1e-3])
def test_the_gradient_is_the_papers_delta_times_h(chosen, rejected):
    """Eq. 8-10 with respect to the two log-probs; what is descended is the negative of the paper's."""
    w, l = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected))  # noqa: E741
    odds_ratio_loss(w, l)[0].sum().backward()
    p_w, p_l = mpmath.exp(chosen), mpmath.exp(rejected)
    delta = 1 / (1 + (p_w / (1 - p_w)) / (p_l / (1 - p_l)))
    assert w.grad.item() == pytest.approx(float(-delta / (1 - p_w)), rel=1e-10, abs=1e-300)
    assert l.grad.item() == pytest.approx(float(delta / (1 - p_l)), rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("tokens", [(1, 1), (7, 3)])
def test_the_size_of_the_gradient_is_that_over_the_tokens_of_both_answers(tokens):
    """The sum of absolute derivatives by autograd; of the NLL, a mean over the chosen answer's tokens, it is 1."""
    for w, l in itertools.product([-5.0, -0.7, -0.1, -1e-3], repeat=2):  # noqa: E741
        sides = [torch.full((n,), x, dtype=torch.float64, requires_grad=True) for n, x in zip(tokens, (w, l))]  # noqa: B905
        means = [side.mean()[None] for side in sides]
        loss, ratio = odds_ratio_loss(*means)
        loss.sum().backward()
        size = sum(side.grad.abs().sum().item() for side in sides)
        assert odds_ratio_gradient(*[mean.detach() for mean in means], ratio.detach()).item() == pytest.approx(size)
        [by_nll] = torch.autograd.grad(-sides[0].mean(), sides[0])
        assert by_nll.abs().sum().item() == pytest.approx(1)


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (-(torch.rand(2, 6, generator=generator, dtype=torch.float64) * 4 + 0.01)).unbind()
    nll = torch.rand(6, generator=generator, dtype=torch.float64)
    inputs = tuple(x.clone().requires_grad_() for x in (chosen, rejected, nll))
    assert torch.autograd.gradcheck(
        lambda w, l, n: orpo_loss(w, l, n, beta=0.3, nll_total=11.0, pairs=6)[0],  # noqa: E741
        inputs,
    )


def test_beta_zero_is_plain_sft_even_where_the_odds_explode():
    chosen = torch.tensor([0.0, -0.5], requires_grad=True)
    rejected = torch.tensor([0.0, -float("inf")], requires_grad=True)
    nll = torch.tensor([0.25, 0.5], requires_grad=True)
    loss, shares = orpo_loss(chosen, rejected, nll, beta=0.0, nll_total=2, pairs=2)
    loss.backward()
    assert loss.item() == pytest.approx(0.375)
    assert chosen.grad is None
    assert rejected.grad is None
    assert nll.grad.tolist() == [0.5, 0.5]
    assert not shares.requires_grad


def test_the_metrics_are_means_over_the_pairs():
    chosen, rejected = torch.tensor([-0.5, -1.0, -2.0, -0.1]), torch.tensor([-1.0, -0.5, -2.5, -3.0])
    loss, shares = orpo_loss(chosen, rejected, torch.tensor([1.0, 2.0, 3.0, 4.0]), beta=0.2, nll_total=4, pairs=4)
    metrics = dict(zip(METRICS, shares.tolist(), strict=True))
    exact = [(w, l, exact_log_odds(w) - exact_log_odds(l)) for w, l in zip(chosen.tolist(), rejected.tolist())]  # noqa: B905, E741
    assert metrics["nll_loss"] == pytest.approx(2.5)
    assert metrics["or_loss"] == pytest.approx(float(sum(exact_or_loss(w, l) for w, l, _ in exact) / 4), rel=1e-6)  # noqa: E741
    assert metrics["log_odds_ratio"] == pytest.approx(float(sum(ratio for *_, ratio in exact) / 4), rel=1e-6)
    assert metrics["accuracy"] == 0.75
    assert metrics["chosen_logps"] == pytest.approx(-0.9)
    assert metrics["rejected_logps"] == pytest.approx(-1.75)
    sizes = [(1 / (1 - mpmath.exp(w)) + 1 / (1 - mpmath.exp(l))) / (1 + mpmath.exp(ratio)) for w, l, ratio in exact]  # noqa: E741
    assert metrics["or_gradient"] == pytest.approx(float(sum(sizes) / 4), rel=1e-6)
    assert loss.item() == pytest.approx(metrics["nll_loss"] + 0.2 * metrics["or_loss"])


@pytest.mark.parametrize("reduction", ["pair", "token"])
@pytest.mark.parametrize("cuts", [[], [1], [5, 6], [2, 3, 9], list(range(1, 12))])
def test_the_shares_of_unequal_micro_batches_add_up_to_the_whole(reduction, cuts):
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(1, 50, (12,), generator=generator)
    chosen, rejected = -torch.rand(2, 12, generator=generator, dtype=torch.float64) * 3
    nll = -chosen if reduction == "pair" else -chosen * counts
    nll_total = 12 if reduction == "pair" else int(counts.sum())

    def loss_shares_and_gradient(bounds):
        leaves = [x.clone().requires_grad_() for x in (chosen, rejected, nll)]
        loss, shares = 0.0, 0.0
        for begin, end in itertools.pairwise(bounds):
            part, share = orpo_loss(*(x[begin:end] for x in leaves), beta=0.4, nll_total=nll_total, pairs=12)
            part.backward()
            loss, shares = loss + part.detach(), shares + share
        return torch.cat([loss[None], shares, *(x.grad for x in leaves)])

    torch.testing.assert_close(loss_shares_and_gradient([0, *cuts, 12]), loss_shares_and_gradient([0, 12]))
    mean = (nll if reduction == "pair" else nll / nll_total * 12).mean()
    assert loss_shares_and_gradient([0, *cuts, 12])[1].item() == pytest.approx(mean.item())
