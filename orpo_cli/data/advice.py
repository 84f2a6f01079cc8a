"""What to write in the recipe for rows that are no preference pairs as they are, going by the columns they have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orpo_cli.data.columns import MISSING, Row, as_number, described, in_our_names, lookup
from orpo_cli.recipe import strict_yaml

# What to write for well-known rows that are no pairs by themselves: the columns that tell them, and the source's keys.
_MAPPINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("instruction", "output.1"),  # LLaMA-Factory's former ranked data, the best answer first
        """\
columns:
  chosen: output.0
  rejected: output.-1""",
    ),
    (
        ("instruction", "completions.0.overall_score"),  # UltraFeedback before it was binarised
        """\
columns:
  prompt: instruction
  chosen: completions[max overall_score].response
  rejected: completions[min overall_score].response""",
    ),
    (
        ("prompt.replies", "message_tree_id"),  # OpenAssistant's trees, of which the first turn is ranked
        """\
columns:
  prompt: prompt.text
  chosen: prompt.replies[min rank].text
  rejected: prompt.replies[max rank].text""",
    ),
    (
        ("prompt", "response", "helpfulness"),  # HelpSteer: a row for each answer, one below the other
        """\
group_by: prompt
columns:
  chosen: rows[max helpfulness].response
  rejected: rows[min helpfulness].response""",
    ),
)

_SOURCE = "write the source in data.train or data.eval as\npath: <as it is>\n"
_PROMPTS = ("prompt", "question", "instruction", "query", "input", "context", "history", "conversations")
_ANSWERS = ("text", "content", "response", "answer", "output", "completion", "generated")
_RATINGS = ("score", "rating", "reward", "rank", "overall", "quality", "helpful", "vote", "preference", "label")
_VERDICTS = ("winner", "better", "best", "prefer", "verdict", "judg", "choice", "label", "vote")
# In pairs of names, the better one first.
_BETTER = (
    *(("chosen", "rejected"), ("chosen", "reject"), ("accepted", "rejected"), ("good", "bad"), ("best", "worst")),
    *(("better", "worse"), ("preferred", "dispreferred"), ("preferred", "rejected"), ("positive", "negative")),
    *(("pos", "neg"), ("winning", "losing"), ("winner", "loser"), ("win", "lose")),
)
# How the names of two answers end, or begin, of which neither is the better one.
_SIDES = (("a", "b"), ("A", "B"), ("1", "2"), ("0", "1"), ("left", "right"))


def advice(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """What to write for rows in which no pair was found, with what `columns` maps already."""
    row = rows[0]
    for told_by, keys in _MAPPINGS:
        if all(lookup(row, column) is not MISSING for column in told_by):
            return _SOURCE + keys
    if {"message_id", "parent_id", "rank"} <= row.keys():
        return "these are single messages: take the file of whole trees that goes with them (.trees.jsonl.gz)"
    for found in (
        wrong_values(row, columns),
        _better_and_worse(row),
        _rated_list(row),
        _two_lists(row),
        _two_sides(rows),
        _rated_rows(rows),
    ):
        if found is not None:
            return found
    prompt = _first(_PROMPTS, [name for name in row if _is_answer(row[name])], strict=True)
    return "name its columns in the recipe; a dot reaches into nested values:\n" + _pair(
        columns.get("prompt", prompt or "<the prompt or the dialogue so far>"),
        "<the preferred response>",
        "<the other one>",
    )


def wrong_values(row: Row, columns: Mapping[str, str]) -> str | None:
    """What to write for a row of the right names with something else in them than texts or messages, or without prompt.

    None where that is not so.
    """
    view = in_our_names(row, columns)
    if not {"chosen", "rejected"} <= view.keys():
        return None
    prompt = next((name for name in ("prompt", "question", "instruction") if name in view), None)
    needed = ({"prompt": prompt} if prompt else {}) | {"chosen": "chosen", "rejected": "rejected"}
    if wrong := [ours for ours, name in needed.items() if not _is_answer(view[name])]:
        said = ", ".join(f"{columns.get(ours, needed[ours])} is {described(view[needed[ours]])}" for ours in wrong)
        written = {ours: columns.get(ours, name) for ours, name in needed.items()}
        for ours in wrong:
            within = _text_within(written[ours], view[needed[ours]])
            written[ours] = within or f"<a column of texts, the {ours} ones>"
        return f"a text, or a list of messages {{role, content}}, is needed where {said}:\n" + _columns(written)
    if not prompt and isinstance(view["chosen"], str) and isinstance(view["rejected"], str):
        prompt = _prompt_of(view, ("chosen", "rejected")) or "<the column that has it>"
        return "two texts do not say what they answer; name the prompt:\n" + _columns({"prompt": prompt})
    return None


def _better_and_worse(row: Row) -> str | None:
    for better, worse in _BETTER:
        for name in row:
            other = name.replace(better, worse)
            if other in row and other != name and _is_answer(row[name]) and _is_answer(row[other]):
                return "if these are the two answers, name them in the recipe:\n" + _pair(
                    _prompt_for(row, name, other), name, other
                )
    return None


def _rated_list(row: Row) -> str | None:
    """For a list of answers, each an object with its rating."""
    for name, items in row.items():
        if not (isinstance(items, list | tuple) and len(items) > 1 and all(isinstance(i, Mapping) for i in items)):
            continue
        answer = _first(_ANSWERS, [key for key, value in items[0].items() if _is_answer(value)])
        ratings = [key for key, value in items[0].items() if as_number(value) is not None and key != answer]
        rating = _first(_RATINGS, ratings)
        if answer and rating and not {"role", "from"} & items[0].keys():
            best, worst = _extremes(rating)
            others = f" ({', '.join(ratings)} are numbers)" if len(ratings) > 1 else ""
            return f"take the best and the worst of {name} by {rating}{others}:\n" + _pair(
                _prompt_for(row, name), f"{name}[{best} {rating}].{answer}", f"{name}[{worst} {rating}].{answer}"
            )
    return None


def _two_lists(row: Row) -> str | None:
    """For answers in a list and, perhaps, their ratings in another one."""
    lists = {name: value for name, value in row.items() if isinstance(value, list | tuple) and len(value) > 1}
    texts = [name for name, value in lists.items() if all(isinstance(item, str) for item in value)]
    answers = _first(_ANSWERS, texts)
    if not answers:
        return None
    numbers = (n for n, v in lists.items() if len(v) == len(lists[answers]) and all(type(i) in (int, float) for i in v))
    if rating := next(numbers, None):
        best, worst = _extremes(rating)
        return f"put each of {answers} and its {rating} into one object, {{text: ..., {rating}: ...}}; then\n" + _pair(
            _prompt_for(row, answers, rating),
            f"{answers}[{best} {rating}].text",
            f"{answers}[{worst} {rating}].text",
        )
    return f"if the first of {answers} is the best one and the last one the worst:\n" + _pair(
        _prompt_for(row, answers), f"{answers}.0", f"{answers}.-1"
    )


def _two_sides(rows: Sequence[Row]) -> str | None:
    """For two answers beside each other, and a verdict which of them is better: two sources of one file."""
    row = rows[0]
    pairs = [pair for pair in _sides_of(row) if _is_answer(row[pair[0]]) and _is_answer(row[pair[1]])]
    if not pairs:
        return None
    first, second = max(pairs, key=lambda pair: len(str(row[pair[0]])))  # answers are longer than names of models
    scalars = [name for name, value in row.items() if isinstance(value, str | int) and name not in (first, second)]
    verdict = next((name for part in _VERDICTS for name in scalars if part in name.lower()), None)
    values = list(dict.fromkeys(row.get(verdict) for row in rows)) if verdict else []

    def source(chosen: str, rejected: str) -> str:
        own = next((value for value in values if _means(value, chosen, rejected)), f"<its value for {chosen}>")
        columns = {"chosen": chosen, "rejected": rejected}
        if (prompt := _prompt_for(row, first, second, verdict or "")) and isinstance(row[first], str):
            columns = {"prompt": prompt, **columns}
        listed = ", ".join(f"{ours}: {_name(theirs)}" for ours, theirs in columns.items())
        said = f"{{column: {_name(verdict or '<the column of the verdict>')}, eq: {_name(own)}}}"
        return f"    - path: <as it is>\n      columns: {{{listed}}}\n      filter: [{said}]"

    shown = f"; {verdict} holds {', '.join(map(json.dumps, values[:5]))}" if verdict else ""
    return (
        f"read the rows twice, once for each answer that may be the better one{shown}:\n"
        f"data:\n  train:\n{source(first, second)}\n{source(second, first)}"
    )


def _rated_rows(rows: Sequence[Row]) -> str | None:
    """For rows of one answer each."""
    row = rows[0]
    answer = _first(_ANSWERS, [name for name, value in row.items() if isinstance(value, str)])
    prompt = _prompt_of(row, (answer or "",))
    rating = _first(_RATINGS, [name for name in row if type(row[name]) in (int, float, bool)], strict=True)
    if not (answer and prompt and rating) or answer == prompt:
        return None
    if isinstance(row[rating], bool):
        return (
            f"each row holds one answer, and {rating} is no rating: make pairs of a true and a false one to one prompt"
        )
    best, worst = _extremes(rating)
    return (
        f"each row holds one answer; where those to one {prompt} stand one below the other, {_SOURCE}"
        f"group_by: {_name(prompt)}\ncolumns:\n"
        + (f"  prompt: {_name(prompt)}\n" if prompt != "prompt" else "")
        + f"  chosen: rows[{best} {rating}].{answer}\n  rejected: rows[{worst} {rating}].{answer}"
    )


# What a column may be


def _text_within(name: str, value: Any) -> str | None:
    """The column of a text that stands within an object or a list."""
    if isinstance(value, Mapping):
        key = _first(_ANSWERS, [key for key, inner in value.items() if _is_answer(inner)], strict=True)
        return f"{name}.{key}" if key else None
    return f"{name}.0" if isinstance(value, list | tuple) and value and isinstance(value[0], str) else None


def _is_answer(value: Any) -> bool:
    """Whether it is a text, a message or a list of messages."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, Mapping) and {"role", "from"} & item.keys() for item in value)
    return isinstance(value, str) or (isinstance(value, Mapping) and bool({"role", "from"} & value.keys()))


def _first(parts: Sequence[str], names: Sequence[str], *, strict: bool = False) -> str | None:
    """The name that holds the earliest of some parts; else the first one, unless `strict`."""
    named = (name for part in parts for name in names if part in name.lower())
    return next(named, None if strict else next(iter(names), None))


def _prompt_of(row: Row, others: Sequence[str]) -> str | None:
    names = [name for name, value in row.items() if _is_answer(value) and name not in others]
    return _first(_PROMPTS, names, strict=len(names) != 1)


def _prompt_for(row: Row, *others: str) -> str:
    return _prompt_of(row, others) or "<the prompt>"


def _sides_of(row: Row) -> Iterator[tuple[str, str]]:
    for one, other in _SIDES:
        for name in row:
            for pattern in (rf"(?<![a-zA-Z0-9]){one}$", rf"^{one}(?![a-zA-Z0-9])", rf"(?<=[a-z]){one}$"):
                twin = re.sub(pattern, other, name)
                if twin != name and twin in row:
                    yield name, twin


def _means(value: Any, name: str, other: str) -> bool:
    """Whether a verdict names this answer and not the other: by its column, or by what tells the two apart."""
    alike = len(next(iter(re.findall(r"^.*[^a-zA-Z0-9]", name)), ""))
    told_apart = name[alike:] if name[:alike] == other[:alike] else name
    said = str(value).lower()
    return said == name.lower() or re.search(rf"(?:^|[^a-z0-9]){re.escape(told_apart.lower())}$", said) is not None


def _extremes(rating: str) -> tuple[str, str]:
    """Which of the numbers the best answer has, and the worst: the first rank is the best."""
    return ("min", "max") if "rank" in rating.lower() else ("max", "min")


# YAML


def _pair(prompt: str, chosen: str, rejected: str) -> str:
    return _columns({"prompt": prompt, "chosen": chosen, "rejected": rejected})


def _columns(columns: Mapping[str, str]) -> str:
    return "data:\n  columns:\n" + "\n".join(f"    {ours}: {_name(theirs)}" for ours, theirs in columns.items())


def _name(value: Any) -> str:
    """A value as a recipe writes it, in quotes where it needs them."""
    plain = isinstance(value, str) and re.fullmatch(r"<[\w ,]+>|\w[\w.-]*(?:\[\w+ [\w.-]+\][\w.-]*)?", value)
    return value if plain and strict_yaml.scalar(value) == value else json.dumps(value, ensure_ascii=False)
