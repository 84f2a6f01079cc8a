"""README and docs say what is: recipes load, command lines parse, names are the code's, files are there."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from orpo_cli.cli import app
from orpo_cli.data.dataset import DROP_REASONS
from orpo_cli.data.formats import FORMATS, read_pair, recognise
from orpo_cli.inspect import open_data, summarise
from orpo_cli.recipe import load_recipe
from orpo_cli.recipe.checks import NOT_YET
from orpo_cli.recipe.schema import FILTER_OPERATORS, Recipe
from orpo_cli.sweep import grid

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
OUTPUT = (ROOT / "docs" / "output.md").read_text(encoding="utf-8")


def fenced(text: str, language: str) -> list[str]:
    """The contents of all code blocks in a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of its rank."""
    start = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert start, f"there is no heading {heading!r}"
    rest = text[start.end() :]
    end = re.search(rf"^#{{1,{len(start[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def keys_of_tables(text: str) -> list[str]:
    """The names in the first column of all tables, their headings left out."""
    tables = re.findall(r"^\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def documented(language: str) -> Iterator[tuple[str, str]]:
    """(page, block) of all code blocks in a language."""
    for page in PAGES:
        for block in fenced(page.read_text(encoding="utf-8"), language):
            yield page.name, block


@pytest.mark.parametrize(("page", "recipe"), documented("yaml"))
def test_every_recipe_loads(page, recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    load_recipe(path)


COMMANDS = [line for _, block in documented("sh") for line in block.splitlines()]
# `orpo ...`, or the same by a launcher of processes.
ORPO_LINES = [
    re.sub(r" < \S+", "", re.sub(r"^.* -m orpo_cli ", "orpo ", line))
    for line in COMMANDS
    if re.search(r"^orpo | -m orpo_cli ", line)
]


@pytest.mark.parametrize("line", ORPO_LINES)
def test_every_command_line_parses(line):
    _, verb, *arguments = shlex.split(line, comments=True)
    group = typer.main.get_command(app)
    assert verb in group.commands
    group.commands[verb].make_context(verb, arguments)


def test_the_first_recipe_is_the_one_in_recipes():
    assert fenced(README, "yaml")[0] == (ROOT / "recipes" / "llama-3.1-8b-qlora.yaml").read_text(encoding="utf-8")
    assert load_recipe(ROOT / "recipes" / "llama-3.1-8b-qlora.yaml").output.dir in README


def test_overrides_of_the_readme_fit_its_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(fenced(README, "yaml")[0], encoding="utf-8")
    lines = [shlex.split(line, comments=True) for line in ORPO_LINES if "--set" in line]
    assert lines
    for words in lines:
        settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
        if words[1] == "sweep":
            grid(path, settings)
        else:
            load_recipe(path, settings)


def test_every_verb_is_explained():
    assert set(typer.main.get_command(app).commands) <= set(re.findall(r"orpo (\w+)", README)) | {"demo"}


def test_every_make_target_exists():
    targets = set(re.findall(r"^make (\w+)", "\n".join(COMMANDS), re.MULTILINE))
    assert targets == {"demo", "faults", "test"}
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_there(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert all((page.parent / link).exists() for link in links if "://" not in link)


def test_the_extras_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", project, re.DOTALL)[1]
    assert keys_of_tables(section(README, "Set up")) == re.findall(r"^(\w+) = \[", extras, re.MULTILINE)


def test_constraints_name_the_torch_of_the_readme():
    [pinned] = re.findall(r"^pip install (torch==\S+)", "\n".join(COMMANDS), re.MULTILINE)
    assert pinned in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_a_run_directory_holds_what_is_listed(tiny_run):
    [listing] = [block for block in fenced(README, "") if "manifest.json" in block]
    names = {line.split()[0].rstrip("/") for line in listing.splitlines()}
    assert {path.name for path in tiny_run.iterdir()} == names - {"samples.jsonl", "trackers"}  # nothing asked for them


def test_metrics_keys_are_those_of_a_run(tiny_run):
    rows = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    named = keys_of_tables(section(OUTPUT, "metrics.jsonl"))
    evaluation = {key for key in named if key.startswith("eval_")}
    training = set(named) - evaluation
    assert len(named) == len(set(named))
    for row in rows:
        is_evaluation = "eval_loss" in row
        assert set(row) == (evaluation | {"step", "epoch"} if is_evaluation else training)


def test_eval_keys_are_those_of_a_run(tiny_run):
    figures = json.loads((tiny_run / "eval.json").read_text())
    assert set(keys_of_tables(section(OUTPUT, "eval.json"))) == {k for k in figures if not k.endswith("_ci95")}


def test_keys_of_the_datas_figures_are_those_of_a_recipe(tiny_recipe):
    table = section(DATA, "What `orpo data` counts")
    figures = summarise(open_data(load_recipe(tiny_recipe())))
    named = [name for row in re.findall(r"^\|(.*?)\|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert set(named) == set(figures["train"]) == set(figures["eval"])
    assert set(figures) - {"model", "end_of_turn", "added_tokens"} <= set(re.findall(r"`(\w+)`", table.split("|")[0]))


@pytest.mark.parametrize("block", fenced(README, "python"))
def test_the_result_is_used_as_shown(block, tiny_run, tiny_base):
    names: dict = {}
    block = block.replace("RUN", str(tiny_run)).replace("meta-llama/Llama-3.1-8B", str(tiny_base))
    exec(block.replace("max_new_tokens=200", "max_new_tokens=2"), names)
    assert names["model"].generation_config.eos_token_id == names["tokenizer"].eos_token_id


def test_keys_that_are_refused_for_now_are_listed():
    listed = section(README, "Not yet").split("\n\n")[1]
    keys = {key.split(".*.")[-1] for key in NOT_YET}
    assert keys == set(re.findall(r"`([^`]+)`", listed))


def test_keys_of_the_recipe_exist():
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    for page in PAGES:
        for name, key in re.findall(
            r"`(model|lora|data|loss|train|output)\.(\w+)[`:]", page.read_text(encoding="utf-8")
        ):
            kinds = getattr(sections[name], "__args__", (sections[name],))
            assert any(key in getattr(kind, "model_fields", {}) for kind in kinds), f"{page.name}: {name}.{key}"


def test_formats_are_listed_in_their_order():
    assert keys_of_tables(section(README, "Data")) == list(FORMATS)
    headings = re.findall(r"^## (\w+)$", DATA, re.MULTILINE)
    assert headings == list(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_each_example_is_recognised_as_what_it_stands_under(name):
    for row in map(json.loads, fenced(section(DATA, name), "json")):
        fmt = recognise([row])
        assert fmt.name == name
        pair = read_pair(row, fmt)
        right, wrong = ("bleu", "rouge") if name == "alpaca" else ("Blue.", pair.rejected)
        assert (pair.chosen, pair.rejected) == (right, wrong)


def test_the_mapping_of_columns_reads_its_example(tmp_path):
    text = section(DATA, "Other columns")
    [row], [recipe] = fenced(text, "json"), fenced(text, "yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe, encoding="utf-8")
    columns = load_recipe(path).data.train[0].columns
    pair = read_pair(json.loads(row), recognise([json.loads(row)], columns), columns)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Name a colour.", "Blue.", "Seven.")


def test_lists_of_names_are_complete():
    assert set(re.findall(r"`(\w+)`", DATA.split("A filter keeps")[1].split("\n\n")[0])) == set(FILTER_OPERATORS)
    reasons = section(README, "Data").split("A row that cannot be used")[1].split("Each reason")[0]
    assert set(re.findall(r"`(\w+)`", reasons)) == set(DROP_REASONS)
