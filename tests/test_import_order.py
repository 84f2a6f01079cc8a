"""The story in which the modules tell one another nothing that comes later: each imports only what stands before it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import orpo_cli

ORDER = (
    # what every chapter needs
    "__init__ errors redact signals malloc files terminal metrics statistics diversity",
    # the story
    "recipe",
    "data",
    "model",
    "loss",
    "scores",
    "run_directory runs subject",
    "inspect generate answers evaluate merge",
    "train",
    "report",
    # the verbs that go the whole way, or look ahead at it; train.run is `orpo train`
    "init train.inputs train.finish train.run plan sweep demo doctor",
    "help cli __main__",
)
PLACES = {name: place for place, chapter in enumerate(ORDER) for name in chapter.split()}
PACKAGE = Path(orpo_cli.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def place_of(module: str) -> int:
    """The module's own place, else that of the package it is in."""
    return PLACES[module] if module in PLACES else PLACES[module.partition(".")[0]]


def imported(tree: ast.AST) -> Iterator[str]:
    """The package's modules that are imported anywhere in the code; names that only types need are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "orpo_cli":
            _, _, module = (node.module or "").partition(".")
            for alias in node.names:
                within = f"{module}.{alias.name}".lstrip(".")
                yield within if within in MODULES else module or "__init__"
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("orpo_cli") for alias in node.names), "write `from orpo_cli import`"
        yield from imported(node)


IMPORTS = {module: set(imported(ast.parse(path.read_text()))) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_stands_before_it(module):
    later = {other for other in IMPORTS[module] if place_of(other) > place_of(module)}
    assert not later, f"{module} stands before {', '.join(sorted(later))}"


@pytest.mark.parametrize("package", sorted({module.partition(".")[0] for module in MODULES if "." in module}))
def test_the_reading_order_of_a_package_is_that_of_its_imports(package):
    told = (ast.get_docstring(ast.parse(MODULES[package].read_text())) or "").partition("Reading order:")[2]
    order = [f"{package}.{name}" for name in re.findall(r"`(\w+)`", told)]
    assert sorted(order) == sorted(module for module in MODULES if module.startswith(f"{package}."))
    for place, module in enumerate(order):
        assert IMPORTS[module].isdisjoint(order[place:]), module


def test_nothing_is_imported_in_a_circle():
    assert list(TopologicalSorter(IMPORTS).static_order())


def test_every_name_of_the_order_is_a_module():
    assert set(PLACES) <= set(MODULES)
