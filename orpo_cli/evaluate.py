"""`orpo eval`: the log-probs of every held-out pair, and what they say together.

Per pair all is computed by the flat-batch engine that trains; everything derived from it is float64 here.
Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from orpo_cli.data.batches import flat_batch, nll_positions
from orpo_cli.data.dataset import DROP_REASONS, PairSet, load_held_out
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.errors import is_out_of_memory
from orpo_cli.files import to_json, to_json_lines, write_file
from orpo_cli.loss import MAX_LOGP
from orpo_cli.malloc import keep_freed_memory
from orpo_cli.model.build import build_for_scoring, context_tokens, load_text_side, pair_tokenizer
from orpo_cli.model.logprobs import PairLogprobs, inference
from orpo_cli.model.memory import scoring_tokens
from orpo_cli.recipe import LossSection, load_recipe
from orpo_cli.run import find_subject

# Pairs whose micro-batches are cut together; bounds the work of packing, not the result.
_WINDOW = 512
_RESAMPLES = 2000


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
    """The figures of `eval.json`: means with bootstrap 95 % intervals, perplexities, length-controlled accuracy."""
    columns = per_pair_metrics(scores, loss)
    means, low, high = bootstrap(np.stack(list(columns.values())))
    figures: dict[str, Any] = {"pairs": len(pairs)}
    for i, name in enumerate(columns):
        figures[name] = float(means[i])
        figures[f"{name}_ci95"] = [float(low[i]), float(high[i])]
        if name in ("chosen_logps", "rejected_logps"):  # exp is monotone, so an interval's ends map to ends
            side = name.removesuffix("_logps")
            figures[f"{side}_perplexity"] = float(np.exp(-means[i]))
            figures[f"{side}_perplexity_ci95"] = [float(np.exp(-high[i])), float(np.exp(-low[i]))]
    longer = np.array([_response_tokens(p)[0] - _response_tokens(p)[1] for p in pairs], dtype=np.float64)
    figures["length_controlled_accuracy"] = length_controlled_accuracy(columns["accuracy"], longer)
    return figures


def evaluation_row(scores: Scores, loss: LossSection, step: int, epoch: float) -> dict[str, Any]:
    """The evaluation row of `metrics.jsonl`, without its times."""
    means = {f"eval_{name}": float(values.mean()) for name, values in per_pair_metrics(scores, loss).items()}
    perplexity = float(np.exp(-means["eval_chosen_logps"]))
    return {
        "step": step,
        "epoch": epoch,
        **means,
        "eval_perplexity": perplexity,
        "eval_pairs": len(scores.nll),
    }


def bootstrap(columns: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means (C,) of columns (C, N) and the ends of their percentile bootstrap 95 % intervals, pairs resampled."""
    generator = np.random.Generator(np.random.PCG64(seed))
    count = columns.shape[1]
    resampled = np.empty((_RESAMPLES, len(columns)))
    for r in range(_RESAMPLES):
        weights = np.bincount(generator.integers(0, count, count), minlength=count)
        resampled[r] = columns @ weights / count
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return columns.mean(1), low, high


def length_controlled_accuracy(correct: np.ndarray, longer: np.ndarray) -> float:
    """Accuracy expected of a pair whose answers are equally long.

    Fits P(correct) = sigmoid(a + b * d), d how many tokens the chosen answer is longer, in standard deviations, by
    Newton's method with a slight ridge (so that separable data has a fit); returns sigmoid(a). As in length-controlled
    AlpacaEval (Dubois et al. 2024, arXiv 2404.04475), "longer" cannot pass for "better".
    """
    spread = longer.std()
    design = np.stack([np.ones_like(longer), longer / spread if spread > 0 else np.zeros_like(longer)])
    weights = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-(weights @ design)))
        gradient = design @ (correct - p) - 1e-2 * weights
        hessian = (design * (p * (1 - p))) @ design.T + 1e-2 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        weights += step
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def skipped(pairs: PairSet) -> dict[str, int]:
    """Rows that were not scored, by reason."""
    return {reason: pairs.dropped[reason] for reason in DROP_REASONS}


def pair_lines(scores: Scores, pairs: Sequence[TokenizedPair]) -> Iterator[Mapping[str, Any]]:
    """One object a pair for `eval.pairs.jsonl`, in the order of the pairs."""
    for i, pair in enumerate(pairs):
        chosen_tokens, rejected_tokens = _response_tokens(pair)
        yield {
            "index": pair.index,
            "chosen_logps": float(scores.chosen_logps[i]),
            "rejected_logps": float(scores.rejected_logps[i]),
            "log_odds_ratio": float(scores.log_odds_ratio[i]),
            "chosen_tokens": chosen_tokens,
            "rejected_tokens": rejected_tokens,
            "prompt_tokens": pair.chosen_start,
        }


def _response_tokens(pair: TokenizedPair) -> tuple[int, int]:
    return len(pair.chosen_ids) - pair.chosen_start, len(pair.rejected_ids) - pair.rejected_start


# ---- the verb ----


def evaluate_target(
    target: str, *, data: str | None = None, recipe_file: Path | None = None, output: Path | None = None
) -> dict[str, Any]:
    """The held-out figures of a run, an adapter or a model; written to `output`, if given, with its pairs beside it.

    A run, and whatever lies in one, is read, rendered and scored as its recipe says; `data` names other pairs.
    Raises InputError kinds where something is missing.
    """
    subject = find_subject(target, load_recipe(recipe_file) if recipe_file else None, data)
    recipe, device = subject.recipe, PartialState().device
    if device.type == "cpu":
        keep_freed_memory()
    context = context_tokens(recipe.model)
    if context is not None and recipe.data.max_length > context:  # longer pairs are skipped and counted
        data_section = recipe.data.model_copy(update={"max_length": context})
        recipe = recipe.model_copy(update={"data": data_section})
    text = load_text_side(recipe, subject.tokenizer)
    pairs = load_held_out(recipe.data, pair_tokenizer(recipe, text), recipe.train)
    built = build_for_scoring(recipe.model, text, device, adapter=subject.adapter)
    listed = pairs.in_source_order()
    scores = score_pairs(
        built.logprobs,
        listed,
        nll_tokens=recipe.loss.nll_tokens,
        max_tokens=scoring_tokens(built.logprobs, recipe),
        device=device,
        may_shrink=recipe.train.max_tokens_per_microbatch == "auto",
    )
    figures = {**summarise(scores, listed, recipe.loss), "skipped": skipped(pairs)}
    if output is not None:
        write_file(output, to_json(figures))
        write_file(output.with_suffix(".pairs.jsonl"), to_json_lines(pair_lines(scores, listed)))
    return figures
