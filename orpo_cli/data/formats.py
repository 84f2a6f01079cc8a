"""The shape of a row -> `Pair`: what the data says, before any template or tokenizer sees it.

`recognise` looks at the first rows of a source and says where prompt and responses stand; `read_pair` reads
one row accordingly. Values are read by their own type: a row of messages among rows of strings is no trouble.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from orpo_cli.data.advice import advice
from orpo_cli.data.columns import MISSING, TIED, Row, as_number, described, in_our_names, is_null, lookup
from orpo_cli.errors import DataError


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """One preference: a prompt, the answer that was preferred and the one that was not.

    `prompt` is a string only where the row holds strings (rendered as one user turn, or taken raw under the
    template `none`). `chosen` and `rejected` are the text of the last assistant turn as in the data. `system`
    is a string row's own system text; a dialogue holds its system turn as its first message.
    """

    prompt: tuple[Message, ...] | str
    chosen: str
    rejected: str
    system: str | None = None


class Drop(Exception):  # noqa: N818 - it drops a row, which is no error
    """A row that cannot be used; the run counts it under `reason` and goes on.

    Reasons: empty, identical, diverged, overlong, malformed, filtered, duplicate.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


# Recognising rows


@dataclass(frozen=True)
class Verdict:
    """A column that says which of two answers is better, by a number: one of `first`, `second` or `tie`."""

    column: str
    first: tuple[int, ...]
    second: tuple[int, ...]
    tie: tuple[int, ...] = ()


@dataclass(frozen=True)
class Format:
    """Where a source's rows keep the pair, in our names (after the recipe's `columns`).

    `prompt` names the columns that make the prompt, joined by a blank line; none where whole dialogues stand
    in `chosen` and `rejected`. `dialogue_text`: dialogues are text, "Human: ... Assistant: ...".
    `repeats_prompt`: the responses begin with their prompt, which is cut off. `verdict`: says of each row whether
    `chosen` and `rejected` are what they are called, or the other way round.
    """

    name: str
    why: str
    prompt: tuple[str, ...]
    chosen: str = "chosen"
    rejected: str = "rejected"
    dialogue_text: bool = False
    repeats_prompt: bool = False
    verdict: Verdict | None = None


_STRENGTH = {"first": (-3, -2, -1), "second": (1, 2, 3), "tie": (0,)}

# In the order in which they are tried; any of these columns may hold text, one message or a list of messages.
_LAYOUTS = (
    Format("prompt", "strings or messages", ("prompt",)),
    Format("alpaca", "instruction, and an input where there is one", ("instruction", "input")),
    Format("question", "strings or messages", ("question",)),
    Format("sharegpt", "the dialogue so far, and two answers", ("conversations",)),
    Format("input", "strings or messages", ("input",)),
    Format("paired", "two responses, the preferred one first", ("question",), "response_j", "response_k"),
    *(  # SHP, HelpSteer2 and HelpSteer3
        Format("judged", "two responses, and which is better", (prompt,), first, second, verdict=verdict)
        for prompt, first, second, verdict in (
            ("history", "human_ref_A", "human_ref_B", Verdict("labels", first=(1,), second=(0,))),
            ("prompt", "response_1", "response_2", Verdict("preference_strength", **_STRENGTH)),
            ("context", "response1", "response2", Verdict("overall_preference", **_STRENGTH)),
        )
    ),
    Format("messages", "whole dialogues; what they have in common is the prompt", ()),
    Format("hh", 'whole dialogues as text, "Human: ... Assistant: ..."', (), dialogue_text=True),
)

FORMATS: tuple[str, ...] = tuple(dict.fromkeys(layout.name for layout in _LAYOUTS))
"""What `data.format` may name, besides `auto`."""

COLUMNS: tuple[str, ...] = ("prompt", "chosen", "rejected", "system", "instruction", "input")
"""Our names, which `columns` may map to others."""


def recognise(rows: Sequence[Row], columns: Mapping[str, str] | None = None, name: str = "auto") -> Format:
    """Find the shape of a source from its first rows: the one that fits most of them.

    `columns` maps our names to the rows' own and wins over what is there by itself; `name` is `data.format`.
    Raises `DataError`, showing a row and the mapping to write, where no shape fits.
    """
    columns = columns or {}
    if not rows:
        raise DataError("the data has no readable row")
    _check_mapping(rows, columns)
    allowed = [layout for layout in _LAYOUTS if name in ("auto", layout.name)]
    if not columns.keys().isdisjoint(("chosen", "rejected")):
        allowed = [layout for layout in allowed if (layout.chosen, layout.rejected) == ("chosen", "rejected")]
    # A layout whose prompt the recipe maps goes before those that are found by their usual names.
    allowed.sort(key=lambda layout: columns.keys().isdisjoint(layout.prompt))
    fitting: dict[Format, list[Row]] = {}
    for view in (in_our_names(row, columns) for row in rows):
        if layout := next((layout for layout in allowed if _fits(layout, view)), None):
            fitting.setdefault(layout, []).append(view)
    if fitting:
        best = max(fitting, key=lambda layout: len(fitting[layout]))
        return _completed(best, fitting[best])
    asked = "" if name == "auto" else f" of the format {name!r}"
    raise DataError(
        f"no preference pair{asked} is recognised in these rows; the first one is\n{show_row(rows[0])}",
        advice(rows, columns) if name == "auto" else _advice_without(name, rows, columns),
    )


def _advice_without(name: str, rows: Sequence[Row], columns: Mapping[str, str]) -> str | None:
    try:
        other = recognise(rows, columns).name
    except DataError as error:
        return error.hint
    return f"leave data.format out: without it, they are read as {other!r}"


def _check_mapping(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Raise `DataError` for a mapping that no row can satisfy."""
    for ours, theirs in columns.items():
        if ours not in COLUMNS:
            raise DataError(f"columns: {ours!r} is not one of our names", "they are " + ", ".join(COLUMNS))
        _check_column(rows, theirs, f"columns.{ours}")


def _check_column(rows: Sequence[Row], column: str, where: str) -> None:
    if all(lookup(row, column) is MISSING for row in rows):
        known = ", ".join(dict.fromkeys(key for row in rows for key in row))
        raise DataError(f"{where}: the data has no column {column!r}", f"it has {known}")


def _fits(layout: Format, view: Row) -> bool:
    """Whether a row has the layout's columns, and in them what could be text or messages."""
    needed = {*layout.prompt, layout.chosen, layout.rejected}
    if layout.verdict and layout.verdict.column not in view:
        return False
    if layout.name == "alpaca":
        needed.remove("input")
    if not all(isinstance(view.get(column), (str, list, tuple, Mapping)) for column in needed):
        return False
    sides = (view[layout.chosen], view[layout.rejected])
    if layout.dialogue_text:
        return all(_is_dialogue(side) for side in sides)
    # Two texts alone do not say what they answer.
    return bool(layout.prompt) or not any(isinstance(side, str) for side in sides)


def _completed(layout: Format, views: Sequence[Row]) -> Format:
    """Say of a layout how the texts of most of these rows are to be read."""

    def most(holds: Callable[[Any, str, str], bool]) -> bool:
        rows = [(_prompt_or_none(view, layout), view[layout.chosen], view[layout.rejected]) for view in views]
        texts = [row for row in rows if isinstance(row[1], str) and isinstance(row[2], str)]
        return 2 * sum(holds(*row) for row in texts) > len(rows)

    judged = (layout.verdict.column,) if layout.verdict else ()
    columns = "columns " + ", ".join((*layout.prompt, layout.chosen, layout.rejected, *judged))
    if most(lambda prompt, chosen, rejected: _is_dialogue(chosen) or _is_dialogue_start(prompt)):
        return replace(layout, name="hh", why=f"{columns}: dialogues as text", dialogue_text=True)
    if most(lambda prompt, *sides: bool(prompt) and all(side.startswith(prompt) for side in sides)):
        why = f"{columns}: strings, the responses repeat the prompt"
        return replace(layout, why=why, repeats_prompt=True)
    strings = most(lambda *_: True)
    return replace(layout, why=f"{columns}: {'strings' if strings else 'messages'}")


def _prompt_or_none(view: Row, layout: Format) -> str | None:
    """Return the prompt if it is a text in one column."""
    prompt = view[layout.prompt[0]] if len(layout.prompt) == 1 else None
    return prompt if isinstance(prompt, str) and prompt.strip() else None


def show_row(row: Row, width: int = 70) -> str:
    """Show a row's columns with their values cut to `width` characters, one to a line."""
    lines = []
    for column, value in row.items():
        text = repr(value)
        lines.append(f"  {column}: {text if len(text) <= width else text[: width - 3] + '...'}")
    return "\n".join(lines) or "  (no columns)"


# Reading a row


def read_pair(row: Row, fmt: Format, columns: Mapping[str, str] | None = None) -> Pair:
    """Read one row; raises `Drop` (malformed, diverged, empty or identical) where it is no usable pair.

    Two answers of which none is better are `filtered`.
    """
    view = in_our_names(row, columns or {})
    fmt = _judged(view, fmt)
    system = _system(view)
    chosen, rejected = _turns(view, fmt.chosen), _turns(view, fmt.rejected)
    prompt = _prompt(view, fmt, needed=isinstance(chosen, str) and isinstance(rejected, str))
    if fmt.dialogue_text:
        chosen, rejected = (_dialogue(prompt, side) for side in (chosen, rejected))
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        if fmt.repeats_prompt and chosen.startswith(prompt) and rejected.startswith(prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return _usable(Pair(prompt, chosen, rejected, system))
    whole_chosen = _whole(prompt, chosen, fmt.chosen)
    whole_rejected = _whole(prompt, rejected, fmt.rejected)
    pair = _split(whole_chosen, whole_rejected)
    return _usable(with_system(pair, system) if system else pair)


def _judged(view: Row, fmt: Format) -> Format:
    """Return the format with `chosen` and `rejected` as this row's verdict has them."""
    if fmt.verdict is None:
        return fmt
    value = view.get(fmt.verdict.column, MISSING)
    number = as_number(value)
    if number in fmt.verdict.first:
        return fmt
    if number in fmt.verdict.second:
        return replace(fmt, chosen=fmt.rejected, rejected=fmt.chosen)
    if number in fmt.verdict.tie:
        raise Drop("filtered", f"{fmt.verdict.column} is {value}: neither answer is better")
    raise Drop(
        "malformed", f"{fmt.verdict.column} is {described(value)}, which says of neither answer that it is better"
    )


def with_system(pair: Pair, system: str) -> Pair:
    """Give the pair this system turn, unless it has one."""
    if isinstance(pair.prompt, str):
        return pair if pair.system else replace(pair, system=system)
    if any(message.role == "system" for message in pair.prompt):
        return pair
    return replace(pair, prompt=(Message("system", system), *pair.prompt))


def _split(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Pair:
    """Part two whole dialogues into what they have in common and one assistant turn each, or drop them."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        roles = [message.role for message in side]
        if roles[-1:] != ["assistant"]:
            last = f"the {roles[-1]}'s" if roles else "no"
            raise Drop("diverged", f"{name} ends with {last} turn, not the assistant's")
        if roles[-2:-1] == ["assistant"]:
            raise Drop("diverged", f"{name} ends with two assistant turns in a row")
    if chosen[:-1] != rejected[:-1]:
        raise Drop("diverged", "chosen and rejected differ before their last turn")
    return Pair(chosen[:-1], chosen[-1].content, rejected[-1].content)


def _usable(pair: Pair) -> Pair:
    if isinstance(pair.prompt, str):
        question = pair.prompt
    else:
        question = pair.prompt[-1].content if pair.prompt and pair.prompt[-1].role != "system" else ""
    if not question.strip():
        raise Drop("empty", "the prompt is empty")
    for name, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not text.strip():
            raise Drop("empty", f"{name} is empty")
    if pair.chosen == pair.rejected:
        raise Drop("identical", "chosen and rejected are the same")
    return pair


def _prompt(view: Row, fmt: Format, needed: bool) -> str | tuple[Message, ...] | None:
    """Return the prompt's text or messages; None where there is none and whole dialogues do without."""
    if not fmt.prompt:
        return None
    if fmt.prompt == ("instruction", "input"):
        parts = [_text(view.get("instruction", MISSING), "instruction")]
        if view.get("input") is not None:
            parts.append(_text(view["input"], "input"))
        question = "\n\n".join(part for part in parts if part.strip())
        earlier = _history(view.get("history"))
        return (*earlier, Message("user", question)) if earlier else question
    (column,) = fmt.prompt
    if view.get(column) is None and not (needed and not fmt.dialogue_text):
        return None
    turns = _turns(view, column)
    return _steered(turns) if isinstance(turns, str) else turns


def _history(value: Any) -> list[Message]:
    """Read the turns before an instruction: a list of [question, answer]; anything but a list means something else."""
    turns: list[Message] = []
    if not isinstance(value, (list, tuple)):
        return turns
    for i, turn in enumerate(value):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise Drop("malformed", f"history[{i}] is {described(turn)}, not [question, answer]")
        turns += [Message(role, _text(turn[j], f"history[{i}][{j}]")) for j, role in enumerate(("user", "assistant"))]
    return turns


def _system(view: Row) -> str | None:
    value = view.get("system")
    if value is None:
        return None
    return _text(value, "system") or None


def _whole(prompt: str | tuple[Message, ...] | None, side: str | tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """Return the whole dialogue of one side: the side itself if it repeats the prompt, else both joined."""
    if isinstance(side, str):
        if prompt is None:
            raise Drop("malformed", f"{name} is a text, and the row has no prompt")
        side = (Message("assistant", side),)
    if isinstance(prompt, str):
        # A prompt beside a whole dialogue merely repeats its first question: the dialogue decides.
        return (Message("user", prompt), *side) if len(side) == 1 else side
    prompt = prompt or ()
    overlap = next(n for n in range(min(len(prompt), len(side)), -1, -1) if _ends_with(prompt, side, n))
    if not overlap and prompt and side and prompt[-1].role == "user" and side[0].role in ("system", "user"):
        return side  # it begins anew, in other words than the prompt's
    return prompt + side[overlap:]


def _ends_with(prompt: tuple[Message, ...], side: tuple[Message, ...], count: int) -> bool:
    """Whether the prompt's last `count` messages are the side's first; its ends decide that in most cases."""
    if not count:
        return True
    return prompt[-count] == side[0] and prompt[-1] == side[count - 1] and prompt[-count:] == side[:count]


# Values of a column

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "ipython"), "tool"),
}
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_STEERED = re.compile(r"\n<extra_id_1>(User|Assistant)\n")


def _turns(view: Row, column: str) -> str | tuple[Message, ...]:
    """Return a column's text, or its messages, be they a list or a single one."""
    value = view.get(column, MISSING)
    if isinstance(value, Mapping):
        return (_message(value, column),)
    if isinstance(value, (list, tuple)):
        return tuple(_message(message, f"{column}[{i}]") for i, message in enumerate(value))
    return _text(value, column)


def _message(value: Any, where: str) -> Message:
    """Read {role, content} or {from, value}."""
    if not isinstance(value, Mapping):
        raise Drop("malformed", f"{where} is {described(value)}, not a message")
    # Columnar files give every message the keys of both spellings, the unused ones null.
    role_key, content_key = ("role", "content") if value.get("role") is not None else ("from", "value")
    role = value.get(role_key, MISSING)
    if role is MISSING:
        raise Drop("malformed", f"{where} is a message with neither role nor from, but {', '.join(value)}")
    if not isinstance(role, str) or role.strip().lower() not in _ROLES:
        raise Drop("malformed", f"{where}.{role_key} is {described(role)}, not a known role")
    if value.get("tool_calls"):
        raise Drop("malformed", f"{where}.tool_calls: calls beside the text cannot be rendered")
    content = value.get(content_key, MISSING)
    if isinstance(content, (list, tuple)):
        content = "".join(_part(part, f"{where}.{content_key}[{i}]") for i, part in enumerate(content))
    return Message(_ROLES[role.strip().lower()], _text(content, f"{where}.{content_key}"))


def _part(value: Any, where: str) -> str:
    if not isinstance(value, Mapping) or value.get("type") != "text":
        kind = value.get("type") if isinstance(value, Mapping) else value
        raise Drop("malformed", f"{where} is {described(kind)}, not a part of the type text")
    return _text(value.get("text", MISSING), f"{where}.text")


def _text(value: Any, where: str) -> str:
    if value is TIED:
        raise Drop("filtered", f"{where}: no answer is rated above another")
    if not isinstance(value, str):
        raise Drop("malformed", f"{where} is {described(value)}, not a text")
    if "\0" in value:
        raise Drop("malformed", f"{where} has a NUL character at {value.index(chr(0))}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how such a byte is read
            raise Drop("malformed", f"{where} is not UTF-8: byte 0x{code - 0xDC00:02x} at {error.start}") from None
        raise Drop("malformed", f"{where} has a lone surrogate, U+{code:04X}, at {error.start}") from None
    return value


def _is_dialogue(text: Any) -> bool:
    match = _TURN.match(text) if isinstance(text, str) else None
    return match is not None and match[1] == "Human"


def _is_dialogue_start(text: Any) -> bool:
    return _is_dialogue(text) and text.rstrip().endswith("\n\nAssistant:")


def _dialogue(prompt: str | tuple[Message, ...] | None, side: str | tuple[Message, ...]) -> str | tuple[Message, ...]:
    """Part "\\n\\nHuman: ...\\n\\nAssistant: ..." into turns, stripped of surrounding white space.

    A side that is a bare answer continues its prompt, when that is a dialogue up to "Assistant:".
    """
    if not isinstance(side, str):
        return side
    if not _is_dialogue(side) and _is_dialogue_start(prompt):
        side = f"{prompt} {side}"
    if not _is_dialogue(side):
        raise Drop("malformed", f"{described(side)} does not begin with 'Human:', as the other rows do")
    _, *parts = _TURN.split(side)
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[speaker], text.strip()) for speaker, text in zip(parts[::2], parts[1::2], strict=True))


def _steered(prompt: str) -> str | tuple[Message, ...]:
    """Part HelpSteer's prompts of several turns, stripped: before each but the first is a line <extra_id_1>SPEAKER."""
    question, *parts = _STEERED.split(prompt)
    if parts[-2:-1] != ["User"]:  # one turn; or one that is templated, up to the answer
        return prompt
    turns = zip(("User", *parts[::2]), (question, *parts[1::2]), strict=True)
    return tuple(Message(speaker.lower(), text.strip()) for speaker, text in turns)


# Filtering


class Filter(Protocol):
    """One condition of `data.filter`: what `column` must be, compared by `op` with `value`."""

    @property
    def column(self) -> str:
        """Return the rows' own name of a column; a dot reaches into nested values."""

    @property
    def op(self) -> str:
        """Return eq, ne, gt, ge, lt, le, in, not_in, contains, not_contains, matches or is_null."""

    @property
    def value(self) -> Any:
        """Return the value of the recipe."""


def check_filters(rows: Sequence[Row], filters: Sequence[Filter]) -> None:
    """Raise `DataError` for a filter on a column that none of a source's first rows has."""
    for spec in filters:
        _check_column(rows, spec.column, "filter")


def column_values(rows: Sequence[Row], column: str, where: str) -> list[Any]:
    """Each row's value of a column, a dot reaching into nested values; None where the row lacks it or has a null.

    Raises `DataError`, naming `where` the column was asked for, if no row has it.
    """
    _check_column(rows, column, where)
    values = [lookup(row, column) for row in rows]
    return [None if is_null(value) else value for value in values]


def passes(row: Row, filters: Sequence[Filter]) -> bool:
    """Whether a row meets every filter. A column that this row lacks is null there.

    A null passes no comparison but `ne`, `not_in` and `not_contains`. Values that cannot be compared, a word
    with a number for instance, raise `Drop("malformed")`; a number written as text compares as the number.
    """
    return all(_holds(lookup(row, spec.column), spec) for spec in filters)


_ORDER = {
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
}


def _holds(value: Any, spec: Filter) -> bool:
    null = is_null(value)
    match spec.op:
        case "is_null":
            return null == spec.value
        case "ne" | "not_in" | "not_contains" if null:
            return True
        case _ if null:
            return False
        case "eq":
            return _equal(value, spec.value, spec)
        case "ne":
            return not _equal(value, spec.value, spec)
        case "in":
            return any(_equal(value, item, spec) for item in spec.value)
        case "not_in":
            return not any(_equal(value, item, spec) for item in spec.value)
        case "contains":
            return _contains(value, spec)
        case "not_contains":
            return not _contains(value, spec)
        case "matches":
            if not isinstance(value, str):
                raise _incomparable(value, spec)
            return re.search(spec.value, value) is not None
        case "gt" | "ge" | "lt" | "le":
            value, wanted = _alike(value, spec.value, spec)
            if isinstance(value, (bool, list, tuple, Mapping)):
                raise _incomparable(value, spec)
            return bool(_ORDER[spec.op](value, wanted))
    raise ValueError(f"unknown filter operator {spec.op!r}")


def _equal(value: Any, wanted: Any, spec: Filter) -> bool:
    if wanted is None:
        return False
    value, wanted = _alike(value, wanted, spec)
    return bool(value == wanted)


def _contains(value: Any, spec: Filter) -> bool:
    if isinstance(value, str) and isinstance(spec.value, str):
        return spec.value in value
    if isinstance(value, (list, tuple)):
        return spec.value in value
    raise _incomparable(value, spec)


def _alike(value: Any, wanted: Any, spec: Filter) -> tuple[Any, Any]:
    """Return both values when they are of one kind, else drop the row."""

    def kind(x: Any) -> type:
        return float if isinstance(x, (int, float)) and not isinstance(x, bool) else type(x)

    if kind(wanted) is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _incomparable(value, spec) from None
    if kind(value) is not kind(wanted):
        raise _incomparable(value, spec)
    return value, wanted


def _incomparable(value: Any, spec: Filter) -> Drop:
    return Drop("malformed", f"{spec.column} is {described(value)}, which {spec.op} {spec.value!r} cannot compare")


# Templated strings

_BOS = r"<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>|<BOS_TOKEN>"
_TURN_MARKER = re.compile(
    rf"\s*(?:(?:{_BOS})\s*)*"
    r"(<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|system|assistant|User)\|>|<｜User｜>"
    r"|\[INST\]|\[SYSTEM_PROMPT\]|<\|start_of_role\|>|<\|START_OF_TURN_TOKEN\|>|<\|start\|>|<\|turn>)"
)


def already_templated(text: str) -> str | None:
    """Return the chat template's turn marker that begins the text, after white space and BOS, or None."""
    match = _TURN_MARKER.match(text)
    return match[1] if match else None
