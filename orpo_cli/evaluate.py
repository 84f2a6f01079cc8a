"""`orpo eval`: the log-probs of every held-out pair, and what they say together.

Per pair all is computed by the flat-batch engine that trains; everything derived from it is float64 here.
Shapes: N pairs.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from orpo_cli.answers import (
    Answer,
    Judge,
    Question,
    alpaca_eval,
    answer_all,
    describe,
    questions,
    require_judgeable,
    rewards,
    side_by_side,
    win_rates,
)
from orpo_cli.data.batches import flat_batch, nll_positions
from orpo_cli.data.dataset import DROP_REASONS, PairSet, load_held_out
from orpo_cli.data.formats import Pair, Row, column_values
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.errors import DataError, is_out_of_memory
from orpo_cli.files import to_json, to_json_lines, write_file
from orpo_cli.generate import Sampling, Speaker
from orpo_cli.loss import MAX_LOGP
from orpo_cli.malloc import keep_freed_memory
from orpo_cli.model.build import TextSide, build_for_scoring, context_tokens, load_text_side, pair_tokenizer
from orpo_cli.model.load import classifier_section, load_classifier, load_tokenizer
from orpo_cli.model.logprobs import PairLogprobs, inference
from orpo_cli.model.memory import scoring_tokens
from orpo_cli.recipe import LossSection, Recipe, load_recipe
from orpo_cli.statistics import (
    bootstrap,
    groups,
    interval,
    length_controlled_accuracy,
    resampled_means,
    sign_flip_test,
    sign_test,
    wilson,
)
from orpo_cli.subject import Subject, find_subject, require_there

# Values of a column that pairs are grouped by.
MAX_SLICES = 100
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
    longer = np.array([int.__sub__(*p.response_tokens) for p in pairs], dtype=np.float64)
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


# ---- the verb ----


@dataclass(frozen=True)
class Extras:
    """What `orpo eval` is asked for beside the figures of the pairs."""

    base: str | None = None
    """A run, an adapter or a model to compare with."""
    by: Sequence[str] = ()
    """Columns of the data whose values the pairs are grouped by."""
    samples: int | None = None
    """How many prompts are answered; None: none, or all where answers are judged or written."""
    judge: str | None = None
    """A reward model."""
    answers: Path | None = None
    """The file for the answers in AlpacaEval's shape."""
    max_new_tokens: int = 256

    @property
    def wants_answers(self) -> bool:
        """Whether prompts are to be answered."""
        return bool(self.samples or self.judge or self.answers)


def figure_names(extras: Extras) -> set[str]:
    """The outermost names of the figures of `evaluate_target`, found by summarising a made-up pair."""
    asked = {
        "slices": extras.by,
        "base": extras.base,
        "delta": extras.base,
        "answers": extras.wants_answers,
        "samples": extras.samples,
        "judge": extras.judge,
    }
    pair = TokenizedPair(0, np.arange(2), np.arange(2), 1, 1, None)
    figures = summarise(Scores(*np.full((4, 1), -1.0)), [pair], LossSection())
    return {*figures, "skipped", *(name for name, wanted in asked.items() if wanted)}


@dataclass(frozen=True)
class Contestant:
    """A model that is to be scored and asked, not loaded yet, and how it reads."""

    recipe: Recipe
    """`model` names it; longer pairs than its context holds are left out."""
    text: TextSide
    adapter: Path | None

    @staticmethod
    def of(subject: Subject, like: Contestant | None = None) -> Contestant:
        """The model that a verb was pointed at; it reads with the tokens of `like` where it knows all of them.

        Then both are scored on the same tokens, and what the base has not been taught is as before training.
        """
        recipe, context = subject.recipe, context_tokens(subject.recipe.model)
        if context is not None and recipe.data.max_length > context:
            section = recipe.data.model_copy(update={"max_length": context})
            recipe = recipe.model_copy(update={"data": section})
        text = load_text_side(recipe, subject.tokenizer)
        if like is not None:
            own, known = text.tokenizer.get_vocab().items(), like.text.tokenizer.get_vocab().items()
            same = text.fingerprints() == like.text.fingerprints() if subject.adapter else own <= known
            text = like.text if same else text
        return Contestant(recipe, text, subject.adapter)

    def pairs(self, rows: Iterable[tuple[int, Pair]]) -> list[TokenizedPair]:
        """Those of some pairs that fit it, by its own tokens."""
        tokenised = pair_tokenizer(self.recipe, self.text).batch(list(rows))
        return [pair for pair in tokenised if isinstance(pair, TokenizedPair)]

    def examine(
        self, pairs: Sequence[TokenizedPair], asked: Sequence[Question], max_new_tokens: int
    ) -> tuple[Scores, list[Answer]]:
        """Load the model, score the pairs, and let it answer."""
        gc.collect()  # another model, if one was loaded
        torch.cuda.empty_cache()
        recipe, device = self.recipe, PartialState().device
        built = build_for_scoring(recipe.model, self.text, device, adapter=self.adapter)
        scores = score_pairs(
            built.logprobs,
            pairs,
            nll_tokens=recipe.loss.nll_tokens,
            max_tokens=scoring_tokens(built.logprobs, recipe),
            device=device,
            may_shrink=recipe.train.max_tokens_per_microbatch == "auto",
        )
        speaker = Speaker(built.base, self.text, None, Sampling(max_new_tokens))
        return scores, answer_all(speaker, asked, pairs)


def find_base(name: str, subject: Subject) -> Subject:
    """What is to be compared with a subject: another run or adapter as it is, a model as the subject uses its base."""
    found, model = find_subject(name, None, None, scores=False), subject.recipe.model
    if found.adapter is not None:
        model = found.recipe.model
    elif name != model.name_or_path:  # code is trusted of one repository, not of others
        changes = {"name_or_path": found.recipe.model.name_or_path, "revision": "main", "trust_remote_code": False}
        model = model.model_copy(update=changes)
    return Subject(subject.recipe.model_copy(update={"model": model}), found.adapter, found.tokenizer)


def evaluate_target(
    target: str,
    *,
    data: str | None = None,
    recipe_file: Path | None = None,
    output: Path | None = None,
    extras: Extras | None = None,
) -> dict[str, Any]:
    """The held-out figures of a run, an adapter or a model; written to `output`, if given, with its pairs beside it.

    A run, and whatever lies in one, is read, rendered and scored as its recipe says; `data` names other pairs.
    Raises InputError kinds where something is missing.
    """
    extras = extras or Extras()
    device = PartialState().device
    if device.type == "cpu":
        keep_freed_memory()
    subject = find_subject(target, load_recipe(recipe_file) if recipe_file else None, data)
    for option, name in (("--base", extras.base), ("--judge", extras.judge)):
        if name is not None:
            require_there(name, option)
    model = Contestant.of(subject)
    base = None if extras.base is None else Contestant.of(find_base(extras.base, subject), like=model)
    judge = None if extras.judge is None else classifier_section(extras.judge)
    loss, recipe = model.recipe.loss, model.recipe
    pairs = load_held_out(recipe.data, pair_tokenizer(recipe, model.text), recipe.train)
    listed = pairs.in_source_order()
    rows = list(pairs.reader.rows_at([pair.index for pair in listed])) if extras != Extras() else []
    texts = [(index, pair) for index, _, pair in rows]
    grouped = {column: grouped_by(column, [row for _, row, _ in rows]) for column in extras.by}
    theirs = listed
    if base is not None and (base.text is not model.text or base.recipe.data.max_length != recipe.data.max_length):
        theirs = base.pairs(texts)
    own_at, base_at = shared_places(listed, theirs)
    asked = questions([texts[i] for i in own_at], extras.samples) if extras.wants_answers else []
    if judge is not None:
        require_judgeable(load_tokenizer(judge), asked)

    scores, said = model.examine(listed, asked, extras.max_new_tokens)
    figures = {**summarise(scores, listed, loss), "skipped": skipped(pairs)}
    answers, of_base = {"model": said}, None
    if grouped:
        figures["slices"] = {column: slices(scores, places, loss) for column, places in grouped.items()}
    if base is not None:
        base_scores, answers["base"] = base.examine(theirs, asked, extras.max_new_tokens)
        figures["base"] = {"model": extras.base, **summarise(base_scores, theirs, loss)}
        figures["delta"] = delta(scores.at(own_at), base_scores.at(base_at), loss)
        of_base = pair_figures(base_scores, theirs)
    if asked:
        figures["answers"] = {"max_new_tokens": extras.max_new_tokens, **describe(answers, asked)}
    if extras.samples:
        figures["samples"] = side_by_side(answers, asked)
    if judge is not None:
        found = rewards(Judge(*load_classifier(judge, device)), answers, asked)
        figures["judge"] = {"model": extras.judge, **win_rates(found)}
    if extras.answers is not None:
        write_file(extras.answers, to_json(alpaca_eval(said, asked, generator=target)))
    if output is not None:
        write_file(output, to_json(figures))
        if output.is_file():  # nothing lies beside a device or a pipe
            write_file(output.with_suffix(".pairs.jsonl"), to_json_lines(pair_lines(scores, listed, of_base)))
    return figures


def grouped_by(column: str, rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The places of the rows of each value of a column. Raises DataError where it is not there, or groups nothing."""
    found = groups(column_values(rows, column, "--by"))
    if len(found) > MAX_SLICES:
        raise DataError(
            f"--by {column}: it has {len(found):,} different values", f"name a column of {MAX_SLICES} at most"
        )
    return found


def shared_places(own: Sequence[TokenizedPair], other: Sequence[TokenizedPair]) -> tuple[list[int], list[int]]:
    """Where the pairs that two lists have in common, by index, stand in each. Raises DataError if there are none."""
    place = {pair.index: i for i, pair in enumerate(other)}
    shared = [(i, place[pair.index]) for i, pair in enumerate(own) if pair.index in place]
    if not shared:
        raise DataError("--base: none of the pairs fits its context", "name a base with the context of the model")
    return [i for i, _ in shared], [j for _, j in shared]
