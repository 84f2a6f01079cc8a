"""The schema: its defaults are the documented ones, and everything in it says what it is."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from orpo_cli.data import formats
from orpo_cli.recipe import Recipe, SourceSpec
from orpo_cli.recipe.faults import annotation_at, section_keys
from orpo_cli.recipe.schema import ColumnMap, default_run_dir

DEFAULTS = {
    "model": {
        "name_or_path": "meta-llama/Llama-3.1-8B",
        "revision": "main",
        "dtype": "auto",
        "load_in_4bit": False,
        "load_in_8bit": False,
        "attn_implementation": "auto",
        "shared_prefix": "auto",
        "gradient_checkpointing": "auto",
        "device_map": None,
        "disable_dropout": True,
        "chat_template": "auto",
        "chat_template_kwargs": {},
        "chat_template_date": "auto",
        "eos_token": "auto",
        "new_token_init": "mean",
        "trust_remote_code": False,
    },
    "lora": {
        "r": 16,
        "alpha": 32,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "exclude_modules": [],
        "trainable_tokens": "auto",
        "modules_to_save": [],
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "adapter": None,
    },
    "data": {
        "train": [
            {
                "path": "mlabonne/orpo-dpo-mix-40k",
                "name": None,
                "split": None,
                "revision": None,
                "weight": None,
                "group_by": None,
                "columns": {},
                "filter": [],
                "max_pairs": None,
            }
        ],
        "eval": None,
        "format": "auto",
        "columns": {},
        "filter": [],
        "system": None,
        "streaming": "auto",
        "shuffle": True,
        "max_length": 1024,
        "max_prompt_length": None,
        "overlong": "drop",
        "min_response_tokens": 1,
        "deduplicate": False,
        "add_bos": "auto",
        "max_dropped": 0.5,
        "strict": False,
    },
    "loss": {"beta": 0.1, "nll_tokens": "response", "nll_reduction": "pair"},
    "train": {
        "learning_rate": "auto",
        "num_train_epochs": 1,
        "max_steps": None,
        "batch_size": 16,
        "max_tokens_per_microbatch": "auto",
        "optimizer": "adamw",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1.0e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
        "min_lr_ratio": 0.0,
        "warmup_ratio": 0.1,
        "warmup_steps": None,
        "seed": 42,
        "logging_steps": 1,
        "eval_steps": None,
        "eval_on_start": True,
        "save_steps": 100,
        "save_total_limit": 2,
        "metric_for_best_model": "eval_loss",
        "load_best_model_at_end": False,
        "early_stopping_patience": None,
        "sample_prompts": [],
    },
    "output": {"dir": "runs/llama-3.1-8b-orpo", "merge": True, "trackers": []},
}


def smallest(**sections: object) -> Recipe:
    tree = {"model": {"name_or_path": "a/B"}, "data": {"train": "x"}}
    return Recipe.model_validate({**tree, **sections})


def test_every_default_is_the_documented_one_in_the_documented_order() -> None:
    recipe = Recipe.model_validate(
        {"model": {"name_or_path": "meta-llama/Llama-3.1-8B"}, "data": {"train": "mlabonne/orpo-dpo-mix-40k"}}
    )
    dumped = recipe.model_dump(mode="json")
    assert dumped == DEFAULTS
    assert [list(section) for section in dumped.values()] == [list(section) for section in DEFAULTS.values()]


def test_every_key_has_a_description() -> None:
    definitions = Recipe.model_json_schema()["$defs"]
    bare = [f"{name}.{key}" for name, d in definitions.items() for key, p in d.get("properties", {}).items()
            if not p.get("description")]  # fmt: skip
    assert bare == []
    assert definitions["DataSection"]["properties"]["train"]["description"].startswith("Training pairs:")
    assert all(definitions[name]["description"] for name in ("ModelSection", "DataSection", "FilterSpec"))


def test_the_json_schema_takes_the_short_forms() -> None:
    train = Recipe.model_json_schema()["$defs"]["DataSection"]["properties"]["train"]
    assert {"string", "array"} <= {option.get("type") for option in train["anyOf"]}


def test_absent_lora_is_lora_and_null_is_a_full_fine_tune() -> None:
    assert smallest().lora is not None
    assert smallest(lora=None).lora is None
    assert smallest().peak_learning_rate == 8e-5
    assert smallest(lora=None).peak_learning_rate == 8e-6
    assert smallest(lora=None, train={"learning_rate": 1}).peak_learning_rate == 1.0


def test_sources_are_written_in_any_of_three_ways() -> None:
    for train in ("x", ["x"], {"path": "x"}, [{"path": "x"}]):
        assert smallest(data={"train": train}).data.train == [SourceSpec(path="x")]
        assert smallest(data={"train": "y", "eval": train}).data.eval == [SourceSpec(path="x")]


def test_a_filter_names_its_operator_and_value() -> None:
    rules = [{"column": "a", "in": ["x", 1]}, {"column": "b", "is_null": False}, {"column": "c", "eq": 0}]
    data = smallest(data={"train": "x", "filter": rules}).data
    assert [(rule.column, rule.op, rule.value) for rule in data.filter] == [
        ("a", "in", ["x", 1]),
        ("b", "is_null", False),
        ("c", "eq", 0),
    ]
    assert data.model_dump(mode="json")["filter"] == rules


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        smallest().train.seed = 3  # type: ignore[misc]


def test_a_recipe_made_in_code_is_checked_alike() -> None:
    with pytest.raises(ValidationError, match=r"model.device_map: not yet"):
        smallest(model={"name_or_path": "a/B", "device_map": "auto"})
    with pytest.raises(ValidationError, match=r"a full fine-tune"):
        smallest(lora=None, model={"name_or_path": "a/B", "load_in_4bit": True})


@pytest.mark.parametrize(
    ("name", "directory"),
    [
        ("meta-llama/Llama-3.1-8B", "runs/llama-3.1-8b-orpo"),
        ("./models/stories260K/", "runs/stories260k-orpo"),
        ("My Model (v2)", "runs/my-model-v2-orpo"),
        ("..", "runs/model-orpo"),
        ("/", "runs/model-orpo"),
    ],
)
def test_the_run_directory_is_named_after_the_model(name: str, directory: str) -> None:
    assert default_run_dir(name) == directory


def test_formats_and_columns_are_those_that_the_reader_knows() -> None:
    assert set(annotation_at(("data", "format")).__args__) == {"auto", *formats.FORMATS}
    assert set(ColumnMap.__args__[0].__args__) == set(formats.COLUMNS)


def test_key_names_are_unique_across_sections() -> None:
    leaves = [key.rpartition(".")[2] for key in section_keys()]
    assert len(leaves) == len(set(leaves))


def test_importing_the_recipe_loads_nothing_heavy() -> None:
    code = "import sys, orpo_cli.recipe; print(sorted({'torch', 'transformers', 'datasets', 'peft'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
