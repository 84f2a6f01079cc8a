"""`orpo data`: what is in a recipe's pairs, what becomes of them, and what of it deserves attention."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from orpo_cli.data.batches import nll_positions
from orpo_cli.data.dataset import PairSet, faulty_rows, load_pairs
from orpo_cli.data.formats import Drop
from orpo_cli.data.pairs import PairReader
from orpo_cli.data.statistics import ALIKE, KeyFile, SetStatistics
from orpo_cli.data.templates import CONTROL_LOOK, control_pattern, special_tokens
from orpo_cli.data.tokenize import PairTokenizer, TokenizedPair
from orpo_cli.errors import DataError, ModelError
from orpo_cli.model.build import TextSide, context_tokens, open_text_and_data, pair_tokenizer
from orpo_cli.recipe import Recipe
from orpo_cli.recipe.gather import Faults
from orpo_cli.terminal import say

POLICIES = ("drop", "truncate_prompt", "truncate_response")
_PROGRESS_ROWS = 50_000
# Shares of the pairs, or of an interval's end, from which on something is warned of.
_FEW, _SOME, _LONGER = 0.01, 0.05, 0.6

_TUNED_NAME = re.compile(r"(?:^|[-_.])(instruct|it|chat|sft|dpo|orpo|rlhf|kto|simpo)(?:$|[-_.\d])", re.IGNORECASE)
_BASE_NAME = re.compile(r"(?:^|[-_.])(base|pt)(?:$|[-_.])", re.IGNORECASE)


@dataclass(frozen=True)
class Data:
    """A recipe's pairs as `orpo train` would use them, except that no row stops it."""

    recipe: Recipe
    text: TextSide
    tokenise: PairTokenizer
    training: PairSet
    held_out: PairSet | None

    def sets(self) -> dict[str, PairSet]:
        """`train`, and `eval` where there is a held-out set."""
        return {"train": self.training} | ({"eval": self.held_out} if self.held_out else {})


def open_data(recipe: Recipe) -> Data:
    """Open a recipe's data. Raises DataError when no pair can be used, ModelError where the tokenizer is missing."""
    faults = Faults(recipe)
    text, sources = open_text_and_data(recipe, faults)
    faults.raise_any()
    assert text is not None
    policy = "drop" if recipe.data.overlong == "error" else recipe.data.overlong
    tokenise = pair_tokenizer(recipe, text).under(policy)
    section = recipe.data.model_copy(update={"max_dropped": 1.0, "strict": False})
    # With max_steps a stream need not be counted before it is read.
    with faults.at("data"):
        training, held_out = load_pairs(
            section, tokenise, recipe.train.model_copy(update={"max_steps": 1}), say, sources
        )
    faults.raise_any()
    return Data(recipe, text, tokenise, training, held_out)


def kept_pairs(pairs: PairSet) -> Iterator[TokenizedPair]:
    """A set's pairs in the source's order; of a stream, one after the other."""
    if pairs.held is not None:
        yield from pairs.in_source_order()
        return
    for index, _, result in pairs.reader.read():
        if isinstance(result, TokenizedPair) and pairs.includes(index):
            yield result


def pair_at(pairs: PairSet, index: int) -> TokenizedPair:
    """The pair at a position. Raises DataError, with the reason, where the set has none there."""
    position, _, result = next(pairs.reader.read(index), (None, None, None))
    if position != index or index < 0:
        raise DataError(f"there is no row {index}", "rows count from 0, over all sources")
    where = pairs.reader.where(index)
    if isinstance(result, Drop):
        raise DataError(f"row {index} is no pair of this set: {where} is dropped as {result}", None)
    if result is None or not pairs.includes(index):
        raise DataError(f"row {index} is no pair of this set", "it is a duplicate, or in the other set (--held-out)")
    return result


def pair_object(pair: TokenizedPair) -> dict[str, Any]:
    """A pair for programs: prompt and chosen ids together are the chosen side, and so is it with the rejected ones.

    Where a token reaches across the end of the prompt, the rejected side's prompt may be another: it is then given too.
    """
    prompt, rejected_prompt = pair.chosen_ids[: pair.chosen_start], pair.rejected_ids[: pair.rejected_start]
    row: dict[str, Any] = {
        "index": pair.index,
        "prompt_ids": prompt.tolist(),
        "chosen_ids": pair.chosen_ids[pair.chosen_start :].tolist(),
        "rejected_ids": pair.rejected_ids[pair.rejected_start :].tolist(),
    }
    if rejected_prompt.tolist() != row["prompt_ids"]:
        row["rejected_prompt_ids"] = rejected_prompt.tolist()
    return row


def pair_pieces(pair: TokenizedPair, text: TextSide, nll_tokens: str) -> dict[str, list[tuple[str, bool, bool]]]:
    """Each side's tokens as (text, in the NLL, in the odds ratio)."""
    in_nll = set(nll_positions(pair, nll_tokens).tolist())
    sides = {"chosen": (pair.chosen_ids, pair.chosen_start), "rejected": (pair.rejected_ids, pair.rejected_start)}
    return {
        side: [
            (piece, side == "chosen" and i in in_nll, i >= start)
            for i, piece in enumerate(token_texts(text.tokenizer, ids.tolist()))
        ]
        for side, (ids, start) in sides.items()
    }


# The bytes that stand behind the characters in which GPT-2 and its like write their tokens.
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; bytes of a character that several tokens share are written `<0xE2>`."""
    decode = tokenizer.decode
    texts = []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        if "\ufffd" in decode(ids[i : i + 1]):
            texts.append(_bytes_shown(token))
        else:  # what it adds to the one before it: decoded alone, many a token would lose its leading blank
            texts.append(decode(ids[max(0, i - 1) : i + 1]).removeprefix(decode(ids[i - 1 : i])))
    return texts


def _bytes_shown(token: str) -> str:
    """The text of a token of bytes, those that are no whole character as hexadecimal numbers; another one's name."""
    if not all(character in _BYTES for character in token) or re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return token
    text = bytes(map(_BYTES.__getitem__, token)).decode("utf-8", "surrogateescape")
    return re.sub("[\udc80-\udcff]", lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)


# Statistics


def summarise(data: Data) -> dict[str, Any]:
    """All that `orpo data` counts, as JSON holds it. Reads the data once more, row by row."""
    keys, section = KeyFile(), data.recipe.data
    controls = control_pattern([*special_tokens(data.text.tokenizer), *data.text.template.control_tokens], CONTROL_LOOK)
    counted = {
        name: SetStatistics(keys, pairs.reader.where, controls, held_out=name == "eval")
        for name, pairs in data.sets().items()
    }
    if data.held_out is not None and data.held_out.reader is not data.training.reader:
        _count(data, data.held_out, {"eval": data.held_out}, counted)
        _count(data, data.training, {"train": data.training}, counted)
    else:
        _count(data, data.training, data.sets(), counted)

    summary: dict[str, Any] = {
        "model": data.recipe.model.name_or_path,
        "template": data.text.template.name,
        "end_of_turn": data.text.template.end_of_turn,
        "added_tokens": data.text.added_tokens,
        **{key: getattr(section, key) for key in ("max_length", "max_prompt_length", "overlong")},
        "train": None,
        "eval": None,
        "overlap": None,
    }
    for name, pairs in data.sets().items():
        sources = [
            {**said, "why": source.format.why}
            for said, source in zip(pairs.summary()["sources"], pairs.reader.sources, strict=True)
        ]
        rows = sum(counted[other].rows for other, of in data.sets().items() if of.reader is pairs.reader)
        summary[name] = {"sources": sources, **counted[name].summary(), "rows": rows, "held_out": pairs.held_out}
    if data.held_out is not None:
        summary["overlap"] = keys.overlap(data.training.reader.where, data.held_out.reader.where)
    return summary | {"warnings": list(_warnings(data, summary))}


def _count(data: Data, pairs: PairSet, sets: Mapping[str, PairSet], counted: Mapping[str, SetStatistics]) -> None:
    """Count the rows of one reader, each in its set of `sets`; what is dropped belongs to the first."""
    [first, *_] = sets
    policies = {policy: data.tokenise.under(policy) for policy in POLICIES}
    whole_pairs = data.tokenise.under("drop", limited=False)
    known = {i: pair for of in sets.values() for i, pair in (of.held or {}).items() if not pair.truncated}
    reader = PairReader(pairs.reader.sources, pairs.reader.section, whole_pairs, known)
    for index, pair, whole in reader.read():
        if index and not index % _PROGRESS_ROWS:
            say(f"{index:,} rows read")
        if pair is None:
            assert isinstance(whole, Drop)
            counted[first].drop(index, whole)
            continue
        name = next((name for name, of in sets.items() if of.includes(index)), first)
        if isinstance(whole, Drop):
            [found] = data.tokenise.batch([(index, pair)])  # by the recipe, it may be too long in the first place
            counted[name].drop(index, found if isinstance(found, Drop) else whole)
            continue
        outcomes = {policy: tokenise.fit(pair, whole) for policy, tokenise in policies.items()}
        used = outcomes[data.tokenise.overlong]
        if isinstance(used, TokenizedPair) and not sets[name].includes(index):
            counted[name].drop(index, Drop("duplicate", "the same pair occurred before"))
            continue
        counted[name].measure(whole, outcomes)
        if isinstance(used, Drop):
            counted[name].drop(index, used)
        else:
            counted[name].keep(index, pair, whole, used)


# Warnings: what was found, and what to do about it


def _warnings(data: Data, summary: Mapping[str, Any]) -> Iterator[str]:
    yield from _of_model(data)
    for name, said in (("train", "training"), ("eval", "held-out")):
        if summary[name]:
            yield from _of_rows(data, summary[name], said)
            yield from _of_lengths(data, summary[name], said)
            yield from _of_pairs(data, summary[name], said)
    overlap = summary["overlap"]
    if overlap and overlap["prompts"]:
        yield (
            f"{overlap['prompts']:,} of {summary['eval']['pairs']:,} held-out pairs have a prompt that is trained on, "
            f"{overlap['pairs']:,} of them with the same answers: their figures flatter. Take the held-out pairs from "
            "the training data by prompt (data.eval: {holdout: 0.02}), or remove these from one side"
        )


def _of_model(data: Data) -> Iterator[str]:
    model, name = data.recipe.model, data.recipe.model.name_or_path.rstrip("/").rpartition("/")[2]
    advice = "ORPO teaches a base model to answer and to prefer at once: name the base that it came from"
    if tuned := _TUNED_NAME.search(name):
        yield f"{model.name_or_path} is an instruct model, going by {tuned[1]!r} in its name. {advice}"
    elif data.text.brought_template and not _BASE_NAME.search(name):
        yield (
            f"the tokenizer of {model.name_or_path} brings a chat template, as those of instruct models do and of few "
            f"bases. If this is one: {advice}"
        )
    try:
        context = context_tokens(model)
    except ModelError:  # a tokenizer alone is enough to look at data
        context = None
    if context is not None and data.recipe.data.max_length > context:
        yield (
            f"data.max_length is {data.recipe.data.max_length:,}, and the context of the model {context:,} tokens: "
            f"`orpo train` refuses that. Set data.max_length: {context} or less"
        )


def _of_rows(data: Data, found: Mapping[str, Any], said: str) -> Iterator[str]:
    section, dropped = data.recipe.data, found["dropped"]
    faulty, rows = faulty_rows(dropped, found["rows"])
    share = faulty / rows if rows else 0.0
    if share > section.max_dropped / 10:
        refusal = "which `orpo train` refuses" if share > section.max_dropped else "and the limit"
        yield (
            f"{share:.0%} of the {said} rows are dropped, {refusal} (data.max_dropped: {section.max_dropped:g}). Mend "
            "the rows, map the columns (data.columns), or raise it"
        )
    if section.strict and dropped.get("malformed"):
        yield "data.strict is true: `orpo train` stops at the first malformed row. Mend it, or set data.strict: false"
    duplicates = found["duplicates"]
    if duplicates["pairs"] > _FEW * found["pairs"]:
        yield f"{_of(duplicates['pairs'], found, said)} occurred before. Set data.deduplicate: true"
    if duplicates["swapped"]:
        yield (
            f"{_of(duplicates['swapped'], found, said)} contradict another, which has the same answers the other way "
            "round. Remove the pairs on which the judges disagree"
        )


def _of_lengths(data: Data, found: Mapping[str, Any], said: str) -> Iterator[str]:
    section, tokens = data.recipe.data, found["tokens"]["pair"]
    long = found["overlong"].get("drop", {}).get("dropped", 0)
    if long and section.overlong == "error":
        yield (
            f"{long:,} {said} pairs are too long, and data.overlong is error: `orpo train` stops at the first. Set "
            f"data.max_length: {tokens['max']}, or data.overlong: drop"
        )
    elif long > _FEW * sum(found["overlong"]["drop"].values()) and section.overlong != "truncate_prompt":
        becomes = "dropped" if section.overlong == "drop" else "cut short, so that they teach no end"
        yield (
            f"{long:,} {said} pairs are too long and are {becomes}. data.max_length: {tokens['p99']} keeps 99 % of the "
            "pairs whole, data.overlong: truncate_prompt keeps the answers"
        )
    bias = found["length_bias"]
    low, high = bias["share_ci95"] or (0.5, 0.5)
    if low > _LONGER or high < 1 - _LONGER:
        longer = "longer" if low > _LONGER else "shorter"
        rate = bias["share"] if low > _LONGER else 1 - bias["share"]
        yield (
            f"the {longer} answer is the chosen one in {rate:.0%} of the {said} pairs: length will pass for quality. "
            "Judge by length_controlled_accuracy (eval.json), and balance the pairs, say by a filter"
        )


def _of_pairs(data: Data, found: Mapping[str, Any], said: str) -> Iterator[str]:
    raw = data.text.template.source is None
    if found["alike"]["pairs"] > _SOME * found["pairs"]:
        yield (
            f"the answers of {_of(found['alike']['pairs'], found, said)} hardly differ (similarity {ALIKE:g} or more): "
            "the odds ratio teaches nothing there. Leave them out, or train without (loss.beta: 0)"
        )
    if found["templated"]["pairs"] and not raw:
        yield (
            f"{_of(found['templated']['pairs'], found, said)} hold a text that is templated already, within the "
            "template's own turns. Give the bare texts, or whole strings with model.chat_template: none"
        )
    if found["repeats_prompt"]["pairs"] > _FEW * found["pairs"]:
        yield (
            f"an answer of {_of(found['repeats_prompt']['pairs'], found, said)} begins with its prompt. Cut that off, "
            "unless the model is to repeat its prompts"
        )
    if found["special_tokens"]["pairs"]:
        meaning = "they become control tokens" if raw else "they stay text, as data.train has them"
        yield (
            f"{_of(found['special_tokens']['pairs'], found, said)} hold what looks like special tokens "
            f"({' '.join(list(found['special_tokens']['names'])[:5])}): {meaning}. Take them out if they are "
            "left over from a template"
        )
    if found["odd_unicode"]["pairs"] > _FEW * found["pairs"]:
        yield (
            f"{_of(found['odd_unicode']['pairs'], found, said)} hold odd characters "
            f"({', '.join(found['odd_unicode']['names'])}). Look at the examples; clean the texts, or filter these rows"
        )


def _of(count: int, found: Mapping[str, Any], said: str) -> str:
    return f"{count:,} {said} pairs ({count / found['pairs']:.1%})"
