"""YAML's traps, and values that come back as they went."""

from __future__ import annotations

import math

import pytest
import yaml

from orpo_cli.recipe.strict_yaml import YamlFault, dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-5", 1e-5), ("8e-6", 8e-6), ("1e5", 1e5), ("1.5E+3", 1500.0), (".5", 0.5), ("-2.", -2.0), ("+3", 3)],
        *[("16", 16), ("-0", 0), ("0", 0), (".inf", math.inf), ("-.inf", -math.inf)],
        *[("true", True), ("False", False), ("null", None), ("~", None), ("", None)],
        *[(word, word) for word in ("no", "off", "Yes", "on", "y", "n", "None", "nan", "inf")],
        *[(word, word) for word in ("1_000", "0123", "0x10", "0o7", "1:30", "2020-01-01", "1.2.3", "e5", "1e", "=")],
        *[("'16'", "16"), ('"true"', "true"), ("'1e-5'", "1e-5"), ("!!str 16", "16"), ("!!float 1", 1.0)],
    ],
)
def test_scalars(text: str, value: object) -> None:
    read = parse(f"key: {text}").value["key"]
    assert read == value
    assert type(read) is type(value)


def test_every_value_has_its_line() -> None:
    tree = parse("a: 1\n# note\nb:\n  - x\n  - c: 2\n    d: {e: 3,\n        f: 4}\n")
    lines = {key: written.line for key, written in tree.written.items() if key}
    assert lines == {"a": 1, "b": 3, "b.0": 4, "b.1": 5, "b.1.c": 5, "b.1.d": 6, "b.1.d.e": 6, "b.1.d.f": 7}


def test_the_first_of_two_equal_keys_counts_and_the_second_is_noted() -> None:
    tree = parse("a: 1\nb: {c: 1, c: 2}\na: 3\n")
    assert tree.value == {"a": 1, "b": {"c": 1}}
    assert tree.duplicates == [("b.c", 2), ("a", 3)]


def test_anchors_are_followed() -> None:
    assert parse("a: &x {b: [1]}\nc: *x\n").value == {"a": {"b": [1]}, "c": {"b": [1]}}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: [1,\n", 2, "not valid YAML"),
        ("a:\n\t- b", 2, "not valid YAML"),
        ("a: 1\nb: c: d", 2, "mapping values are not allowed here"),
        ("a: 1\n--- \nb: 2", 2, "expected a single document"),
        ("a: 1\nb: *c", 2, "undefined alias"),
        ("a: 1\nb: &b [*b]", 2, "an alias inside of what it stands for"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]", 2, "!!python/object/apply:os.system"),
        ("a: !!python/name:os.system", 1, "!!python/name:os.system"),
        ("a: !mine 3", 1, "!mine"),
        ("a: !!binary aGk=", 1, "!!binary"),
        ("a: !!set {b, c}", 1, "!!set"),
        ("a: !!int x", 1, "not of the type !!int"),
        ("a: !!bool no", 1, "not of the type !!bool"),
        ("a: " + "9" * 5000, 1, "not of the type !!int"),
        ("b: &b {c: 1}\na:\n  <<: *b", 3, "merge keys"),
        ("? [1, 2]\n: 3", 1, "a key must be a word"),
        ("a: 1\nb: \x01", 2, "not allowed"),
        ("[" * 3000, 1, "nested too deeply"),
        ("a: 'open\n", 2, "not valid YAML"),
    ],
)
def test_what_is_refused(text: str, line: int, message: str) -> None:
    with pytest.raises(YamlFault) as caught:
        parse(text)
    assert message in caught.value.message
    assert caught.value.line == line


def test_a_million_laughs_stay_small() -> None:
    laughs = ["l0: &l0 [" + ", ".join(["lol"] * 10) + "]"]
    laughs += [f"l{i}: &l{i} [" + ", ".join([f"*l{i - 1}"] * 10) + "]" for i in range(1, 9)]
    with pytest.raises(YamlFault, match="more than 10,000 values"):
        parse("\n".join(laughs))


AWKWARD = [
    *["1e-5", "16", "no", "true", "null", "~", "", " ", "a: b", "# no", "- x", "*a", "&a", "!t", "%d", "@x", "`"],
    *["line\nline\n", "\ttab", "trailing ", "é 漢 🙂", "\u2028", "\x07", "'", '"', "2020-01-01", "1_000", "1:30"],
    *["{}", "[]", "<<", "=", 1e-8, 1e22, 0.1, -0.0, 5, -3, True, False, None, [], {}, [[]], [{}]],
    *[{"a": {"b": [1, {"c": None}]}}, {"0123": 1}],
]


@pytest.mark.parametrize("value", AWKWARD, ids=repr)
def test_what_is_dumped_is_read_back(value: object) -> None:
    text = dump({"key": value, "list": [value]})
    assert parse(text).value == {"key": value, "list": [value]}


@pytest.mark.parametrize("word", ["no", "1_000", "1:30", "0123", "2020-01-01", "16", "true", "y: n"])
def test_stock_readers_take_our_text_for_text_too(word: str) -> None:
    assert yaml.safe_load(dump({"key": word})) == {"key": word}
