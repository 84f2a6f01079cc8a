from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_cli.data.formats import (
    FORMATS,
    Drop,
    Format,
    Message,
    Pair,
    already_templated,
    check_filters,
    passes,
    read_pair,
    recognise,
    with_system,
)
from orpo_cli.errors import DataError
from orpo_cli.recipe.schema import FilterSpec
from tests.shared import shared

Row = Mapping[str, Any]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def messages(*turns: dict[str, str]) -> tuple[Message, ...]:
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)


def read(row: Row, columns: Mapping[str, str] | None = None, name: str = "auto") -> Pair:
    return read_pair(row, recognise([row], columns, name), columns)


def outcome_of(row: Row, fmt: Format) -> Pair | Drop:
    try:
        return read_pair(row, fmt)
    except Drop as drop:
        return drop


def read_all(rows: Sequence[Row]) -> tuple[list[Pair], Counter[str]]:
    fmt = recognise(rows[:64])
    outcomes = [outcome_of(row, fmt) for row in rows]
    dropped = Counter(outcome.reason for outcome in outcomes if isinstance(outcome, Drop))
    return [outcome for outcome in outcomes if isinstance(outcome, Pair)], dropped


def drop_of(row: Row, like: Row | None = None) -> Drop:
    """What becomes of a row in a set of rows that are like another one."""
    fmt = recognise([like or row])
    with pytest.raises(Drop) as caught:
        read_pair(row, fmt)
    return caught.value


# The real files, against a parse of a few lines each


def test_instruction_preference():
    rows = json.loads(shared("data/instruction-preference.json").read_text(encoding="utf-8"))
    pairs, dropped = read_all(rows)
    assert recognise(rows[:64]).name == "alpaca"
    assert len(rows) == 1100
    assert dropped == {"identical": 6}
    assert pairs == [
        Pair(r["instruction"] + ("\n\n" + r["input"] if r["input"] else ""), r["chosen"], r["rejected"])
        for r in rows
        if r["chosen"] != r["rejected"]
    ]


def test_hh_rlhf():
    with gzip.open(shared("data/hh-rlhf-harmless-test.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs, dropped = read_all(rows)
    assert recognise(rows[:64]).name == "hh"
    assert len(rows) == 2312
    assert dropped == {"empty": 4, "diverged": 5}
    expected = []
    for row in rows:
        head, marker, chosen = row["chosen"].rpartition("\n\nAssistant:")
        head_rejected, _, rejected = row["rejected"].rpartition("\n\nAssistant:")
        if head != head_rejected or not chosen.strip() or not rejected.strip():
            continue
        turns = []
        for text in head.replace("\n\nAssistant:", "\n\nHuman:\0").split("\n\nHuman:")[1:]:
            role = "assistant" if text.startswith("\0") else "user"
            turns.append(Message(role, text.removeprefix("\0").strip()))
        expected.append(Pair(tuple(turns), chosen.strip(), rejected.strip()))
        assert marker
    assert pairs == expected


def test_sharegpt():
    rows = json.loads(shared("data/sharegpt-dpo-en.json").read_text(encoding="utf-8"))
    pairs, dropped = read_all(rows)
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    assert recognise(rows[:64]).name == "sharegpt"
    assert not dropped
    assert pairs == [
        Pair(
            tuple(Message(roles[turn["from"]], turn["value"]) for turn in row["conversations"]),
            row["chosen"]["value"],
            row["rejected"]["value"],
        )
        for row in rows
    ]
    assert len(pairs) == 300


def test_tiny_message_lists():
    [row] = json.loads(shared("data/hh_rlhf_tiny.json").read_text(encoding="utf-8"))
    [pair], _ = read_all([row])
    question = Message("user", "What do I do when I have a hole in my trousers?")
    assert pair == Pair((question,), "Fix the hole.", "Take them off.")


def test_tiny_stack_exchange():
    rows = json.loads(shared("data/stack_exchange_paired_tiny.json").read_text(encoding="utf-8"))
    pairs, dropped = read_all(rows)
    assert recognise(rows).name == "paired"
    assert pairs == [Pair(row["question"], row["response_j"], row["response_k"]) for row in rows]
    assert len(pairs) == 25
    assert not dropped


# Shapes of well-known data sets

DIALOGUE = messages(user("Q"))
SHAPES: dict[str, tuple[Row, Pair]] = {
    "orpo-dpo-mix-40k": (
        {
            "source": "a",
            "chosen": [user("Q"), assistant("good")],
            "rejected": [user("Q"), assistant("bad")],
            "prompt": "Q",
            "question": "Q",
        },
        Pair(DIALOGUE, "good", "bad"),
    ),
    "orpo-dpo-mix-40k, several turns": (
        {
            "prompt": "Q",
            "chosen": [user("Q"), assistant("A"), user("Q2"), assistant("good")],
            "rejected": [user("Q"), assistant("A"), user("Q2"), assistant("bad")],
        },
        Pair(messages(user("Q"), assistant("A"), user("Q2")), "good", "bad"),
    ),
    "UltraFeedback binarized": (
        {
            "prompt": "Q",
            "prompt_id": "0",
            "chosen": [user("Q"), assistant("good")],
            "rejected": [user("Q"), assistant("bad")],
            "messages": [user("Q"), assistant("good")],
            "score_chosen": 9.0,
            "score_rejected": 2.0,
        },
        Pair(DIALOGUE, "good", "bad"),
    ),
    "distilabel-intel-orca": (
        {
            "system": "S",
            "input": "Q",
            "chosen": "good",
            "rejected": "bad",
            "generations": ["x", "y"],
            "order": ["a", "b"],
        },
        Pair("Q", "good", "bad", "S"),
    ),
    "distilabel-intel-orca without a system text": (
        {"system": "", "input": "Q", "chosen": "good", "rejected": "bad"},
        Pair("Q", "good", "bad"),
    ),
    "Intel orca_dpo_pairs": (
        {"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"},
        Pair("Q", "good", "bad", "S"),
    ),
    "HH-RLHF": (
        {
            "chosen": "\n\nHuman: Q \n\nAssistant: A\n\n1. one\n\nHuman: Q2\n\nAssistant: good\n\nindeed ",
            "rejected": "\n\nHuman: Q \n\nAssistant: A\n\n1. one\n\nHuman: Q2\n\nAssistant: bad",
        },
        Pair(messages(user("Q"), assistant("A\n\n1. one"), user("Q2")), "good\n\nindeed", "bad"),
    ),
    "HH-RLHF with its prompt apart": (
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
        Pair(DIALOGUE, "good", "bad"),
    ),
    "stack-exchange-paired": (
        {"qid": 1, "question": "Q", "date": "2020", "response_j": "good", "response_k": "bad"},
        Pair("Q", "good", "bad"),
    ),
    "Argilla Capybara": (
        {
            "source": "a",
            "conversation": [{"input": "Q", "output": "good"}],
            "prompt": [user("Q")],
            "chosen": [user("Q"), assistant("good")],
            "rejected": [user("Q"), assistant("bad")],
            "rating_chosen": 5,
        },
        Pair(DIALOGUE, "good", "bad"),
    ),
    "Argilla mix, no prompt": (
        {"dataset": "a", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        Pair(DIALOGUE, "good", "bad"),
    ),
    "message prompt, answers alone": (
        {"prompt": [system("S"), user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        Pair(messages(system("S"), user("Q")), "good", "bad"),
    ),
    "message prompt, answers as one message": (
        {"prompt": [user("Q")], "chosen": assistant("good"), "rejected": assistant("bad")},
        Pair(DIALOGUE, "good", "bad"),
    ),
    "message prompt, answers as text": (
        {"prompt": [user("Q")], "chosen": "good", "rejected": "bad"},
        Pair(DIALOGUE, "good", "bad"),
    ),
    "system as the prompt, dialogues without it": (
        {
            "prompt": [system("S"), user("Q")],
            "chosen": [user("Q"), assistant("good")],
            "rejected": [user("Q"), assistant("bad")],
        },
        Pair(messages(system("S"), user("Q")), "good", "bad"),
    ),
    "string prompt, answers as messages": (
        {"prompt": "Q", "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        Pair(DIALOGUE, "good", "bad"),
    ),
    "string prompt in other words than the dialogue's": (
        {"prompt": " Q\n", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        Pair(DIALOGUE, "good", "bad"),
    ),
    "messages and a system column": (
        {"system": "S", "chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]},
        Pair(messages(system("S"), user("Q")), "good", "bad"),
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": "f()"},
                {"from": "observation", "value": "1"},
            ],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "chatgpt", "value": "bad"},
        },
        Pair(messages(system("S"), user("Q"), assistant("f()"), {"role": "tool", "content": "1"}), "good", "bad"),
    ),
    "ShareGPT, answers as text": (
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": "good", "rejected": "bad"},
        Pair(DIALOGUE, "good", "bad"),
    ),
    "columnar messages with the keys of both spellings": (
        {
            "conversations": [{"from": "human", "value": "Q", "role": None, "content": None}],
            "chosen": {"role": "assistant", "content": "good", "from": None, "value": None},
            "rejected": {"role": "assistant", "content": "bad", "from": None, "value": None},
        },
        Pair(DIALOGUE, "good", "bad"),
    ),
    "content in parts": (
        {
            "chosen": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]},
                assistant("good"),
            ],
            "rejected": [user("Q?"), assistant("bad")],
        },
        Pair(messages(user("Q?")), "good", "bad"),
    ),
    "Alpaca": (
        {"instruction": "I", "input": "X", "output": "ignored", "chosen": "good", "rejected": "bad"},
        Pair("I\n\nX", "good", "bad"),
    ),
    "Alpaca without input": (
        {"instruction": "I", "input": "", "chosen": "good", "rejected": "bad"},
        Pair("I", "good", "bad"),
    ),
    "Alpaca with a null input": (
        {"instruction": "I", "input": None, "chosen": "good", "rejected": "bad"},
        Pair("I", "good", "bad"),
    ),
    "Alpaca with earlier turns": (
        {"system": "S", "instruction": "I", "history": [["Q", "A"]], "chosen": "good", "rejected": "bad"},
        Pair(messages(system("S"), user("Q"), assistant("A"), user("I")), "good", "bad"),
    ),
    "Alpaca with no earlier turns": (
        {"instruction": "I", "history": [], "input": "", "chosen": "good", "rejected": "bad"},
        Pair("I", "good", "bad"),
    ),
    "Alpaca with a column that is history by another meaning": (
        {"instruction": "I", "history": "ancient", "chosen": "good", "rejected": "bad"},
        Pair("I", "good", "bad"),
    ),
    "SHP, the first preferred": (
        {"history": "Q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1},
        Pair("Q", "good", "bad"),
    ),
    "SHP, the second preferred": (
        {"history": "Q", "human_ref_A": "bad", "human_ref_B": "good", "labels": "0"},
        Pair("Q", "good", "bad"),
    ),
    "HelpSteer3": (
        {"context": [user("Q")], "response1": "good", "response2": "bad", "overall_preference": -2},
        Pair(DIALOGUE, "good", "bad"),
    ),
    "prompt of several turns as HelpSteer writes them": (
        {"prompt": "Q \n\n<extra_id_1>Assistant\n A\n<extra_id_1>User\nQ2", "chosen": "good", "rejected": "bad"},
        Pair(messages(user("Q"), assistant("A"), user("Q2")), "good", "bad"),
    ),
    "prompt that ends where HelpSteer's model answers": (
        {"prompt": "S\n<extra_id_1>User\nQ\n<extra_id_1>Assistant\n", "chosen": "good", "rejected": "bad"},
        Pair("S\n<extra_id_1>User\nQ\n<extra_id_1>Assistant\n", "good", "bad"),
    ),
    "Alpaca with no such column": ({"instruction": "I", "chosen": "good", "rejected": "bad"}, Pair("I", "good", "bad")),
    "strings": ({"prompt": " Q ", "chosen": " good\n", "rejected": "bad"}, Pair(" Q ", " good\n", "bad")),
    "strings that repeat the prompt": (
        {"prompt": "Q\n", "chosen": "Q\n good", "rejected": "Q\nbad"},
        Pair("Q\n", " good", "bad"),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape(name):
    row, pair = SHAPES[name]
    assert read(row) == pair


def test_every_format_can_be_asked_for():
    names = {recognise([row]).name for row, _ in SHAPES.values()}
    assert names == set(FORMATS)
    for row, pair in SHAPES.values():
        fmt = recognise([row])
        if not (fmt.name == "hh" and "prompt" in row):
            assert read(row, name=fmt.name) == pair
    with pytest.raises(DataError, match="no preference pair of the format 'sharegpt'"):
        recognise([{"prompt": "Q", "chosen": "a", "rejected": "b"}], name="sharegpt")


def test_most_rows_decide():
    good = {"prompt": "Q", "chosen": "a", "rejected": "b"}
    odd: list[Row] = [
        {},
        {"prompt": None, "chosen": 3, "rejected": None},
        {"chosen": "\n\nHuman: x", "rejected": "\n\nHuman:"},
    ]
    assert recognise([*odd, good, good]).name == "prompt"
    assert recognise([{"prompt": None, "chosen": 3, "rejected": 4}, *[{}] * 9, good]).name == "prompt"


VALUES = st.recursive(
    st.sampled_from([None, True, 3, 0.5, float("nan"), "", "Q", "\n\nHuman: Q\n\nAssistant: A"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text"]), inner, max_size=2)
        | st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), inner)
    ),
    max_leaves=6,
)
NAMES = ["prompt", "chosen", "rejected", "system", "instruction", "input", "conversations", "question"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(NAMES), VALUES), min_size=1, max_size=4))
def test_any_row_is_a_pair_or_dropped_for_a_reason(rows):
    try:
        fmt = recognise(rows)
    except DataError:
        return
    for outcome in (outcome_of(row, fmt) for row in rows):
        if isinstance(outcome, Drop):
            assert outcome.reason in ("malformed", "diverged", "empty", "identical")
        else:
            assert outcome.prompt
            assert outcome.chosen.strip()
            assert outcome.rejected.strip()
            assert outcome.chosen != outcome.rejected


def test_a_short_prompt_that_some_answers_begin_with_is_no_repeated_prompt():
    rows = [
        {"prompt": "Hello", "chosen": "Hello there!", "rejected": "Hello?"},
        {"prompt": "Who?", "chosen": "Me.", "rejected": "You."},
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    ]
    assert [pair.chosen for pair in read_all(rows)[0]] == ["Hello there!", "Me.", "So."]


def test_mixed_types_in_one_column_are_read_by_their_own():
    rows = [SHAPES[name][0] for name in ("strings", "orpo-dpo-mix-40k", "message prompt, answers as text", "strings")]
    assert [type(pair.prompt) for pair in read_all(rows)[0]] == [str, tuple, tuple, str]


def test_rows_of_no_known_shape_are_refused_with_the_mapping_to_write():
    row = {"post_id": "a", "request": "Q" * 200, "best": "a", "worst": "b"}
    with pytest.raises(DataError) as caught:
        recognise([row])
    assert "best: 'a'" in caught.value.message
    assert "QQQ..." in caught.value.message
    assert "chosen: best\n    rejected: worst" in (caught.value.hint or "")
    columns = {"prompt": "request", "chosen": "best", "rejected": "worst"}
    assert read(row, columns) == Pair("Q" * 200, "a", "b")


def test_two_texts_without_a_prompt_are_refused():
    with pytest.raises(DataError, match="no preference pair is recognised"):
        recognise([{"chosen": "good", "rejected": "bad"}])


# The mapping of columns


def test_a_mapping_wins_over_what_is_there():
    row = {"prompt": "P", "instruction": "I", "question": "Q", "text": "T", "chosen": "a", "best": "A", "rejected": "b"}
    assert read(row) == Pair("P", "a", "b")
    assert read(row, {"prompt": "text", "chosen": "best"}) == Pair("T", "A", "b")
    assert read(row, {"instruction": "question", "input": "text"}) == Pair("Q\n\nT", "a", "b")
    assert read(row, {"input": "text"}) == Pair("I\n\nT", "a", "b")
    assert read(row, {"system": "text"}) == Pair("P", "a", "b", "T")


def test_a_dot_reaches_into_nested_values():
    row = {
        "a.b": "Q",
        "meta": {"system": "S"},
        "answers": [{"text": "good"}, {"text": "worse"}, {"text": "bad"}],
    }
    columns = {"prompt": "a.b", "system": "meta.system", "chosen": "answers.0.text", "rejected": "answers.-1.text"}
    assert read(row, columns) == Pair("Q", "good", "bad", "S")
    fmt = recognise([row], columns)
    with pytest.raises(Drop, match="malformed: rejected is missing"):
        read_pair({**row, "answers": [{"text": "good"}, "bad"]}, fmt, columns)


def test_the_best_and_the_worst_of_a_list():
    row = {
        "q": "Q",
        "a": [
            {"text": "fair", "by": {"judge": 3}},
            {"text": "good", "by": {"judge": "4.5"}},
            {"text": "as good", "by": {"judge": 4.5}},
            {"text": "unrated", "by": {"judge": None}},
            {"text": "not a number", "by": {"judge": "N/A"}},
            "no object",
            {"text": "bad", "by": {"judge": -1}},
        ],
    }
    columns = {"prompt": "q", "chosen": "a[max by.judge].text", "rejected": "a[min by.judge].text"}
    assert read(row, columns) == Pair("Q", "good", "bad")
    assert read(row, columns | {"prompt": "a[max by.judge].by.judge"}) == Pair("4.5", "good", "bad")
    named_so = {"q": "Q", "a[max b].c": "x", "r": "y"}
    assert read(named_so, {"prompt": "q", "chosen": "a[max b].c", "rejected": "r"}) == Pair("Q", "x", "y")


COLUMNS_OF_A_LIST = {"prompt": "q", "chosen": "a[max s].t", "rejected": "a[min s].t"}


@pytest.mark.parametrize(
    ("answers", "reason", "detail"),
    [
        ([{"t": "x", "s": 1}, {"t": "y", "s": 1.0}], "filtered", "chosen: no answer is rated above another"),
        ([{"t": "x", "s": 1}], "filtered", "chosen: no answer is rated above another"),
        ([{"t": "x", "s": 1}, {"t": "y", "s": None}], "filtered", "chosen: no answer is rated above another"),
        ([{"t": "x", "s": None}], "malformed", "chosen is missing, not a text"),
        ([], "malformed", "chosen is missing, not a text"),
        ("x", "malformed", "chosen is missing, not a text"),
        ([{"t": "x", "s": 1}, {"s": 2}], "malformed", "chosen is missing, not a text"),
        ([{"t": "x", "s": 1}, {"t": "x", "s": 2}], "identical", "chosen and rejected are the same"),
    ],
)
def test_lists_that_have_no_best_and_worst(answers, reason, detail):
    fmt = recognise([{"q": "Q", "a": [{"t": "x", "s": 1}, {"t": "y", "s": 2}]}], COLUMNS_OF_A_LIST)
    with pytest.raises(Drop) as caught:
        read_pair({"q": "Q", "a": answers}, fmt, COLUMNS_OF_A_LIST)
    assert (caught.value.reason, caught.value.detail) == (reason, detail)


@pytest.mark.parametrize("ours", ["chosen", "rejected"])
def test_a_mapping_of_an_answer_goes_before_answers_found_by_their_usual_names(ours):
    rows = [SHAPES[name][0] | {"mine": "M"} for name in ("stack-exchange-paired", "SHP, the first preferred")]
    for row in rows:
        assert read(row)
        with pytest.raises(DataError, match="no preference pair is recognised"):
            recognise([row], {ours: "mine"})


def test_a_mapping_to_a_column_that_is_not_there():
    with pytest.raises(DataError, match=r"columns.chosen: the data has no column 'bets'") as caught:
        recognise([{"prompt": "Q", "best": "a", "rejected": "b"}], {"chosen": "bets"})
    assert "prompt, best, rejected" in (caught.value.hint or "")


# Rows that are dropped

STRINGS = {"prompt": "Q", "chosen": "a", "rejected": "b"}
LISTS = {"chosen": [user("Q"), assistant("a")], "rejected": [user("Q"), assistant("b")]}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (STRINGS | {"prompt": " \n"}, "empty", "the prompt is empty"),
        (STRINGS | {"chosen": ""}, "empty", "chosen is empty"),
        (STRINGS | {"rejected": "\t"}, "empty", "rejected is empty"),
        (STRINGS | {"chosen": "b"}, "identical", "chosen and rejected are the same"),
        (STRINGS | {"chosen": None}, "malformed", "chosen is null, not a text"),
        (STRINGS | {"chosen": float("nan")}, "malformed", "chosen is null, not a text"),
        (STRINGS | {"chosen": 3}, "malformed", "chosen is a number (3), not a text"),
        (STRINGS | {"chosen": True}, "malformed", "chosen is a boolean (True), not a text"),
        (STRINGS | {"prompt": None}, "malformed", "prompt is null, not a text"),
        (STRINGS | {"chosen": ["a"]}, "malformed", "chosen[0] is a text ('a'), not a message"),
        (STRINGS | {"chosen": {"text": "a"}}, "malformed", "chosen is a message with neither role nor from, but text"),
        (STRINGS | {"system": 1}, "malformed", "system is a number (1), not a text"),
        (STRINGS | {"rejected": "b\0"}, "malformed", "rejected has a NUL character at 1"),
        (STRINGS | {"rejected": "b\ud83d"}, "malformed", "rejected has a lone surrogate, U+D83D, at 1"),
        ({"prompt": "Q", "chosen": "a"}, "malformed", "rejected is missing, not a text"),
        ({"chosen": "a", "rejected": "b"}, "malformed", "prompt is missing, not a text"),
    ],
)
def test_dropped_strings(row, reason, detail):
    drop = drop_of(row, like=STRINGS)
    assert (drop.reason, drop.detail) == (reason, detail)


JUDGED = {"prompt": "Q", "response_1": "a", "response_2": "b"}


@pytest.mark.parametrize(
    ("strength", "reason", "detail"),
    [
        (0, "filtered", "preference_strength is 0: neither answer is better"),
        (4, "malformed", "preference_strength is a number (4), which says of neither answer that it is better"),
        (0.5, "malformed", "preference_strength is a number (0.5), which says of neither answer that it is better"),
        ("tie", "malformed", "preference_strength is a text ('tie'), which says of neither answer that it is better"),
        (True, "malformed", "preference_strength is a boolean (True), which says of neither answer that it is better"),
        (None, "malformed", "preference_strength is null, which says of neither answer that it is better"),
        ([1], "malformed", "preference_strength is a list ([1]), which says of neither answer that it is better"),
    ],
)
def test_verdicts_for_neither_answer(strength, reason, detail):
    drop = drop_of(JUDGED | {"preference_strength": strength}, like=JUDGED | {"preference_strength": 1})
    assert (drop.reason, drop.detail) == (reason, detail)


def test_every_strength_of_a_preference():
    rows = [JUDGED | {"preference_strength": strength} for strength in (-3, -2, -1, 1, 2, 3)]
    assert [pair.chosen for pair in read_all(rows)[0]] == ["a", "a", "a", "b", "b", "b"]
    assert drop_of(JUDGED, like=rows[0]).reason == "malformed"


@pytest.mark.parametrize(
    ("history", "detail"),
    [
        ([["Q"]], "history[0] is a list (['Q']), not [question, answer]"),
        ([["Q", "A"], "QA"], "history[1] is a text ('QA'), not [question, answer]"),
        ([["Q", None]], "history[0][1] is null, not a text"),
    ],
)
def test_earlier_turns_that_are_none(history, detail):
    drop = drop_of({"instruction": "I", "history": history, "chosen": "a", "rejected": "b"})
    assert (drop.reason, drop.detail) == ("malformed", detail)


@pytest.mark.parametrize(
    ("chosen", "reason", "detail"),
    [
        ([user("P"), assistant("a")], "diverged", "chosen and rejected differ before their last turn"),
        ([user("Q"), assistant("a"), user("Q")], "diverged", "chosen ends with the user's turn, not the assistant's"),
        ([user("Q"), assistant("a"), assistant("b")], "diverged", "chosen ends with two assistant turns in a row"),
        ([], "diverged", "chosen ends with no turn, not the assistant's"),
        ([user("Q"), assistant("")], "empty", "chosen is empty"),
        ([user("Q"), assistant("b")], "identical", "chosen and rejected are the same"),
        (
            [user("Q"), {"role": "robot", "content": "a"}],
            "malformed",
            "chosen[1].role is a text ('robot'), not a known role",
        ),
        ([user("Q"), {"role": "assistant", "content": None}], "malformed", "chosen[1].content is null, not a text"),
        ([user("Q"), {"role": "assistant"}], "malformed", "chosen[1].content is missing, not a text"),
        ([[user("Q")], assistant("a")], "malformed", "chosen[0] is a list"),
        (
            [user("Q"), {"role": "assistant", "content": [{"type": "image", "image": "x"}]}],
            "malformed",
            "chosen[1].content[0] is a text ('image'), not a part of the type text",
        ),
        (
            [user("Q"), {"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]}],
            "malformed",
            "chosen[1].tool_calls: calls beside the text cannot be rendered",
        ),
        ("a", "malformed", "chosen is a text, and the row has no prompt"),
    ],
)
def test_dropped_messages(chosen, reason, detail):
    drop = drop_of(LISTS | {"chosen": chosen}, like=LISTS)
    assert drop.reason == reason
    assert drop.detail.startswith(detail)


@pytest.mark.parametrize("prompt", [[], [system("S")], [user(" ")]])
def test_a_dialogue_without_a_question_is_empty(prompt):
    row = {"chosen": [*prompt, assistant("a")], "rejected": [*prompt, assistant("b")]}
    assert drop_of(row, like=LISTS).reason == "empty"


def test_dropped_dialogue_texts():
    like = {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"}
    assert drop_of(like | {"chosen": "Hm"}, like).reason == "malformed"
    assert drop_of(like | {"chosen": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: x"}, like).reason == "diverged"
    assert drop_of(like | {"chosen": "\n\nHuman: Q\n\nAssistant:"}, like).reason == "empty"
    assert drop_of(like | {"chosen": "\n\nHuman: Q\n\nAssistant:b "}, like).reason == "identical"


# A system turn for rows that have none


def test_with_system():
    assert with_system(Pair("Q", "a", "b"), "S") == Pair("Q", "a", "b", "S")
    assert with_system(Pair("Q", "a", "b", ""), "S") == Pair("Q", "a", "b", "S")
    assert with_system(Pair("Q", "a", "b", "own"), "S") == Pair("Q", "a", "b", "own")
    assert with_system(Pair(DIALOGUE, "a", "b"), "S") == Pair((Message("system", "S"), *DIALOGUE), "a", "b")
    own = Pair(messages(system("own"), user("Q")), "a", "b")
    assert with_system(own, "S") == own


# Filters


def keeps(row: Row, **condition: Any) -> bool:
    return passes(row, [FilterSpec.model_validate(condition)])


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ({"eq": 8}, [8, 8.0, "8"]),
        ({"ne": 8}, [9, "7.5", None]),
        ({"gt": 7.5}, [8, 8.0, "8", 9]),
        ({"ge": 8}, [8, 8.0, "8", 9]),
        ({"lt": 8}, ["7.5"]),
        ({"le": 8}, [8, 8.0, "8", "7.5"]),
        ({"in": [8, 9]}, [8, 8.0, "8", 9]),
        ({"not_in": [8, 9]}, ["7.5", None]),
        ({"is_null": True}, [None]),
        ({"is_null": False}, [8, 8.0, "8", 9, "7.5"]),
    ],
)
def test_filters_of_numbers(condition, kept):
    values = [8, 8.0, "8", 9, "7.5", None]
    assert [v for v in values if keeps({"x": v}, column="x", **condition)] == kept


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ({"eq": "tie"}, ["tie"]),
        ({"ne": "tie"}, ["untied", None]),
        ({"contains": "tie"}, ["tie", "untied"]),
        ({"not_contains": "tie"}, [None]),
        ({"matches": "^t.e$"}, ["tie"]),
        ({"gt": "tie"}, ["untied"]),
    ],
)
def test_filters_of_texts(condition, kept):
    assert [v for v in ["tie", "untied", None] if keeps({"x": v}, column="x", **condition)] == kept


def test_filters_reach_into_nested_values_and_lists():
    row = {"meta": {"tags": ["a", "b"], "ok": True}}
    assert keeps(row, column="meta.tags", contains="a")
    assert not keeps(row, column="meta.tags", contains="c")
    assert keeps(row, column="meta.ok", eq=True)
    assert not passes(row, [FilterSpec(column="meta.ok", eq=True), FilterSpec(column="meta.tags", contains="c")])


def test_a_value_that_is_not_a_number_is_null():
    assert not keeps({"x": float("nan")}, column="x", ge=0)
    assert keeps({"x": float("nan")}, column="x", is_null=True)
    assert not keeps({}, column="x", ge=0)


@pytest.mark.parametrize(
    ("value", "condition"),
    [
        ("high", {"ge": 8}),
        (8, {"ge": "high"}),
        (True, {"ge": 1}),
        (8, {"matches": "8"}),
        (8, {"contains": "8"}),
        ({"a": 1}, {"eq": 1}),
        (True, {"eq": 1}),
    ],
)
def test_values_that_cannot_be_compared_are_malformed(value, condition):
    with pytest.raises(Drop, match="malformed: x is") as caught:
        keeps({"x": value}, column="x", **condition)
    assert caught.value.reason == "malformed"


def test_a_filter_on_a_column_that_is_not_there():
    rows = [{"score": 1, "b": 2}, {"c": 3}]
    check_filters(rows, [FilterSpec(column="c", ge=1)])
    with pytest.raises(DataError, match="no column 'scoer'") as caught:
        check_filters(rows, [FilterSpec(column="scoer", ge=1)])
    assert caught.value.hint == "it has score, b, c"


# Strings that are already templated


@pytest.mark.parametrize(
    ("text", "marker"),
    [
        ("<|im_start|>user\nQ", "<|im_start|>"),
        (" \n<|start_header_id|>user", "<|start_header_id|>"),
        ("<|begin_of_text|><|start_header_id|>user", "<|start_header_id|>"),
        ("<s>[INST] Q [/INST]", "[INST]"),
        ("<s> [INST] Q", "[INST]"),
        ("<bos><start_of_turn>user", "<start_of_turn>"),
        ("<|user|>\nQ", "<|user|>"),
        ("<|system|>\nS", "<|system|>"),
        ("What does <|im_start|> mean?", None),
        ("<s>", None),
        ("", None),
    ],
)
def test_already_templated(text, marker):
    assert already_templated(text) == marker
