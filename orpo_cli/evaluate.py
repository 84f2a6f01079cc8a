"""`orpo eval`: a model scored on held-out pairs, beside its base, by groups, and by its answers."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
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
from orpo_cli.data.dataset import load_held_out
from orpo_cli.data.formats import Pair, Row, column_values
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.errors import DataError
from orpo_cli.files import to_json, to_json_lines, write_file
from orpo_cli.generate import Sampling, Speaker
from orpo_cli.malloc import keep_freed_memory
from orpo_cli.model.budget import scoring_tokens
from orpo_cli.model.build import TextSide, build_for_scoring, context_tokens, load_text_side, pair_tokenizer
from orpo_cli.model.load import classifier_section, load_classifier, load_tokenizer
from orpo_cli.recipe import LossSection, Recipe, load_recipe
from orpo_cli.scores import (
    Scores,
    delta,
    pair_figures,
    pair_lines,
    score_pairs,
    skipped,
    slices,
    summarise,
)
from orpo_cli.statistics import groups
from orpo_cli.subject import Subject, find_subject, require_there

# Values of a column that pairs are grouped by.
MAX_SLICES = 100


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
