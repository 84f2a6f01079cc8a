"""What a model makes of each pair, and what that says together: the figures of `eval.json`.

Per pair all is computed by the flat-batch engine that trains; everything derived from it is float64 here.
Shapes: N pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orpo_cli.data.batches import flat_batch, nll_positions
from orpo_cli.data.dataset import DROP_REASONS, PairSet
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.errors import is_out_of_memory
from orpo_cli.loss import MAX_LOGP
from orpo_cli.model.logprobs import PairLogprobs, inference
from orpo_cli.recipe import LossSection
from orpo_cli.statistics import (
    bootstrap,
    interval,
    length_controlled_accuracy,
    resampled_means,
    sign_flip_test,
    sign_test,
    wilson,
)

# Pairs whose micro-batches are cut together; bounds the work of packing, not the result.
_WINDOW = 512


@dataclass(frozen=True)
class Scores:
    """What the model says of each pair, in the order of the pairs; all (N,) float64."""

    chosen_logps: np.ndarray  # mean log-prob of a chosen response's token
    rejected_logps: np.ndarray
    nll: np.ndarray  # summed over the pair's `nll_tokens`
    nll_tokens: np.ndarray

    @property
    def log_odds_ratio(self) -> np.ndarray:
        """log odds chosen - log odds rejected (eq. 4) of each pair."""
        return _log_odds(self.chosen_logps) - _log_odds(self.rejected_logps)

    def at(self, places: Sequence[int]) -> Scores:
        """Those of the pairs at these places."""
        return Scores(*(column[places] for column in dataclasses.astuple(self)))


def score_pairs(
    logprobs: PairLogprobs,
    pairs: Sequence[TokenizedPair],
    *,
    nll_tokens: str,
    max_tokens: int,
    device: torch.device,
    may_shrink: bool = False,
) -> Scores:
    """Score pairs without gradients, in micro-batches of at most `max_tokens` flat tokens, or as score_in_parts."""
    columns = np.zeros((4, len(pairs)))
    with inference(logprobs), torch.no_grad():
        for _ in score_in_parts(
            logprobs,
            pairs,
            columns,
            nll_tokens=nll_tokens,
            max_tokens=max_tokens,
            device=device,
            may_shrink=may_shrink,
        ):
            pass
    return Scores(*columns)


def score_in_parts(
    logprobs: PairLogprobs,
    pairs: Sequence[TokenizedPair],
    columns: np.ndarray,
    *,
    nll_tokens: str,
    max_tokens: int,
    device: torch.device,
    may_shrink: bool,
) -> Iterator[int]:
    """Fill the columns (4, N) of Scores a micro-batch at a time, each time yielding the tokens it may have.

    Where `may_shrink`, running out of memory halves those and costs the one micro-batch; it raises what told of it once
    they are down to the longest pair. To be used in inference mode and without gradients.
    """
    place = {id(pair): i for i, pair in enumerate(pairs)}
    for start in range(0, len(pairs), _WINDOW):
        parts = logprobs.micro_batches(pairs[start : start + _WINDOW], max_tokens)
        while parts:
            smaller = None
            try:
                where = [place[id(pair)] for pair in parts[0]]
                columns[:, where] = _score(logprobs, parts[0], nll_tokens, device)
            except (MemoryError, RuntimeError) as error:
                left = [pair for part in parts for pair in part]
                smaller = logprobs.smaller_budget(parts[0], left) if may_shrink and is_out_of_memory(error) else None
                if smaller is None:
                    raise
            if smaller is None:
                parts.pop(0)
                yield max_tokens
            else:
                torch.cuda.empty_cache()  # does nothing where there is no CUDA
                max_tokens, parts = smaller, logprobs.micro_batches(left, smaller)


def _score(logprobs: PairLogprobs, pairs: list[TokenizedPair], nll_tokens: str, device: torch.device) -> np.ndarray:
    """The columns (4, P) of Scores for one micro-batch."""
    batch = flat_batch(pairs, nll_tokens).to(device)
    logps = logprobs(batch)
    values = torch.stack([batch.chosen.means(logps), batch.rejected.means(logps), -batch.nll.sums(logps)])
    return np.vstack([values.cpu().double().numpy(), [len(nll_positions(pair, nll_tokens)) for pair in pairs]])


def _log_odds(logps: np.ndarray) -> np.ndarray:
    """log(P / (1 - P)) in float64, of log-probs clamped as in training (loss.log_odds)."""
    logps = np.minimum(logps, MAX_LOGP)
    return logps - np.log(-np.expm1(logps))


def per_pair_metrics(scores: Scores, loss: LossSection) -> dict[str, np.ndarray]:
    """The quantities whose means over the pairs are reported, each (N,).

    With `nll_reduction: token` a pair's share of the NLL is its summed NLL over the mean number of tokens, so that
    the mean over pairs is the mean over tokens.
    """
    per = scores.nll_tokens if loss.nll_reduction == "pair" else np.maximum(scores.nll_tokens.mean(), 1)
    nll_loss = scores.nll / per
    with np.errstate(invalid="ignore"):  # a model gone bad is reported, not warned about
        or_loss = np.logaddexp(0.0, -scores.log_odds_ratio)
    return {
        "loss": nll_loss + loss.beta * or_loss,
        "nll_loss": nll_loss,
        "or_loss": or_loss,
        "log_odds_ratio": scores.log_odds_ratio,
        "accuracy": (scores.log_odds_ratio > 0).astype(np.float64),
        "chosen_logps": scores.chosen_logps,
        "rejected_logps": scores.rejected_logps,
    }


def summarise(scores: Scores, pairs: Sequence[TokenizedPair], loss: LossSection) -> dict[str, Any]:
    """The figures of `eval.json`: means with bootstrap 95 % intervals, perplexities, accuracy by and without length."""
    columns = per_pair_metrics(scores, loss)
    longer = np.array([chosen - rejected for chosen, rejected in (p.response_tokens for p in pairs)], dtype=np.float64)
    controlled, *ends = length_controlled_accuracy(columns["accuracy"], longer)
    return {
        "pairs": len(pairs),
        **mean_figures(columns),
        "length_controlled_accuracy": controlled,
        "length_controlled_accuracy_ci95": ends,
        "accuracy_by_length": {
            f"chosen_{which}": accuracy_figures(columns["accuracy"][where])
            for which, where in (("shorter", longer < 0), ("equal", longer == 0), ("longer", longer > 0))
        },
    }


def mean_figures(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Means of the columns of `per_pair_metrics` with their intervals, and the perplexities."""
    means, low, high = bootstrap(np.stack(list(columns.values())))
    figures: dict[str, Any] = {}
    for i, name in enumerate(columns):
        figures[name] = float(means[i])
        figures[f"{name}_ci95"] = [float(low[i]), float(high[i])]
        if name in _PERPLEXITIES:  # exp is monotone, so an interval's ends map to ends
            figures[_PERPLEXITIES[name]] = float(_perplexity(means[i]))
            figures[f"{_PERPLEXITIES[name]}_ci95"] = [float(_perplexity(high[i])), float(_perplexity(low[i]))]
    correct = columns["accuracy"]
    if correct.all() or not correct.any():  # resampled, they are all alike again, as if that were certain
        figures["accuracy_ci95"] = accuracy_figures(correct)["accuracy_ci95"]
    return figures


def accuracy_figures(correct: np.ndarray) -> dict[str, Any]:
    """Number of some pairs and their accuracy with its 95 % interval: Wilson's, since they may be few or all alike."""
    if not len(correct):
        return {"pairs": 0, "accuracy": None, "accuracy_ci95": None}
    return {
        "pairs": len(correct),
        "accuracy": float(correct.mean()),
        "accuracy_ci95": list(wilson(int(correct.sum()), len(correct))),
    }


def slices(scores: Scores, places: Mapping[str, np.ndarray], loss: LossSection) -> dict[str, Any]:
    """The figures of each of some groups of pairs."""
    columns = per_pair_metrics(scores, loss)
    return {
        name: {
            **mean_figures({key: column[where] for key, column in columns.items()}),
            **accuracy_figures(columns["accuracy"][where]),
        }
        for name, where in places.items()
    }


def delta(own: Scores, base: Scores, loss: LossSection) -> dict[str, Any]:
    """What the model's figures are above the base's on the same pairs, paired: bootstrap 95 % intervals, and p-values.

    `_p_mcnemar` is McNemar's exact test, `_p_sign_flip` a permutation test of the pairs' differences; both two-sided.
    """
    columns = [np.stack(list(per_pair_metrics(scores, loss).values())) for scores in (own, base)]
    resampled = [resampled_means(column) for column in columns]
    difference = columns[0] - columns[1]
    count = difference.shape[1]
    means, p_values = difference.mean(1), sign_flip_test(difference)
    low, high = interval(resampled[0] - resampled[1], count)
    figures: dict[str, Any] = {"pairs": count}
    for i, name in enumerate(per_pair_metrics(own, loss)):
        figures[name] = float(means[i])
        figures[f"{name}_ci95"] = [float(low[i]), float(high[i])]
        if name == "accuracy":
            figures["accuracy_p_mcnemar"] = sign_test(int((difference[i] > 0).sum()), int((difference[i] < 0).sum()))
        else:
            figures[f"{name}_p_sign_flip"] = float(p_values[i])
        if name in _PERPLEXITIES:
            of_means = [_perplexity(column[i].mean()) for column in columns]
            ends = interval(_perplexity(resampled[0][:, i]) - _perplexity(resampled[1][:, i]), count)
            figures[_PERPLEXITIES[name]] = float(of_means[0] - of_means[1])
            figures[f"{_PERPLEXITIES[name]}_ci95"] = [float(end) for end in ends]
    return figures


_PERPLEXITIES = {"chosen_logps": "chosen_perplexity", "rejected_logps": "rejected_perplexity"}


def _perplexity(logps: Any) -> Any:
    """exp of minus a mean log-prob, at most exp(700), so that it stays a number."""
    return np.exp(np.minimum(-logps, 700.0))


def evaluation_row(scores: Scores, loss: LossSection, step: int, epoch: float) -> dict[str, Any]:
    """The evaluation row of `metrics.jsonl`, without its times."""
    means = {f"eval_{name}": float(values.mean()) for name, values in per_pair_metrics(scores, loss).items()}
    perplexity = float(_perplexity(means["eval_chosen_logps"]))
    return {
        "step": step,
        "epoch": epoch,
        **means,
        "eval_perplexity": perplexity,
        "eval_pairs": len(scores.nll),
    }


def skipped(pairs: PairSet) -> dict[str, int]:
    """Rows that were not scored, by reason."""
    return {reason: pairs.dropped[reason] for reason in DROP_REASONS}


def pair_lines(
    scores: Scores, pairs: Sequence[TokenizedPair], base: Mapping[int, Mapping[str, float]] | None = None
) -> Iterator[Mapping[str, Any]]:
    """One object a pair for `eval.pairs.jsonl`, in the order of the pairs; `base`: pair_figures of another model."""
    for pair, figures in zip(pairs, pair_figures(scores, pairs).values(), strict=True):
        chosen_tokens, rejected_tokens = pair.response_tokens
        yield {
            "index": pair.index,
            **figures,
            "chosen_tokens": chosen_tokens,
            "rejected_tokens": rejected_tokens,
            "prompt_tokens": pair.chosen_start,
            **{f"base_{name}": value for name, value in (base or {}).get(pair.index, {}).items()},
        }


def pair_figures(scores: Scores, pairs: Sequence[TokenizedPair]) -> dict[int, dict[str, float]]:
    """What is written of each pair's scores, by the pair's index."""
    ratios = scores.log_odds_ratio
    return {
        pair.index: {
            "chosen_logps": float(scores.chosen_logps[i]),
            "rejected_logps": float(scores.rejected_logps[i]),
            "log_odds_ratio": float(ratios[i]),
        }
        for i, pair in enumerate(pairs)
    }
