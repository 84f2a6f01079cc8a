"""Base models: what is loaded, what is refused and with which words, and rows for new tokens."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from orpo_cli.errors import ModelError
from orpo_cli.model.load import (
    base_content,
    compute_dtype,
    disable_dropout,
    load_config,
    load_model,
    load_tokenizer,
)
from orpo_cli.recipe import ModelSection
from tests.hub import hub, hub_environment

CPU = torch.device("cpu")


def section(path: Path | str, **keys) -> ModelSection:
    return ModelSection(name_or_path=str(path), **keys)


def altered(tiny_base: Path, directory: Path, **config) -> Path:
    """A copy of the tiny base with other keys in config.json."""
    shutil.copytree(tiny_base, directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


def test_auto_dtype_is_that_of_the_weights_but_never_float16_where_bfloat16_works():
    for stored, computed in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.bfloat16)):
        config = AutoConfig.for_model("llama", dtype=stored)
        assert compute_dtype(section("x"), config, CPU) == computed
    assert compute_dtype(section("x", dtype="float16"), config, CPU) == torch.float16


def test_the_base_s_own_dropout_is_off_unless_asked_for(tiny_base, tmp_path):
    directory = altered(tiny_base, tmp_path / "m", attention_dropout=0.3)
    assert load_model(section(directory), CPU).config.attention_dropout == 0.0
    assert load_model(section(directory, disable_dropout=False), CPU).config.attention_dropout == 0.3


def test_dropout_of_every_family_is_found():
    for family, keys in (
        ("gpt2", ("resid_pdrop", "embd_pdrop", "attn_pdrop")),
        ("opt", ("dropout", "attention_dropout", "layerdrop")),
        ("phi", ("resid_pdrop", "embd_pdrop", "attention_dropout")),
    ):
        config = AutoConfig.for_model(family, **dict.fromkeys(keys, 0.1))
        disable_dropout(config)
        assert [getattr(config, key) for key in keys] == [0.0] * len(keys)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base, tmp: tmp / "nowhere" / "at" / "all", "there is no directory"),
        (lambda base, tmp: (tmp / "empty").mkdir() or tmp / "empty", "no config.json"),
        (lambda base, tmp: altered(base, tmp / "t5", model_type="t5", architectures=["T5"]), "encoder-decoder"),
        (lambda base, tmp: altered(base, tmp / "odd", model_type="no_such_family"), "cannot be loaded"),
        (
            lambda base, tmp: altered(
                base, tmp / "rc", model_type="mine", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
            ),
            "needs code from its own repository",
        ),
    ],
)
def test_what_is_no_model_is_refused_in_words(tiny_base, tmp_path, make, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_model(section(make(tiny_base, tmp_path)), CPU)
    assert caught.value.hint


def test_remote_code_does_not_run_unless_it_is_trusted(tiny_base, tmp_path):
    directory = altered(tiny_base, tmp_path / "rc", model_type="mine", auto_map={"AutoConfig": "code.C"})
    (directory / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        load_config(section(directory))
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_loaded(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save({}, tmp_path / "m/pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(section(tmp_path / "m"), CPU)


def test_damaged_weights_are_an_error(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "m")
    weights = tmp_path / "m/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"damaged|cannot be loaded"):
        load_model(section(tmp_path / "m"), CPU)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_explained_wherever_it_is_damaged(tiny_base, tmp_path, name):
    """Cut short, or a bit of its header or text flipped: an error in words, or no harm."""
    shutil.copytree(tiny_base, tmp_path / "m")
    original = (tiny_base / name).read_bytes()
    end = 8 + int.from_bytes(original[:8], "little") if name.endswith("safetensors") else len(original)
    generator, explained = random.Random(0), 0
    for number in range(24):
        place = generator.randrange(end) if number > 3 else number
        damaged = bytearray(original)
        damaged[place] ^= 1 << generator.randrange(8)
        (tmp_path / "m" / name).write_bytes(damaged if number % 2 else original[:place])
        try:
            load_tokenizer(section(tmp_path / "m"))
            load_model(section(tmp_path / "m"), CPU)
        except ModelError:
            explained += 1
    assert explained >= 12  # every file that was cut short


def test_a_shard_that_is_missing_is_named(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path / "m", max_shard_size="50KB")
    load_model(section(tmp_path / "m"), CPU)
    (tmp_path / "m" / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00004\.safetensors"):
        load_model(section(tmp_path / "m"), CPU)


def test_the_content_of_a_base_tells_it_from_others(tiny_base, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "m")
    same = base_content(section(tmp_path / "m"))
    assert same == base_content(section(tiny_base))
    assert base_content(section("org/model")) is None
    weights = tmp_path / "m" / "model.safetensors"
    original = weights.read_bytes()
    for damaged in (original[:-1], original[:-1] + bytes([original[-1] ^ 1]), original + b"x"):
        weights.write_bytes(damaged)
        assert base_content(section(tmp_path / "m")) != same
    weights.write_bytes(original)
    (tmp_path / "m" / "config.json").write_text("{}")
    assert base_content(section(tmp_path / "m")) != same


def test_of_large_weights_their_size_beginning_end_and_pieces_count(tmp_path):
    (tmp_path / "m").mkdir()
    weights = tmp_path / "m" / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(2**28)
    found = [base_content(section(tmp_path / "m"))]
    for place in (0, 2**20 - 1, 2**28 - 1):
        with weights.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        found.append(base_content(section(tmp_path / "m")))
    assert len(set(found)) == 4


LOADING = """
import sys, torch
from orpo_cli.errors import ModelError
from orpo_cli.model.load import base_revision, load_model, load_tokenizer
from orpo_cli.recipe import ModelSection
for name in sys.argv[1:]:
    try:
        section = ModelSection(name_or_path=name)
        tokenizer = load_tokenizer(section)
        model = load_model(section, torch.device("cpu"))
        print(name, len(tokenizer), model.num_parameters(), base_revision(section))
    except ModelError as error:
        print(name, error.message, "|", error.hint)
"""


def load_from(url: str, home: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """What loading models of a hub prints, a line each."""
    command = [sys.executable, "-c", LOADING, *names]
    return subprocess.run(command, env=hub_environment(url, home), capture_output=True, text=True, timeout=120)


def test_a_base_and_tokenizer_come_from_the_hub(tiny_base, tmp_path):
    """Against a stand-in that serves a repository's files as the hub does; also what is gated or absent."""
    files = {p.name: p.read_bytes() for p in tiny_base.iterdir() if p.is_file()}
    with hub({"some/model": files, "some/gated": files}, gated=frozenset({"some/gated"})) as url:
        done = load_from(url, tmp_path, "some/model", "some/gated", "some/absent")
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert lines[0].startswith("some/model 259 ")
    assert len(lines[0].split()[-1]) == 40
    assert "is gated" in lines[1]
    assert "HF_TOKEN" in lines[1]
    assert "no model some/absent" in lines[2]


def test_a_hub_that_cannot_be_reached_is_not_asked_for_long(tmp_path):
    started = time.perf_counter()
    done = load_from("http://127.0.0.1:9", tmp_path, "some/model")
    assert time.perf_counter() - started < 20  # the libraries by themselves take 23 seconds, and begin anew twice
    assert done.stdout.startswith("some/model some/model cannot be loaded from the hub: "), done.stderr
    assert "check the name and the network" in done.stdout


def test_a_tokenizer_in_the_cache_asks_no_hub(tiny_base, tmp_path):
    """Though there is no config.json with it."""
    files = {p.name: p.read_bytes() for p in tiny_base.iterdir() if p.name.startswith("tokenizer")}
    code = LOADING.replace('model = load_model(section, torch.device("cpu"))', "").replace(
        "model.num_parameters(), base_revision(section)", "0"
    )
    command = [sys.executable, "-c", code, "some/tokens"]
    with hub({"some/tokens": files}) as url:
        for more in ({}, {"HF_HUB_OFFLINE": "1"}):
            environment = hub_environment(url, tmp_path, **more)
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            assert done.stdout == "some/tokens 259 0\n", done.stdout + done.stderr


def test_a_tokenizer_loads_from_a_directory(tiny_base):
    assert load_tokenizer(section(tiny_base)).eos_token == "</s>"


def test_weights_that_are_missing_are_not_made_up(tiny_base, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_base, tmp_path / "m")
    weights = load_file(tmp_path / "m/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors.*layers\.1\.mlp\.up_proj"):
        load_model(section(tmp_path / "m"), CPU)
