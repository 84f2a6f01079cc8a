"""Rows that are no pairs as they are: what the hint has one write makes them pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from orpo_cli.data.formats import Pair, recognise
from orpo_cli.data.pairs import PairReader, open_sources
from orpo_cli.errors import DataError
from orpo_cli.recipe import DataSection

GOOD, BAD = "Blue.", "Seven."


def dialogue(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]


def rated(answer: str, **rating: Any) -> dict[str, Any]:
    return {"question": "Q", "reply_text": answer, **rating}


# Each with what the hint says of it.
ROWS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "other names": ([{"query": "Q", "good": GOOD, "bad": BAD}], "if these are the two answers"),
    "other names within": ([{"prompt": "Q", "preferred_text": GOOD, "dispreferred_text": BAD}], "the two answers"),
    "a name in need of quotes": ([{"prompt": "Q", "the best: one": GOOD, "the worst: one": BAD}], "the two answers"),
    "rated, in a list": (
        [{"question": "Q", "answers": [{"text": BAD, "score": 1}, {"text": GOOD, "score": 4}]}],
        "the best and the worst of answers by score",
    ),
    "ranked, the first the best": (
        [{"prompt": "Q", "replies": [{"answer": GOOD, "rank": 1, "n": 5}, {"answer": BAD, "rank": 2, "n": 9}]}],
        "by rank (rank, n are numbers)",
    ),
    "the best first": ([{"prompt": "Q", "responses": [GOOD, "Green.", BAD]}], "the first of responses is the best"),
    "rated, a row each": ([rated(BAD, score=1.5), rated(GOOD, score=3)], "each row holds one answer"),
    "judged in words": (
        [
            {"prompt": "Q", "answer_a": GOOD, "answer_b": BAD, "winner": "a"},
            {"prompt": "Q", "answer_a": BAD, "answer_b": GOOD, "winner": "b"},
            {"prompt": "Q", "answer_a": BAD, "answer_b": GOOD, "winner": "tie"},
        ],
        'winner holds "a", "b", "tie"',
    ),
    "judged dialogues": (
        [
            {"model_a": "x", "model_b": "y", "winner": w, "conversation_a": dialogue(a), "conversation_b": dialogue(b)}
            for w, a, b in (("model_a", GOOD, BAD), ("model_b", BAD, GOOD))
        ],
        "read the rows twice",
    ),
    "judged by number": (
        [
            {"prompt": "Q", "output_1": GOOD, "output_2": BAD, "preference": 1},
            {"prompt": "Q", "output_1": BAD, "output_2": GOOD, "preference": 2},
        ],
        "preference holds 1, 2",
    ),
    "an unusual prompt": ([{"riddle": "Q", "chosen": GOOD, "rejected": BAD}], "do not say what they answer"),
}  # fmt: skip


def hint_for(rows: list[dict[str, Any]], **arguments: Any) -> str:
    with pytest.raises(DataError, match="no preference pair") as caught:
        recognise(rows, **arguments)
    return caught.value.hint or ""


def section_of(hint: str, path: Path) -> DataSection:
    """The section `data` as the hint has it written for this file."""
    written = hint[min(i for i in (hint.find("data:\n"), hint.find("path: ")) if i >= 0) :]
    keys = yaml.safe_load(written.replace("<as it is>", str(path)))
    section = keys.get("data", {"train": [keys]})
    return DataSection.model_validate({"train": str(path), **section})


@pytest.mark.parametrize("name", ROWS)
def test_what_the_hint_has_one_write_makes_pairs_of_the_rows(name: str, tmp_path: Path) -> None:
    rows, said = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hint = hint_for(rows)
    assert said in hint
    section = section_of(hint, path)
    reader = PairReader(open_sources(section.train, section), section, None)  # type: ignore[arg-type]  # reads no token
    pairs = [pair for _, pair in reader.texts() if isinstance(pair, Pair)]
    assert pairs
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {(GOOD, BAD)}
    assert {pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1].content for pair in pairs} == {"Q"}
    if name.startswith("judged"):
        assert len(pairs) == 2


def test_what_is_wrong_with_right_names_is_said_of_each_column() -> None:
    hint = hint_for([{"prompt": "Q", "chosen": 1, "rejected": None}])
    assert "is needed where chosen is a number (1), rejected is null:\n" in hint
    assert yaml.safe_load(hint[hint.index("data:") :])["data"]["columns"] == {
        "prompt": "prompt",
        "chosen": "<a column of texts, the chosen ones>",
        "rejected": "<a column of texts, the rejected ones>",
    }
    hint = hint_for([{"prompt": "Q", "best": True, "rejected": "a"}], columns={"chosen": "best"})
    assert "is needed where best is a boolean (True):\n" in hint
    tied = {"chosen": "answers[max score].text", "rejected": "answers[min score].text"}
    hint = hint_for([{"prompt": "Q", "answers": [{"text": GOOD, "score": 1}, {"text": BAD, "score": 1}]}], columns=tied)
    assert "answers[max score].text is one of several that are rated alike" in hint


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": {"text": GOOD, "score": 3}, "rejected": {"text": BAD, "score": 1}},
        {"prompt": ["Q"], "chosen": [GOOD], "rejected": [BAD]},
    ],
    ids=["objects", "lists"],
)
def test_texts_within_the_right_columns_are_named(row, tiny_recipe, tmp_path, orpo):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    code, _, err = orpo("data", tiny_recipe(data={"train": str(path), "eval": None}))
    assert code == 2
    columns = section_of(err, path).columns
    recipe = tiny_recipe(data={"train": str(path), "eval": None, "columns": columns})
    code, out, _ = orpo("data", recipe, "--pairs", "1")
    assert code == 0
    assert f"[nll+or] {GOOD}" in out.replace("[nll+or]", "[nll+or] ").replace("  ", " ")


def test_what_no_mapping_can_do_is_said() -> None:
    assert "make pairs" in hint_for([{"prompt": "Q", "completion": GOOD, "label": True}])
    hint = hint_for([{"prompt": "Q", "answers": [GOOD, BAD], "scores": [3, 1]}])
    assert "put each of answers and its scores into one object" in hint
    assert "chosen: answers[max scores].text" in hint


def test_a_format_that_does_not_fit_is_said_to_be_left_out() -> None:
    rows = [{"prompt": "Q", "chosen": GOOD, "rejected": BAD}]
    assert hint_for(rows, name="sharegpt") == "leave data.format out: without it, they are read as 'prompt'"
    assert "chosen: good" in hint_for([{"prompt": "Q", "good": GOOD, "bad": BAD}], name="prompt")


def test_what_cannot_be_guessed_is_left_open() -> None:
    assert "prompt: prompt\n    chosen: <the preferred response>" in hint_for([{"prompt": "Q", "chosen": GOOD}])
    assert "prompt: <the prompt or the dialogue so far>" in hint_for([{"text": "Q"}])
    assert "eq: <its value for answer_b>" in hint_for(
        [{"prompt": "Q", "answer_a": "x", "answer_b": "y", "winner": "a"}]
    )
    assert "chosen: <the preferred response>" in hint_for([{}])
