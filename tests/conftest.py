"""A base model, preference pairs and recipes so small that a whole run takes a second; nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models this small only lose by threads that wait for each other on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY_SPECIAL = ("<pad>", "<s>", "</s>")
TINY_CONTEXT = 128


@pytest.fixture(scope="session", autouse=True)
def counts_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is counted of a stream is not kept in the home directory."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a random two-layer Llama, float32, whose tokens are bytes, and no chat template."""
    directory = tmp_path_factory.mktemp("tiny-base")
    write_tiny_base(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 pairs about the larger of two numbers, JSON lines; four prompts stand twice, with other answers."""
    path = tmp_path_factory.mktemp("tiny-pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(64)), encoding="utf-8")
    return path


@pytest.fixture
def tiny_recipe(tiny_base: Path, tiny_pairs: Path, tmp_path: Path) -> Callable[..., Path]:
    """`tiny_recipe(loss={"beta": 0.5}, lora=None)` writes a recipe with these changes and returns its path.

    Unchanged it takes 4 steps of 8 pairs with LoRA, holds out 8 pairs, and writes to tmp_path/run.
    """

    def write(**changes: Any) -> Path:
        return write_tiny_recipe(tmp_path / "recipe.yaml", tiny_base, tiny_pairs, tmp_path / "run", **changes)

    return write


@pytest.fixture(scope="session")
def tiny_run(tiny_base: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of the unchanged `tiny_recipe`; only to be read."""
    from orpo_cli.recipe import load_recipe
    from orpo_cli.train.run import train

    directory = tmp_path_factory.mktemp("tiny-run")
    recipe = write_tiny_recipe(directory / "recipe.yaml", tiny_base, tiny_pairs, directory / "run")
    train(load_recipe(recipe))
    return directory / "run"


@pytest.fixture
def orpo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`orpo("train", recipe)` -> (exit code, stdout, stderr), within this process."""
    from orpo_cli import cli

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["orpo", *map(str, arguments)])
        capsys.readouterr()
        code = cli._exit_code()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory, of 16 KiB."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root on Linux may mount a file system")
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted: {made.stderr}")
    yield place
    subprocess.run(["umount", place], check=True)


def resize(disk: Path, kib: int) -> None:
    """Give `disk` another size."""
    subprocess.run(["mount", "-o", f"remount,size={kib}k", disk], check=True)


def tiny_rows(count: int) -> list[dict[str, str]]:
    """Rows of prompt, chosen and rejected; every sixteenth prompt is that of the row before."""
    rows = []
    for i in range(count):
        a, b = 10 + 7 * (i - (i % 16 == 15)) % 83, 11 + 5 * (i - (i % 16 == 15)) % 79
        ending = " of them" if i % 16 == 15 else ""
        rows.append(
            {
                "prompt": f"Which is larger, {a} or {b}? ({i - (i % 16 == 15)})",
                "chosen": f"{max(a, b)} is{ending}.",
                "rejected": f"{min(a, b)} is larger{'!' * (i % 5)}",
            }
        )
    return rows


def write_tiny_base(directory: Path, seed: int = 0) -> None:
    """Write model and tokenizer as stock transformers does."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = [*TINY_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(TINY_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TINY_CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.1)
    model.save_pretrained(directory)


def write_tiny_recipe(path: Path, base: Path, pairs: Path, run: Path, /, **changes: Any) -> Path:
    """Write a recipe; `changes` replace keys within sections, or a whole section where they are no mapping."""
    recipe: dict[str, Any] = {
        "model": {"name_or_path": str(base), "chat_template": "plain"},
        "lora": {"r": 4, "alpha": 8},
        "data": {"train": str(pairs), "eval": {"holdout": 8}, "max_length": TINY_CONTEXT},
        "train": {"batch_size": 8, "max_steps": 4, "learning_rate": 0.01, "save_steps": 2, "warmup_steps": 1},
        "output": {"dir": str(run)},
    }
    for section, change in changes.items():
        recipe[section] = {**recipe.get(section, {}), **change} if isinstance(change, dict) else change
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
