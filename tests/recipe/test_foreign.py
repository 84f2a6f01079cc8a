"""Other tools' names lead to keys that exist, and are not our own."""

from __future__ import annotations

import pytest

from orpo_cli.recipe import foreign
from orpo_cli.recipe.faults import annotation_at, section_keys


def test_every_name_leads_to_a_key_of_the_schema() -> None:
    assert [key for key in foreign.OUR_KEY.values() if annotation_at(tuple(key.split("."))) is None] == []


def test_no_name_is_listed_twice_or_is_our_own() -> None:
    ours = {key.rpartition(".")[2] for key in section_keys()} - {"adapter"}  # means the method in axolotl
    assert foreign.OUR_KEY.keys() & foreign.NO_KEY.keys() == set()
    assert (foreign.OUR_KEY.keys() | foreign.NO_KEY.keys()) & ours == set()
    assert foreign.NOTES.keys() - foreign.OUR_KEY.keys() == set()
    assert foreign.OUR_KEY.keys() & set(section_keys()) == set()
    assert len(foreign.OUR_KEY) + len(foreign.NO_KEY) > 150


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("base_model", "model.name_or_path"),
        ("micro_batch_size", "train.batch_size"),
        ("per_device_train_batch_size", "train.batch_size"),
        ("gradient_accumulation_steps", "train.batch_size"),
        ("cutoff_len", "data.max_length"),
        ("sequence_len", "data.max_length"),
        ("pref_beta", "loss.beta"),
        ("orpo_alpha", "loss.beta"),
        ("lora_r", "lora.r"),
        ("lora_target", "lora.target_modules"),
        ("bf16", "model.dtype"),
        ("report_to", "output.trackers"),
        ("val_set_size", "data.eval.holdout"),
        ("--lr-scheduler", "train.lr_scheduler_type"),
    ],
)
def test_names_of_other_tools(name: str, key: str) -> None:
    found = foreign.translate(name)
    assert found is not None
    assert found[0] == key


def test_names_without_a_counterpart_say_why() -> None:
    assert foreign.translate("rl") == (None, "not needed: the method is always ORPO")
    assert foreign.translate("no_such_thing") is None
