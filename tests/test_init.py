"""Starter recipes: listed, written once, never over another file."""

from __future__ import annotations

import pytest

from orpo_cli.errors import InputError
from orpo_cli.init import RECIPES, starter, starters, write_recipe
from orpo_cli.recipe import load_recipe


def test_every_recipe_that_ships_is_listed_with_what_it_is_for():
    known = starters()
    assert list(known) == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert known["smollm2-135m-laptop"].startswith("SmolLM2-135M on a laptop")
    assert all(20 < len(purpose) < 130 and "\n" not in purpose for purpose in known.values())


def test_a_starter_is_written_as_it_ships_and_loads(tmp_path):
    path = tmp_path / "mine.yaml"
    write_recipe(starter("phi-2-hh"), path, overwrite=False)
    assert path.read_text(encoding="utf-8") == (RECIPES / "phi-2-hh.yaml").read_text(encoding="utf-8")
    load_recipe(path)
    assert starter("phi-2-hh.yaml") == starter("phi-2-hh")


def test_no_file_is_replaced_unless_asked_for(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"mine\.yaml exists"):
        write_recipe("theirs", path, overwrite=False)
    assert path.read_text() == "mine"
    write_recipe("theirs", path, overwrite=True)
    assert path.read_text() == "theirs"
    for nowhere in (tmp_path, tmp_path / "absent" / "recipe.yaml"):
        with pytest.raises(InputError, match="no file can be written there"):
            write_recipe("theirs", nowhere, overwrite=True)


@pytest.mark.parametrize(("name", "hint"), [("phi2-hh", "did you mean phi-2-hh?"), ("zzz", "there are demo, ")])
def test_an_unknown_name_is_answered_with_the_known_ones(name, hint):
    with pytest.raises(InputError, match="no recipe is called") as caught:
        starter(name)
    assert hint in caught.value.hint
