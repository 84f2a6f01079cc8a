"""The real files, unchanged and without a `columns:` mapping, on the real tokenizers: a few steps of each."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from orpo_cli.metrics import read_metrics
from orpo_cli.recipe import load_recipe
from orpo_cli.train.run import train
from tests.shared import shared

FILES = {  # with the format that is recognised
    "hh-rlhf-harmless-test.jsonl.gz": "hh",
    "sharegpt-dpo-en.json": "sharegpt",
    "hh_rlhf_tiny.json": "messages",
    "stack_exchange_paired_tiny.json": "paired",
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A small random Llama for each of the tokenizers, by its name."""
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            tokenizer = AutoTokenizer.from_pretrained(shared(f"tokenizers/{name}"))
            made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=(len(tokenizer) + 63) // 64 * 64,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=4096,
                tie_word_embeddings=True,
            )
            LlamaForCausalLM(config).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
        return made[name]

    return base


@pytest.mark.parametrize("tokenizer", ["phi-3-mini", "gpt2", "pythia"])
@pytest.mark.parametrize("file", FILES)
def test_a_few_steps(bases, tmp_path, capsys, file, tokenizer):
    recipe = {
        "model": {"name_or_path": str(bases(tokenizer))},
        "data": {"train": str(shared(f"data/{file}")), "max_length": 4096},
        "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3},
        "output": {"dir": str(tmp_path / "run"), "merge": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(load_recipe(tmp_path / "recipe.yaml"))
    said = capsys.readouterr().err
    assert f"format {FILES[file]} (" in said
    assert f"template: {'tokenizer' if tokenizer == 'phi-3-mini' else 'plain'}," in said
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
