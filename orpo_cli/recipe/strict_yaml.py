"""YAML with its traps closed: text -> plain values, and the line of each of them.

Against PyYAML's `safe_load`: `1e-5` is a number; `no`, `on`, `1:30`, `1_000`, `0123` and dates are text; a duplicate
key is a fault; tags are refused; anchors cannot blow a small file up.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_VALUES = 10_000
"""Most values a recipe may hold once its aliases are followed."""


@dataclass(frozen=True)
class Written:
    """How a value stands in the text: the line of its key or list item (from 1), and a scalar's own letters."""

    line: int
    raw: str | None = None


@dataclass
class Tree:
    """The values of a YAML text, and for each dotted key how it was written."""

    value: Any
    written: dict[str, Written] = field(default_factory=dict)
    duplicates: list[tuple[str, int]] = field(default_factory=list)
    """The keys given twice, each with the line of the one too many; the first one counts."""
    size: int = 0
    """Values met, aliases followed."""


class YamlFault(Exception):  # noqa: N818 - a fault of the recipe, which the caller reports as one
    """The text is not the YAML that recipes are written in."""

    def __init__(self, message: str, line: int, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line
        self.hint = hint


class _Loader(yaml.SafeLoader):
    """Composes nodes with our own idea of which plain scalars are no text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the base class declares it so


_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_Loader.add_implicit_resolver(f"{_TAG}null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), [*"tTfF"])
_Loader.add_implicit_resolver(f"{_TAG}int", re.compile(r"[-+]?(0|[1-9][0-9]*)$"), [*"-+0123456789"])
_Loader.add_implicit_resolver(f"{_TAG}float", _FLOAT, [*"-+.0123456789"])


class _Dumper(yaml.SafeDumper):
    """Quotes what this reader, or a stock YAML 1.1 one, would not take for text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(f"{_TAG}float", _FLOAT, [*"-+.0123456789"])

_SCALARS: dict[str, Callable[[str], Any]] = {
    f"{_TAG}null": lambda raw: None,
    f"{_TAG}bool": lambda raw: {"true": True, "false": False}[raw.lower()],
    f"{_TAG}int": int,
    f"{_TAG}float": lambda raw: float(raw.replace(".inf", "inf").replace(".nan", "nan")),
    f"{_TAG}str": str,
}


def parse(text: str) -> Tree:
    """Read one YAML document of mappings, lists and plain scalars.

    Raises `YamlFault` with the line where the text is no YAML, or more of YAML than a recipe needs: tags other than
    those of plain scalars, several documents, merge keys, recursion, a million laughs.
    """
    try:
        node = _Loader(text).get_single_node()
        tree = Tree(None)
        if node is not None:
            tree.value = _convert(node, "", tree, set())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise YamlFault(*_explain(error, text, line)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlFault(f"not valid YAML: the character #x{error.character:04x} is not allowed", line) from error
    except RecursionError as error:
        raise YamlFault("nested too deeply", 1) from error
    return tree


def scalar(raw: str) -> Any:
    """What a plain scalar means here: text, number, true, false or null."""
    resolved = _Loader("").resolve(yaml.ScalarNode, raw, (True, False))
    return _SCALARS[resolved](raw)


def dump(value: Any) -> str:
    """Write values as block YAML, in their own order, such that `parse` reads them back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=110)


def join(key: str, part: str | int) -> str:
    """`train`, `seed` -> `train.seed`."""
    return f"{key}.{part}" if key else str(part)


def _explain(error: yaml.MarkedYAMLError, text: str, line: int) -> tuple[str, int, str | None]:
    problem = str(error.problem or error.context)
    if problem.startswith("but "):  # the second half of a sentence that the context begins
        problem = f"{error.context}, {problem}"
    hint = None
    if "\\t" in problem:
        hint = "indent with spaces, not tabs"
    elif "mapping values" in problem:
        hint = 'put text that holds ": " in quotes, and a space after each colon of a key'
    lines = text.splitlines()
    near = f" near {lines[line - 1].strip()[:40]!r}" if line <= len(lines) and lines[line - 1].strip() else ""
    return f"not valid YAML{near}: {problem}", line, hint


def _convert(node: yaml.Node, key: str, tree: Tree, ancestors: set[int]) -> Any:
    """The value of a node, noting in `tree` how each key under it is written."""
    line = node.start_mark.line + 1
    tree.written.setdefault(key, Written(line, node.value if isinstance(node, yaml.ScalarNode) else None))
    tree.size += 1
    if tree.size > MAX_VALUES:
        raise YamlFault(f"more than {MAX_VALUES:,} values, aliases followed", line)
    if id(node) in ancestors:
        raise YamlFault("an alias inside of what it stands for", line)
    if isinstance(node, yaml.ScalarNode):
        return _scalar_value(node, line)
    if node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
        raise YamlFault(f"the tag {_tag_name(node.tag)} is not used in recipes", line, "remove the tag")
    ancestors = ancestors | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        return [_convert(item, join(key, i), tree, ancestors) for i, item in enumerate(node.value)]
    return _mapping_value(node, key, tree, ancestors)


def _mapping_value(node: yaml.Node, key: str, tree: Tree, ancestors: set[int]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise YamlFault("a key must be a word, not a list or mapping", line)
        name = key_node.value
        if name == "<<":
            raise YamlFault("merge keys (<<) are not used in recipes", line, "write the keys out")
        child = join(key, name)
        if name in mapping:
            tree.duplicates.append((child, line))
            continue
        raw = value_node.value if isinstance(value_node, yaml.ScalarNode) else None
        tree.written[child] = Written(line, raw)
        mapping[name] = _convert(value_node, child, tree, ancestors)
    return mapping


def _scalar_value(node: yaml.ScalarNode, line: int) -> Any:
    if node.tag not in _SCALARS:
        raise YamlFault(f"the tag {_tag_name(node.tag)} is not used in recipes", line, "remove the tag")
    try:
        return _SCALARS[node.tag](node.value)
    except (ValueError, KeyError) as error:
        raise YamlFault(f"{node.value[:40]!r} is not of the type {_tag_name(node.tag)}", line) from error


def _tag_name(tag: str) -> str:
    return tag.replace(_TAG, "!!")
