from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_cli.data import sources
from orpo_cli.data.rows import BadRow, Rows
from orpo_cli.data.sources import open_source
from orpo_cli.errors import DataError
from orpo_cli.recipe.schema import SourceSpec
from tests.hub import commit_of, hub, hub_environment
from tests.shared import shared

ROWS: list[dict[str, Any]] = [
    {"prompt": f"Q{i}", "chosen": f"a{i}\n\u2028é", "rejected": "2020-01-01T00:00:00", "score": i} for i in range(7)
]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def put(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def zst(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    packed: bytes = zstandard.ZstdCompressor().compress(content)
    return packed


def opened(*paths: str | dict[str, Any], streaming: Any = "auto") -> Rows:
    specs = [SourceSpec.model_validate({"path": path} if isinstance(path, str) else path) for path in paths]
    return open_source(specs, streaming)


def all_rows(path: str | dict[str, Any]) -> list[Any]:
    """The rows of a source, which must be the same streamed or not, from wherever one starts."""
    held, streamed = opened(path, streaming=False), opened(path, streaming=True)
    rows = list(held.rows())
    assert held.count == len(rows)
    assert (streamed.count, streamed.streamed, held.streamed) == (None, True, False)
    assert held.fingerprint == streamed.fingerprint
    for start in {0, 1, len(rows) // 2, len(rows) - 1, len(rows), len(rows) + 5}:
        assert list(held.rows(start)) == list(streamed.rows(start)) == rows[start:]
        assert list(opened(path, streaming=True).rows(start)) == rows[start:]
    assert [held.where(i) for i in range(len(rows))] == [streamed.where(i) for i in range(len(rows))]
    return rows


def error_of(*paths: str | dict[str, Any], streaming: Any = "auto") -> DataError:
    with pytest.raises(DataError) as caught:
        list(opened(*paths, streaming=streaming).rows())
    return caught.value


# Kinds of files


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.JSONL"])
@pytest.mark.parametrize(
    "content", [lines(ROWS), b"\xef\xbb\xbf" + lines(ROWS), b"\n" + lines(ROWS).replace(b"\n", b"\r\n\r\n")]
)
def test_json_lines(tmp_path, name, content):
    assert all_rows(put(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(tmp_path, name, indent):
    content = json.dumps(ROWS, indent=indent).encode()
    assert all_rows(put(tmp_path / name, content)) == ROWS
    assert all_rows(put(tmp_path / name, b"\xef\xbb\xbf\n " + content + b"\n")) == ROWS


def test_json_array_larger_than_what_is_read_at_a_time(tmp_path):
    rows = [{"prompt": "é" * n, "n": n} for n in (3, 1 << 20, 0, 3 << 20, 7, 1 << 19, 1 << 19, 1)]
    path = put(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False).encode())
    assert list(opened(path, streaming=True).rows()) == rows


@pytest.mark.parametrize("indent", [None, 2])
def test_json_wrapper(tmp_path, indent):
    assert all_rows(put(tmp_path / "a.json", json.dumps({"version": 1, "data": ROWS}, indent=indent).encode())) == ROWS
    assert all_rows(put(tmp_path / "b.json", json.dumps(ROWS[0], indent=indent).encode())) == ROWS[:1]


@pytest.mark.parametrize("pack", [gzip.compress, zst])
def test_compressed(tmp_path, pack):
    suffix = "gz" if pack is gzip.compress else "zst"
    assert all_rows(put(tmp_path / f"a.jsonl.{suffix}", pack(lines(ROWS)))) == ROWS
    assert all_rows(put(tmp_path / f"two.jsonl.{suffix}", pack(lines(ROWS[:2])) + pack(lines(ROWS[2:])))) == ROWS
    assert all_rows(put(tmp_path / f"a.json.{suffix}", pack(json.dumps(ROWS).encode()))) == ROWS
    assert len(all_rows(put(tmp_path / f"a.csv.{suffix}", pack(b"prompt,chosen\na,b\n")))) == 1


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv_keeps_every_text_as_it_stands(tmp_path, name, delimiter):
    rows = [
        {"prompt": 'a, "b"\tc', "chosen": "line\r\nline\n\nline", "rejected": "None"},
        {"prompt": "007", "chosen": "NA", "rejected": "x" * 200_000},
        {"prompt": " ", "chosen": "", "rejected": "true"},
    ]
    with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    assert all_rows(str(tmp_path / name)) == rows


def test_csv_rows_that_do_not_fit_the_header(tmp_path):
    path = put(tmp_path / "a.csv", b'prompt,chosen,rejected\na,b,c\na,b\n\na,"b"x,c\nd,e,f\n')
    good, short, broken, last = all_rows(path)
    assert good == {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert short == BadRow("2 fields under a header of 3")
    assert broken.detail.startswith("not CSV:")
    assert last["prompt"] == "d"


def test_parquet(tmp_path):
    rows = [{**row, "messages": [{"role": "user", "content": "x"}]} for row in ROWS * 100]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=300)
    assert all_rows(str(tmp_path / "a.parquet")) == rows
    packed = gzip.compress((tmp_path / "a.parquet").read_bytes())
    assert all_rows(put(tmp_path / "b.parquet.gz", packed)) == rows
    assert "damaged" in error_of(put(tmp_path / "c.parquet.gz", packed[:-100])).message


# Rows of JSON that are odd


def test_mixed_types_missing_keys_and_nulls_are_kept(tmp_path):
    rows = [{"chosen": "text"}, {"chosen": [{"role": "user", "content": "x"}], "extra": 1}, {"chosen": None}, {}]
    assert all_rows(put(tmp_path / "a.jsonl", lines(rows))) == rows
    assert all_rows(put(tmp_path / "a.json", json.dumps(rows).encode())) == rows


def test_a_broken_line_is_one_bad_row(tmp_path):
    content = b'{"a": 1}\n\n{"a": \n[1, 2]\n"x"\n{"a": 1, "a": 2}\n{"a": NaN}\n{"a": "\\ud83d"}\n' + b"[" * 100_000
    first, broken, array, text, twice, nan, surrogate, deep = all_rows(put(tmp_path / "a.jsonl", content))
    assert first == {"a": 1}
    assert broken == BadRow("not JSON: Expecting value at column 6")
    assert all_rows(put(tmp_path / "b.jsonl", b'{"a": "x\n{}\n'))[0] == BadRow(
        "not JSON: Unterminated string starting at column 7"
    )
    assert array == BadRow("not an object with columns: [1, 2]")
    assert text == BadRow('not an object with columns: "x"')
    assert twice == BadRow("the key 'a' stands twice in one object")
    assert nan == {"a": None}
    assert surrogate == {"a": "\ud83d"}
    assert deep == BadRow("nested more than 100 deep")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_the_first_line_may_be_the_broken_one(tmp_path, name):
    broken, *rows = all_rows(put(tmp_path / name, b'{"prompt": \n' + lines(ROWS)))
    assert isinstance(broken, BadRow)
    assert rows == ROWS


def test_items_of_an_array_that_are_no_rows(tmp_path):
    first, number, twice = all_rows(put(tmp_path / "a.json", b'[{"a": 1}, 17, {"a": 1, "a": 2}]'))
    assert first == {"a": 1}
    assert number == BadRow("not an object with columns: 17")
    assert isinstance(twice, BadRow)


# Where a position is


def test_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(Path("pairs.jsonl"), b'\n{"a": 0}\n{"a": 1}\n\n\n{"a": 2}\n')
    put(Path("more.json"), b'[{"a": 3}, {"a": 4}]')
    for streaming in (True, False):
        rows = opened("pairs.jsonl", "more.json", streaming=streaming)
        assert list(rows.rows())[3] == {"a": 3}
        assert [rows.where(i) for i in range(5)] == [
            "pairs.jsonl, row 0 (line 2)",
            "pairs.jsonl, row 1 (line 3)",
            "pairs.jsonl, row 2 (line 6)",
            "more.json, row 0",
            "more.json, row 1",
        ]
        assert [rows.spec(i).path for i in range(5)] == ["pairs.jsonl"] * 3 + ["more.json"] * 2
        assert rows.bounds() == [(0, 3), (3, 5)]


def test_several_sources_are_read_one_after_the_other(tmp_path):
    parts = [ROWS[:3], ROWS[3:4], ROWS[4:]]
    paths = [put(tmp_path / f"{name}.jsonl", lines(part)) for name, part in zip("cab", parts, strict=True)]
    for streaming in (True, False):
        for start in range(9):
            rows = opened(*paths, streaming=streaming)
            assert list(rows.rows(start)) == ROWS[start:]
        assert [rows.source(i) for i in range(7)] == [0, 0, 0, 1, 2, 2, 2]
        assert rows.heads(2) == [ROWS[:2], ROWS[3:4], ROWS[4:6]]
        assert rows.bounds() == [(0, 3), (3, 4), (4, 7)]
    assert rows.count == 7


def test_heads_pass_over_bad_rows(tmp_path):
    path = put(tmp_path / "a.jsonl", b"x\n" * 5 + lines(ROWS))
    assert opened(path).heads(2) == [ROWS[:2]]


def test_glob_and_directory_are_read_in_sorted_order(tmp_path):
    for name, row in zip(("b", "a", "c"), ROWS, strict=False):
        put(tmp_path / "set" / f"{name}.jsonl", lines([row]))
    put(tmp_path / "set" / "notes.txt", b"x")
    expected = [ROWS[1], ROWS[0], ROWS[2]]
    assert all_rows(str(tmp_path / "set" / "*.jsonl")) == expected
    assert all_rows(str(tmp_path / "set" / "*")) == expected
    assert all_rows(str(tmp_path / "**" / "*.jsonl")) == expected
    assert all_rows(str(tmp_path / "set")) == expected


def test_directory_with_splits(tmp_path):
    put(tmp_path / "train.jsonl", lines(ROWS[:3]))
    put(tmp_path / "test.jsonl", lines(ROWS[3:]))
    assert list(opened(str(tmp_path)).rows()) == ROWS[:3]
    assert list(opened({"path": str(tmp_path), "split": "test"}).rows()) == ROWS[3:]
    assert error_of({"path": str(tmp_path), "split": "dev"}).hint == "its splits are test, train"
    spec = SourceSpec(path=str(tmp_path))
    assert list(open_source([spec], usual=("test", "validation")).rows()) == ROWS[3:]


def test_directory_as_the_hub_lays_it_out(tmp_path):
    for i, row in enumerate(ROWS):
        put(tmp_path / "data" / f"train_prefs-0000{i}-of-00007.jsonl", lines([row]))
    put(tmp_path / "data" / "test_prefs-00000-of-00001.jsonl", lines(ROWS))
    put(tmp_path / "dataset_infos.json", b"{}")
    put(tmp_path / ".cache" / "x.jsonl", b"x")
    assert error_of(str(tmp_path)).hint == "set `split`; its splits are test_prefs, train_prefs"
    assert list(opened({"path": str(tmp_path), "split": "train_prefs"}).rows()) == ROWS


def test_no_file_of_a_directory_is_left_out_unsaid(tmp_path):
    put(tmp_path / "a.csv", b"prompt\nA\n")
    put(tmp_path / "sub" / "my_test.jsonl", b'{"prompt": "B"}')
    assert all_rows(str(tmp_path)) == [{"prompt": "A"}, {"prompt": "B"}]
    put(tmp_path / "test.jsonl", b'{"prompt": "C"}')
    assert "others, such as a.csv" in error_of(str(tmp_path)).message
    assert "no dataset card" in error_of({"path": str(tmp_path), "name": "x"}).message


def test_directory_with_a_dataset_card(tmp_path):
    one = "- config_name: one\n  data_files: [{split: prefs, path: a.jsonl}, {split: sft, path: b.jsonl}]\n"
    two = "- config_name: two\n  data_files: b.jsonl\n"
    put(tmp_path / "README.md", f"---\nconfigs:\n{one}{two}---\n".encode())
    put(tmp_path / "a.jsonl", lines(ROWS[:3]))
    put(tmp_path / "b.jsonl", lines(ROWS[3:]))
    path = str(tmp_path)
    assert list(opened({"path": path, "name": "one", "split": "prefs"}).rows()) == ROWS[:3]
    assert list(opened({"path": path, "name": "two"}).rows()) == ROWS[3:]
    assert error_of({"path": path, "name": "one"}).hint == "set `split`; its splits are prefs, sft"
    assert error_of(path).hint == "set `name` to one of 'one', 'two'"
    assert "no configuration 'three'" in error_of({"path": path, "name": "three"}).message


def test_saved_dataset(tmp_path):
    import datasets

    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict({"train": one.select(range(3)), "test": one.select([6, 5])})
    both.save_to_disk(tmp_path / "both")
    assert all_rows(str(tmp_path / "one")) == ROWS
    assert all_rows(str(tmp_path / "both")) == ROWS[:3]
    test = opened({"path": str(tmp_path / "both"), "split": "test"})
    assert list(test.rows()) == [ROWS[6], ROWS[5]]
    assert test.where(1).endswith("both (test), row 1")
    assert error_of({"path": str(tmp_path / "both"), "split": "dev"}).hint == "its splits are train, test"
    assert "has no 'dev'" in error_of({"path": str(tmp_path / "one"), "split": "dev"}).message
    assert "no configuration 'x'" in error_of({"path": str(tmp_path / "one"), "name": "x"}).message


def test_large_files_are_streamed(tmp_path, monkeypatch):
    path = put(tmp_path / "a.jsonl", lines(ROWS))
    assert not opened(path).streamed
    monkeypatch.setattr(sources, "STREAM_ABOVE_BYTES", 100)
    assert opened(path).streamed
    assert not opened(path, streaming=False).streamed


def test_the_fingerprint_is_the_contents(tmp_path):
    a, b = put(tmp_path / "a.jsonl", lines(ROWS)), put(tmp_path / "b.jsonl", lines(ROWS))
    first = opened(a).fingerprint
    assert first == opened(b).fingerprint
    assert first != opened(a, b).fingerprint
    put(tmp_path / "a.jsonl", lines(ROWS).replace(b"Q3", b"Q33"))
    assert first != opened(a).fingerprint


def test_real_files():
    counts = {
        "instruction-preference.json": 1100,
        "hh-rlhf-harmless-test.jsonl.gz": 2312,
        "sharegpt-dpo-en.json": 300,
        "hh_rlhf_tiny.json": 1,
        "stack_exchange_paired_tiny.json": 25,
    }
    for name, count in counts.items():
        path = shared(f"data/{name}")
        text = (gzip.open if name.endswith(".gz") else open)(path, "rt", encoding="utf-8").read()
        expected = [json.loads(line) for line in text.splitlines()] if "jsonl" in name else json.loads(text)
        for streaming in (True, False):
            assert list(opened(str(path), streaming=streaming).rows()) == expected
        assert len(expected) == count


# Rows that hold one answer each


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_rows_that_follow_one_another_are_grouped(tmp_path, name):
    rows = [{"q": q, "a": i} for i, q in enumerate(["x", "x", "y", "x", None, None, "z", "z", "z"])]
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name, row_group_size=4)
    else:
        put(tmp_path / name, lines(rows) if name.endswith("jsonl") else json.dumps(rows).encode())
    grouped = all_rows({"path": str(tmp_path / name), "group_by": "q"})
    assert [(row["q"], [member["a"] for member in row["rows"]]) for row in grouped] == [
        *(("x", [0, 1]), ("y", [2]), ("x", [3]), (None, [4]), (None, [5]), ("z", [6, 7, 8]))
    ]
    assert [member for row in grouped for member in row["rows"]] == rows
    held = opened({"path": str(tmp_path / name), "group_by": "q"})
    assert held.where(5) == f"{tmp_path / name} by q, row 5"
    assert held.fingerprint != opened(str(tmp_path / name)).fingerprint
    assert [i for i, _ in held.numbered(1, lambda i: i % 2 == 1)] == [1, 3, 5]


def test_a_bad_row_is_in_no_group(tmp_path):
    path = put(tmp_path / "a.jsonl", b'{"q": "x"}\n{"q": "x"}\nbroken\n{"a": 1}\n{"q": "x"}\n')
    rows = all_rows({"path": path, "group_by": "q"})
    assert rows[0] == {"q": "x", "rows": [{"q": "x"}, {"q": "x"}]}
    assert isinstance(rows[1], BadRow)
    assert rows[2:] == [{"q": None, "rows": [{"a": 1}]}, {"q": "x", "rows": [{"q": "x"}]}]


def test_groups_by_a_column_that_is_not_there(tmp_path):
    path = put(tmp_path / "a.jsonl", lines(ROWS))
    error = error_of({"path": path, "group_by": "promt"})
    assert error.message == f"group_by: {path} has no column 'promt'"
    assert error.hint == "it has prompt, chosen, rejected, score"


# Errors


def test_missing_file_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(Path("data/pairs.jsonl"), lines(ROWS))
    error = error_of("data/pars.jsonl")
    assert (error.message, error.hint) == (
        "there is no file or directory data/pars.jsonl",
        "nearest: data/pairs.jsonl",
    )
    assert error_of("dta/pairs.jsonl").hint == "nearest: data"
    assert error_of("data/x/y/pairs.jsonl").message == "there is no file or directory data/x/y/pairs.jsonl"
    assert error_of("data/*.csv").message == "no data file matches data/*.csv"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_empty_file(tmp_path, name):
    assert error_of(put(tmp_path / name, b"")).message.endswith(f"{name} holds no rows")


def test_files_without_rows(tmp_path):
    assert error_of(put(tmp_path / "a.json", b"[]")).message.endswith("holds no rows")
    assert error_of(put(tmp_path / "a.jsonl", b"\n \n")).message.endswith("holds no rows")
    assert error_of(put(tmp_path / "a.csv", b"prompt,chosen,rejected\n")).message.endswith("holds no rows")


def test_wrong_kind_of_file(tmp_path):
    error = error_of(put(tmp_path / "a.txt", b"x"))
    assert "is of no kind that can be read" in error.message
    assert ".jsonl" in (error.hint or "")
    assert "of no kind" in error_of(put(tmp_path / "a.txt.gz", b"x")).message
    (tmp_path / "empty").mkdir()
    assert "holds no data file" in error_of(str(tmp_path / "empty")).message


def test_a_file_has_no_splits(tmp_path):
    path = put(tmp_path / "a.jsonl", lines(ROWS))
    assert list(opened({"path": path, "split": "train"}).rows()) == ROWS
    assert "has no split 'test'" in error_of({"path": path, "split": "test"}).message
    assert "no configuration 'x'" in error_of({"path": path, "name": "x"}).message
    for place in (path, str(tmp_path), str(tmp_path / "*.jsonl")):
        assert "has no revision 'v9'" in error_of({"path": place, "revision": "v9"}).message


@pytest.mark.parametrize("pack", [gzip.compress, zst])
@pytest.mark.parametrize("streaming", [True, False])
def test_truncated_archive(tmp_path, pack, streaming):
    rows = [{"prompt": str(hash(str(i)))} for i in range(50_000)]
    suffix = "gz" if pack is gzip.compress else "zst"
    content = pack(lines(rows))
    error = error_of(put(tmp_path / f"a.jsonl.{suffix}", content[:-1000]), streaming=streaming)
    assert f"a.jsonl.{suffix} is damaged or cut short: row 4" in error.message
    assert " (line 4" in error.message
    assert "damaged" in error_of(put(tmp_path / f"b.jsonl.{suffix}", lines(ROWS))).message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'[{"a": 1}, {"a": ]', "row 1: not JSON: Expecting value: '{\"a\": ]'"),
        (b'[{"a": 1}, {"a": 2}', "row 1: the array does not end"),
        (b'[{"a": 1},', "row 1: the array does not end"),
        (b'{"data": [\n{"a": 1}\n', "line 3: not JSON: Expecting ',' delimiter"),
    ],
)
def test_broken_json_files(tmp_path, content, problem):
    assert problem in error_of(put(tmp_path / "a.json", content)).message


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.json", "a.csv"])
def test_a_byte_that_is_not_utf8_spoils_its_own_text_alone(tmp_path, name):
    content = {
        "a.jsonl": '{"p": "a", "q": "é"}\n{"p": "b", "q": "c"}\n',
        "a.json": '[{"p": "a", "q": "é"},\n{"p": "b", "q": "c"}]',
        "b.json": '{"data": [{"p": "a", "q": "é"}, {"p": "b", "q": "c"}]}',
        "a.csv": "p,q\na,é\nb,c\n",
    }[name]
    expected = [{"p": "a", "q": "\udce9"}, {"p": "b", "q": "c"}]
    assert all_rows(put(tmp_path / name, content.encode("latin-1"))) == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_utf16_is_refused(tmp_path, name):
    content = 'p,q\n{"p": "a"}\n'.encode("utf-16")
    error = error_of(put(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content))
    assert f"{name} is UTF-16, not UTF-8" in error.message
    assert "iconv -f UTF-16" in (error.hint or "")


def test_a_last_line_that_is_cut_short_is_a_bad_row_that_says_so(tmp_path):
    *rows, last = all_rows(put(tmp_path / "a.jsonl", lines(ROWS)[:-9]))
    assert rows == ROWS[:-1]
    assert last.detail.startswith("not JSON:")
    assert "cut short" in last.detail


def test_rows_nested_too_deeply_and_numbers_too_long(tmp_path):
    deep, number = "[" * 300 + "]" * 300, "9" * 5000
    for content in (f'{{"a": {deep}}}\n{deep}\n{{"a": {number}}}\n', f'[{{"a": {deep}}}, {deep}, {{"a": {number}}}]'):
        first, second, third = all_rows(put(tmp_path / "a.json", content.encode()))
        assert first == second == BadRow("nested more than 100 deep")
        assert third == {"a": float("inf")}


def test_a_csv_header_that_is_broken(tmp_path):
    assert "line 1: not CSV" in error_of(put(tmp_path / "a.csv", b'"p"q,r\n1,2\n')).message


def test_damaged_parquet_and_lfs_pointer(tmp_path):
    assert "damaged, or no Parquet" in error_of(put(tmp_path / "a.parquet", b"PAR1 nothing")).message
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for name in ("a.jsonl", "a.parquet"):
        assert "Git LFS pointer" in error_of(put(tmp_path / name, pointer)).message


@pytest.mark.parametrize("streaming", [True, False])
def test_damaged_parquet_is_never_taken_for_a_shorter_one(tmp_path, streaming):
    pq.write_table(pa.Table.from_pylist(ROWS * 100), tmp_path / "a.parquet", row_group_size=200, use_dictionary=False)
    whole = (tmp_path / "a.parquet").read_bytes()
    for end in range(0, len(whole), len(whole) // 20):
        assert "damaged" in error_of(put(tmp_path / "b.parquet", whole[:end]), streaming=streaming).message
    assert "damaged" in error_of(put(tmp_path / "b.parquet", whole.replace(b"prompt", b"\xe3rompt"))).message
    middle = len(whole) // 2
    spoilt = whole[: middle - 500] + bytes(1000) + whole[middle + 500 :]
    assert "damaged" in error_of(put(tmp_path / "b.parquet", spoilt), streaming=streaming).message


def test_values_of_parquet_that_python_has_none_for(tmp_path):
    days = pa.array([0, 10**15, 1], pa.int64()).view(pa.timestamp("s"))
    words = pa.array([b"a", b"b", b"\xe9"]).view(pa.string())
    pq.write_table(pa.table({"day": days, "p": words}), tmp_path / "a.parquet")
    first, second, third = all_rows(str(tmp_path / "a.parquet"))
    assert first["p"] == "a"
    assert second.detail.startswith("a value cannot be read: ")
    assert "utf-8" in third.detail


def test_a_table_with_a_column_twice(tmp_path):
    assert "two columns are named 'a'" in error_of(put(tmp_path / "a.csv", b"a,a\n1,2\n")).message
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"]), tmp_path / "a.parquet")
    assert "two columns are named 'a'" in error_of(str(tmp_path / "a.parquet")).message


# The hub, against a stand-in

_OPEN = """
import json, sys
from orpo_cli.data.sources import open_source
from orpo_cli.errors import OrpoError
from orpo_cli.recipe.schema import SourceSpec

for source, streaming in json.loads(sys.argv[1]):
    try:
        rows = open_source([SourceSpec.model_validate(source)], streaming)
        found = {"streamed": rows.streamed, "count": rows.count, "rows": list(rows.rows()), "tail": list(rows.rows(5)),
                 "where": rows.where(2), "fingerprint": rows.fingerprint}
    except OrpoError as error:
        found = {"error": error.message, "hint": error.hint}
    print(json.dumps(found))
"""

_CARD = b"""---
configs:
- config_name: one
  data_files: [{split: train_prefs, path: a.parquet}, {split: test_prefs, path: b.parquet}]
- config_name: two
  data_files: a.parquet
---
"""


def ask(environment: dict[str, str], *cases: tuple[dict[str, Any], Any]) -> list[dict[str, Any]]:
    """Open sources in a process of its own: the libraries read the endpoint when they are imported."""
    command = [sys.executable, "-c", _OPEN, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "hf_let_me_in" not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub(tmp_path):
    import io

    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS[2:]), table)
    plain = {"train.jsonl": lines([{"prompt": row["prompt"], "score": row["score"]} for row in ROWS])}
    expected = [{"prompt": row["prompt"], "score": row["score"]} for row in ROWS]
    repositories = {
        "datasets/someone/plain": plain,
        "datasets/someone/configured": {"README.md": _CARD}
        | dict.fromkeys(("a.parquet", "b.parquet"), table.getvalue()),
        "datasets/someone/closed": plain,
        "datasets/someone/script": {"script.py": b"raise SystemExit('ran')"},
    }
    prefs = {"path": "someone/configured", "name": "one", "split": "test_prefs"}
    with hub(repositories, gated=frozenset({"datasets/someone/closed"})) as url:
        environment = hub_environment(url, tmp_path / "home")
        streamed, held, pinned, sliced, parquet, parquet_streamed, *errors = ask(
            environment,
            ({"path": "someone/plain"}, "auto"),
            ({"path": "someone/plain"}, False),
            ({"path": "someone/plain", "revision": commit_of(plain)}, True),
            ({"path": "someone/plain", "split": "train[:2]"}, "auto"),
            (prefs, False),
            (prefs, True),
            ({"path": "someone/plain", "split": "train[:2]"}, True),
            ({"path": "someone/plain", "split": "test"}, "auto"),
            ({"path": "someone/plain", "revision": "v2"}, "auto"),
            ({"path": "someone/configured"}, "auto"),
            ({"path": "someone/configured", "name": "three"}, "auto"),
            ({"path": "someone/configured", "name": "one"}, "auto"),
            ({"path": "someone/nothing"}, "auto"),
            ({"path": "someone/closed"}, "auto"),
            ({"path": "someone/script"}, "auto"),
        )
        [opened_with_token] = ask(environment | {"HF_TOKEN": "hf_let_me_in"}, ({"path": "someone/closed"}, True))
    offline = hub_environment(url, tmp_path / "home", HF_HUB_OFFLINE="1")
    cached, absent = ask(offline, ({"path": "someone/plain"}, "auto"), ({"path": "someone/nothing"}, "auto"))

    assert (streamed["streamed"], streamed["count"]) == (True, None)
    assert (held["streamed"], held["count"]) == (False, 7)
    for found in (streamed, held, pinned, opened_with_token, cached):
        assert found["rows"] == expected
        assert found["tail"] == expected[5:]
    assert streamed["where"] == "someone/plain (train), row 2"
    assert streamed["fingerprint"] == held["fingerprint"] == pinned["fingerprint"] == cached["fingerprint"]
    assert (sliced["streamed"], sliced["rows"]) == (False, expected[:2])
    assert parquet["rows"] == parquet_streamed["rows"] == ROWS[2:]
    assert [found["error"] for found in (*errors, absent)] == [
        "someone/plain: a slice of a split, 'train[:2]', cannot be streamed",
        "someone/plain has no split 'test'",
        "the hub dataset someone/plain has no revision 'v2'",
        "someone/configured has several configurations",
        "someone/configured has no configuration 'three'",
        "someone/configured has several splits, and none is called train",
        "there is no file, directory or hub dataset someone/nothing, or it is private",
        "the hub dataset someone/closed is gated",
        "someone/script is a loading script, and code from the hub is not run",
        "someone/nothing is not in the hub's local cache, and HF_HUB_OFFLINE forbids to download it",
    ]
    hints = [found["hint"] or "" for found in errors]
    assert "its splits are train" in hints[1]
    assert "'one', 'two'" in hints[3]
    assert "train_prefs, test_prefs" in hints[5]
    assert "HF_TOKEN" in hints[6]
    assert "https://huggingface.co/datasets/someone/closed" in hints[7]
