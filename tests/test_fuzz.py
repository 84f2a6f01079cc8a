"""Whatever a recipe or a data file holds, it is taken or explained: nothing but an OrpoError, and never a traceback.

The suite tries some hundred inputs of each kind, always the same ones. `make fuzz` tries 10,000 new ones.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orpo_cli.data.dataset import load_pairs
from orpo_cli.data.tokenize import PairTokenizer
from orpo_cli.errors import DataError, RecipeError
from orpo_cli.model.build import load_text_side, pair_tokenizer
from orpo_cli.recipe import DataSection, Recipe, TrainSection, dump_recipe, load_recipe
from orpo_cli.recipe.faults import section_keys

EXAMPLES = int(os.environ.get("ORPO_FUZZ_EXAMPLES", "0"))

fuzz = settings(
    max_examples=EXAMPLES or 300,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# Recipes


def loads(folder: Path, text: bytes, *overrides: str) -> None:
    """The recipe is right, and then survives a round trip, or every fault of it is explained."""
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        assert error.message.strip()  # noqa: PT017
        return
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


FULL: dict[str, Any] = {
    "model": {"name_or_path": "a/B", "chat_template": "chatml", "chat_template_kwargs": {"a": [1, None, {"b": 1e-5}]}},
    "lora": {"r": 8, "target_modules": ["q_proj"], "rank_pattern": {"q.*": 4}},
    "data": {
        "train": [{"path": "x.jsonl", "columns": {"prompt": "a.b"}, "max_pairs": 3}, "y/*.json"],
        "eval": {"holdout": 0.1},
        "filter": [{"column": "s", "ge": 8}, {"column": "t", "matches": "^a"}, {"column": "u", "in": [1, "b"]}],
    },
    "loss": {"beta": 0.2},
    "train": {"learning_rate": 1e-5, "eval_steps": 0.25, "sample_prompts": ["Why?"], "warmup_steps": 3},
    "output": {"dir": "runs/x"},
}
RECIPES = [FULL, *(yaml.safe_load(path.read_text()) for path in sorted(Path("recipes").glob("*.yaml")))]
KEYS = [*sorted({part for key in section_keys() for part in key.split(".")}), "path", "holdout", "column", "eq", "<<"]

words = st.sampled_from(KEYS) | st.text(max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(
        ["auto", "none", "true", "1e-5", "8-bit", "x.jinja", "(", "{holdout: 3}", "a" * 300, -1, 0, 2**64]
    )
)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=8
)


def containers(tree: Any) -> list[Any]:
    """Every mapping and list of a tree."""
    if not isinstance(tree, dict | list):
        return []
    children = tree.values() if isinstance(tree, dict) else tree
    return [tree, *(found for child in children for found in containers(child))]


@st.composite
def mutated_recipes(draw: st.DrawFn) -> bytes:
    """A right recipe with some of its keys and values replaced, removed or added."""
    tree = copy.deepcopy(draw(st.sampled_from(RECIPES)))
    for _ in range(draw(st.integers(1, 3))):
        node = draw(st.sampled_from(containers(tree)))
        if isinstance(node, list):
            where = draw(st.integers(0, len(node)))
            node[where : where + draw(st.integers(0, 1))] = draw(st.lists(trees, max_size=1))
            continue
        name = draw(st.sampled_from(sorted(node, key=str)) if node and draw(st.booleans()) else words)
        match draw(st.sampled_from(["replace", "remove", "rename"])):
            case "replace":
                node[name] = draw(trees)
            case "remove":
                node.pop(name, None)
            case "rename":
                node[draw(words)] = node.pop(name, None)
    return yaml.dump(tree, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")


@st.composite
def mutated_bytes(draw: st.DrawFn, contents: list[bytes], pieces: list[bytes]) -> bytes:
    """Some content with stretches of it removed, replaced, doubled or cut off."""
    content = draw(st.sampled_from(contents))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        span = draw(st.integers(0, 12))
        match draw(st.sampled_from(["put", "replace", "double", "cut", "flip"])):
            case "put":
                content = content[:at] + draw(st.sampled_from(pieces)) + content[at:]
            case "replace":
                content = content[:at] + draw(st.binary(max_size=span)) + content[at + span :]
            case "double":
                content = content[: at + span] + content[at:]
            case "cut":
                content = content[:at] if draw(st.booleans()) else content[at:]
            case "flip" if at < len(content):
                content = content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
    return content


RECIPE_TEXTS = [yaml.safe_dump(recipe, sort_keys=False).encode() for recipe in RECIPES]
YAML_PIECES = [
    *(b": ", b"- ", b"\n", b"  ", b"\t", b"&a ", b"*a", b"!!python/name:os.system ", b"!!int ", b"<<: ", b"? ", b"|\n"),
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b"'",
        b'"',
        b"#",
        b"---\n",
        b"...\n",
        b"%YAML 1.1\n",
        b"\\x",
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
    ),
    *(b"\xed\xa0\x80", "é\u2028🙂".encode(), b"1e400", b".nan", b"-.inf", b"9" * 5000, b"train:\n", b"lora: null\n"),
]


@fuzz
@given(text=mutated_recipes())
def test_recipes_with_other_keys_and_values(folder: Path, text: bytes) -> None:
    loads(folder, text)


@fuzz
@given(text=mutated_bytes(RECIPE_TEXTS, YAML_PIECES))
def test_recipes_with_other_characters(folder: Path, text: bytes) -> None:
    loads(folder, text)


@fuzz
@given(pieces=st.lists(st.sampled_from(YAML_PIECES) | words.map(lambda word: word.encode("utf-8", "replace"))))
def test_any_text_as_a_recipe(folder: Path, pieces: list[bytes]) -> None:
    loads(folder, b"".join(pieces))


@fuzz
@given(
    overrides=st.lists(
        st.tuples(st.lists(words | st.sampled_from(["0", "1", "-1"]), max_size=4).map(".".join), trees).map(
            lambda pair: f"{pair[0]}={pair[1] if isinstance(pair[1], str) else json.dumps(pair[1])}"
        )
        | st.text(),
        max_size=3,
    )
)
def test_any_overrides(folder: Path, overrides: list[str]) -> None:
    loads(folder, RECIPE_TEXTS[0], *overrides)


# Rows


@pytest.fixture(scope="module")
def tokenise(tiny_base: Path) -> PairTokenizer:
    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": str(tiny_base), "chat_template": "chatml"},
            "data": {"train": "-", "max_length": 120},
        }
    )
    return pair_tokenizer(recipe, load_text_side(recipe))


def outcome(tokenise: PairTokenizer, path: Path, source: dict[str, Any] | None = None, **data: Any) -> Any:
    """The pairs of a file and what is dropped from it; or the error's message."""
    section = DataSection.model_validate({"train": {"path": str(path), **(source or {})}, "max_dropped": 1.0, **data})
    try:
        pairs, _ = load_pairs(section, tokenise, TrainSection())
        read = [(index, result) for index, _, result in pairs.reader.read(only=pairs.usable)]
    except DataError as error:
        assert error.message.strip()  # noqa: PT017
        return error.message
    kept = [(index, pair.chosen_ids.tolist(), pair.chosen_start) for index, pair in read if hasattr(pair, "chosen_ids")]
    assert len(kept) == pairs.pairs
    assert len(kept) + sum(pairs.dropped.values()) == pairs.rows
    return kept, pairs.rows, dict(pairs.dropped), pairs.examples


def reads(tokenise: PairTokenizer, path: Path, content: bytes, **data: Any) -> None:
    """Each row is a pair or dropped for a reason, or the file is refused: the same streamed and in memory."""
    path.write_bytes(content)
    assert outcome(tokenise, path, streaming=False, **data) == outcome(tokenise, path, streaming=True, **data)


TEXTS = st.text(max_size=20) | st.sampled_from(
    [
        *("", " \n", "Q", "\0", "\ud800", "\x1b[31m", "\u202e", "<|im_end|>", "<|im_start|>user\n", "</s>", "<s>"),
        *("\n\nHuman: Q\n\nAssistant: A", "\n\nHuman: Q\n\nAssistant:", "x" * 500, "é\u2028\u0085", "007", "null"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text"]) | TEXTS, inner, max_size=2
        )
        | st.builds(lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "assistant"]), inner)
    ),
    max_leaves=8,
)
COLUMNS = [
    *("prompt", "chosen", "rejected", "system", "instruction", "input", "conversations", "question"),
    *("response_j", "response_k", "score", "history", "labels", "human_ref_A", "preference_strength", "answers"),
]
GOOD: list[dict[str, Any]] = [
    {"prompt": "Q", "chosen": "a", "rejected": "b", "score": 1},
    {"instruction": "Q", "input": "", "chosen": "a", "rejected": "b"},
    {"question": "Q", "response_j": "a", "response_k": "b"},
    {
        "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
        "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "b"}],
    },
    {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"},
    {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
    {"instruction": "Q", "history": [["Q", "A"]], "chosen": "a", "rejected": "b"},
    {"history": "Q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0},
    {"prompt": "Q", "response_1": "a", "response_2": "b", "preference_strength": -1},
    {"prompt": "Q", "answers": [{"chosen": "a", "score": 1}, {"chosen": "b", "score": "0"}]},
    {"prompt": "Q\n<extra_id_1>Assistant\nA\n<extra_id_1>User\nQ", "chosen": "a", "rejected": "b", "score": 0},
]


@st.composite
def rows(draw: st.DrawFn) -> list[Any]:
    """Rows of one shape, of several, and with odd values in their columns."""
    found: list[Any] = []
    shape = draw(st.sampled_from(GOOD))
    for _ in range(draw(st.integers(1, 5))):
        row = copy.deepcopy(draw(st.just(shape) | st.sampled_from(GOOD)))
        row |= draw(st.dictionaries(st.sampled_from([*row, *COLUMNS]) | TEXTS, VALUES, max_size=2))
        found.append(draw(VALUES) if draw(st.integers(0, 9)) == 0 else row)
    return found


def as_lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_csv(rows: list[Any]) -> bytes:
    out = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    writer = csv.DictWriter(out, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(row for row in rows if isinstance(row, dict))
    return out.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(rows: list[Any]) -> bytes:
    """A column with values of several types is one of JSON texts."""
    rows = [row for row in rows if isinstance(row, dict)] or GOOD[:1]
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row if name.isprintable()):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            columns[name] = pa.array([json.dumps(value) for value in values])
    out = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), out)
    except pa.ArrowException:  # an empty struct, which Parquet has no type for
        return as_parquet(GOOD[:1])
    return out.getvalue()


WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    "rows.jsonl": as_lines,
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "rows.csv": as_csv,
    "rows.parquet": as_parquet,
    "rows.jsonl.gz": lambda rows: gzip.compress(as_lines(rows), mtime=0),
    "rows.json.zst": lambda rows: zstandard.ZstdCompressor().compress(json.dumps({"data": rows}).encode()),
}
FILTERS = [
    [],
    [{"column": "score", "ge": 1}],
    [{"column": "prompt", "contains": "Q"}],
    [{"column": "chosen.0", "ne": 3}],
    [{"column": "answers[max score].chosen", "ne": "b"}],
]
SOURCES: list[dict[str, Any]] = [
    {},
    {"columns": {"chosen": "answers[max score].chosen", "rejected": "answers[min score].chosen"}},
    {"group_by": "prompt", "columns": {"chosen": "rows[max score].chosen", "rejected": "rows[min score].chosen"}},
    {"group_by": "prompt", "columns": {"prompt": "rows.0", "chosen": "rows.-1", "rejected": "rows.1"}},
]


@fuzz
@given(
    rows=rows(),
    name=st.sampled_from(list(WRITERS)),
    data=st.fixed_dictionaries(
        {
            "strict": st.booleans(),
            "deduplicate": st.booleans(),
            "filter": st.sampled_from(FILTERS),
            "source": st.sampled_from(SOURCES),
        }
    ),
)
def test_any_rows(folder: Path, tokenise: PairTokenizer, rows: list[Any], name: str, data: dict[str, Any]) -> None:
    reads(tokenise, folder / name, WRITERS[name](rows), **data)


DATA_PIECES = [
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\r\n", b"\0", b"\xff", b"\xe9", b"\xed\xa0\x80", b"\\ud800"),
    *(b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 2000, b'"prompt": 3,', b'"a": 1, "a": 2,'),
    *(b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PAR1", b"\x28\xb5\x2f\xfd"),
]


FILES: dict[str, list[bytes]] = {
    "rows.jsonl": [as_lines(GOOD[:1] * 4), as_lines(GOOD[:2] * 3), as_lines(GOOD[:1]).decode().encode("utf-16")],
    "rows.json": [json.dumps(GOOD, indent=1).encode(), json.dumps({"data": GOOD[:1] * 4}).encode(), as_lines(GOOD)],
    "rows.csv": [as_csv(GOOD[:1] * 4), "prompt,chosen,rejected\nÄ,é,ü\n".encode("latin-1")],
    "rows.tsv": [b"prompt\tchosen\trejected\nQ\ta\tb\n"],
    "rows.parquet": [as_parquet(GOOD[:1] * 4), as_parquet(GOOD[3:4] * 4)],
    "rows.jsonl.gz": [gzip.compress(as_lines(GOOD[:1] * 4), mtime=0)],
    "rows.csv.zst": [zstandard.ZstdCompressor().compress(as_csv(GOOD[:1] * 4))],
    "rows.parquet.gz": [gzip.compress(as_parquet(GOOD[:1]), mtime=0)],
}
ANY_CONTENT = [content for contents in FILES.values() for content in contents]
ANY_FILE = st.tuples(st.sampled_from(list(FILES)), st.binary() | mutated_bytes(ANY_CONTENT, DATA_PIECES))
OF_ITS_KIND = [st.tuples(st.just(name), mutated_bytes(contents, DATA_PIECES)) for name, contents in FILES.items()]


@fuzz
@given(file=st.one_of(ANY_FILE, *OF_ITS_KIND), strict=st.booleans())
def test_any_bytes_as_a_file(folder: Path, tokenise: PairTokenizer, file: tuple[str, bytes], strict: bool) -> None:
    name, content = file
    reads(tokenise, folder / name, content, strict=strict)
