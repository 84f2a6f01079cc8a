"""Canaries: what strangers may have put into models, adapters, data, recipes and runs. None of it fires."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from orpo_cli.data.sources import open_source
from orpo_cli.data.templates import resolve_template
from orpo_cli.errors import DataError, InputError, ModelError, RecipeError
from orpo_cli.files import to_json
from orpo_cli.model.load import load_config, load_model, load_tokenizer
from orpo_cli.model.lora import load_adapter
from orpo_cli.recipe import ModelSection, SourceSpec, load_recipe
from orpo_cli.run_directory import RunDirectory
from orpo_cli.train.checkpoint import MANIFEST, checkpoints, load_checkpoint
from orpo_cli.train.run import Start, train

CPU = torch.device("cpu")


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file that every canary makes when it fires. Nothing may even be given to an unpickler."""

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    path = tmp_path / "fired"
    monkeypatch.setattr(torch, "load", forbidden)
    monkeypatch.setattr(pickle, "load", forbidden)
    yield path
    assert not path.exists()


def test_the_canary_sings(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "fired")))
    assert (tmp_path / "fired").exists()


def code(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w')\n"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to be spoilt."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def adapter(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a trained adapter, to be spoilt."""
    return Path(shutil.copytree(tiny_run / "adapter", tmp_path / "adapter"))


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be spoilt."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def section(path: Path) -> ModelSection:
    return ModelSection(name_or_path=str(path))


# Models


def in_shards(base: Path, names: list[str]) -> None:
    """Make the base a sharded one whose index names these files."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    half = len(tensors) // 2
    where = {tensor: names[i >= half] for i, tensor in enumerate(tensors)}
    for name in set(names):
        if name.endswith(".safetensors"):
            save_file({t: tensors[t] for t, n in where.items() if n == name}, base / name, {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_sound_shards_are_loaded(base: Path) -> None:
    in_shards(base, ["model-1.safetensors", "model-2.safetensors"])
    assert load_model(section(base), CPU)


def test_pickles_beside_the_weights_are_left_alone(base: Path, mark: Path) -> None:
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "adapter_model.bin", "tokenizer.pkl"):
        (base / name).write_bytes(pickle.dumps(Bomb(mark)))
    assert load_model(section(base), CPU)
    assert load_tokenizer(section(base))


def only_pickled(base: Path, bomb: bytes) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(bomb)


def pickled_shards(base: Path, bomb: bytes) -> None:
    in_shards(base, ["model-1.safetensors", "pytorch_model-2.bin"])
    (base / "pytorch_model-2.bin").write_bytes(bomb)


def named_by_the_configuration(base: Path, bomb: bytes) -> None:
    (base / "adapter_model.bin").write_bytes(bomb)
    edit(base / "config.json", transformers_weights="adapter_model.bin")


def an_adapter_inside(base: Path, bomb: bytes) -> None:
    (base / "adapter_model.bin").write_bytes(bomb)
    (base / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "target_modules": ["q_proj"]})
    )


def a_pickle_called_safetensors(base: Path, bomb: bytes) -> None:
    (base / "model.safetensors").write_bytes(bomb)


def shards_elsewhere(base: Path, bomb: bytes) -> None:
    in_shards(base, ["model-1.safetensors", "../model-2.safetensors"])


def shards_by_absolute_path(base: Path, bomb: bytes) -> None:
    in_shards(base, ["model-1.safetensors", str(base.parent / "model-2.safetensors")])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (only_pickled, "no weights in safetensors"),
        (pickled_shards, r"names pytorch_model-2\.bin"),
        (named_by_the_configuration, r"another file for the weights: adapter_model\.bin"),
        (an_adapter_inside, "is an adapter, or holds one"),
        (a_pickle_called_safetensors, "damaged"),
        (shards_elsewhere, r"names \.\./model-2\.safetensors"),
        (shards_by_absolute_path, r"names /.*model-2\.safetensors"),
    ],
)
def test_weights_are_the_repository_s_own_safetensors(
    base: Path, mark: Path, spoil: Callable[[Path, bytes], None], said: str
) -> None:
    spoil(base, pickle.dumps(Bomb(mark)))
    with pytest.raises(ModelError, match=said) as caught:
        load_model(section(base), CPU)
    assert caught.value.hint


def test_code_that_comes_with_a_model_does_not_run(base: Path, mark: Path) -> None:
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "custom_generate/generate.py"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(code(mark))
    edit(
        base / "config.json",
        auto_map={"AutoConfig": "configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"},
        custom_pipelines={"text-generation": {"impl": "modeling_x.P"}},
    )
    edit(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_x.T", "tokenization_x.T"]})
    assert type(load_config(section(base))).__module__.startswith("transformers.")
    assert type(load_model(section(base), CPU)).__module__.startswith("transformers.")
    assert type(load_tokenizer(section(base))).__module__.startswith("transformers.")
    edit(base / "config.json", model_type="of_its_own")
    edit(base / "tokenizer_config.json", tokenizer_class="OfItsOwn")
    for load in (load_config, load_tokenizer, lambda s: load_model(s, CPU)):
        with pytest.raises(ModelError, match="code from its own repository"):
            load(section(base))


def test_attention_code_from_the_hub_is_refused(base: Path) -> None:
    edit(base / "config.json", attn_implementation="someone/attention")
    with pytest.raises(ModelError, match="someone/attention"):
        load_config(section(base))


def test_a_chat_template_s_name_is_no_path(base: Path) -> None:
    templates = [{"name": "default", "template": "x"}, {"name": "../../out", "template": "y"}]
    (base / "chat_template.jinja").unlink(missing_ok=True)
    edit(base / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(ModelError, match="out"):
        load_tokenizer(section(base))


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARK', 'w') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('MARK', 'w') }}",
    "{{ tojson.__globals__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MARK') }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ messages.append(1) }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_chat_template_stays_in_its_sandbox(tiny_base: Path, mark: Path, tmp_path: Path, escape: str) -> None:
    file = tmp_path / "a.jinja"
    file.write_text("{{ messages[-1]['content'] }}" + escape.replace("MARK", str(mark)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    try:
        template = resolve_template(str(file), tokenizer, kwargs={})
    except ModelError:
        return
    # What was not refused came to nothing.
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], chat_template=template.source, tokenize=False
    )
    assert not [word for word in ("class", "root:", "built-in", "{'") if word in shown]


# Adapters


@pytest.fixture
def module(mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that fires when it is imported."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/canary_module.py").write_text(code(mark))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return "canary_module"


def test_an_adapter_s_library_is_not_imported(tiny_base: Path, adapter: Path, module: str) -> None:
    edit(
        adapter / "adapter_config.json",
        task_type=None,
        auto_mapping={"base_model_class": "X", "parent_library": module},
        megatron_core=module,
    )
    assert load_adapter(load_model(section(tiny_base), CPU), adapter)


def test_a_pickle_beside_an_adapter_is_left_alone(tiny_base: Path, adapter: Path, mark: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    assert load_adapter(load_model(section(tiny_base), CPU), adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="no adapter_model"):
        load_adapter(load_model(section(tiny_base), CPU), adapter)


RUN_CODE = [
    ({"megatron_config": {"a": 1}, "megatron_core": "canary_module"}, "Megatron"),
    ({"peft_type": "canary_module.Kind"}, "of the kind canary_module.Kind"),
    ({"peft_type": None, "auto_mapping": {"parent_library": "canary_module"}}, "of the kind None"),
    (
        {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": 2,
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "a",
            "tokenizer_name_or_path": "TOKENIZER",
            "tokenizer_kwargs": {"trust_remote_code": True},
        },
        "of the kind PROMPT_TUNING",
    ),
]


@pytest.fixture(params=RUN_CODE, ids=[said for _, said in RUN_CODE])
def explosive(
    request: pytest.FixtureRequest, tiny_base: Path, adapter: Path, module: str, mark: Path, tmp_path: Path
) -> tuple[Path, str]:
    """An adapter whose configuration has peft run code, and what is said of it."""
    changes, said = request.param
    tokenizer = Path(shutil.copytree(tiny_base, tmp_path / "tokenizer"))
    (tokenizer / "tokenization_x.py").write_text(code(mark))
    auto_map = {"AutoTokenizer": [None, "tokenization_x.T"]}
    edit(tokenizer / "tokenizer_config.json", tokenizer_class="T", auto_map=auto_map)
    if "tokenizer_name_or_path" in changes:
        changes = changes | {"tokenizer_name_or_path": str(tokenizer)}
    edit(adapter / "adapter_config.json", **changes)
    return adapter, said


@pytest.mark.parametrize("trainable", [False, True])
def test_adapters_that_would_run_code_are_refused(
    tiny_base: Path, explosive: tuple[Path, str], trainable: bool
) -> None:
    adapter, said = explosive
    with pytest.raises(ModelError, match=said):
        load_adapter(load_model(section(tiny_base), CPU), adapter, trainable=trainable)


@pytest.mark.parametrize("command", ["check", "train"])
def test_no_command_runs_the_code_of_an_adapter_to_go_on_from(
    tiny_recipe: Callable[..., Path], explosive: tuple[Path, str], orpo: Callable[..., Any], command: str
) -> None:
    adapter, said = explosive
    code, _, err = orpo(command, tiny_recipe(lora=None), "--set", f"lora.adapter={adapter}")
    assert code == 2
    assert said in err.replace("\n", " ")


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "there is no directory nowhere"),
        ("/no/where", "there is no directory /no/where"),
        ("org/adapter", "org/adapter is not in the local cache, and the hub cannot be reached"),
    ],
)
def test_an_adapter_that_is_not_there_is_an_error(
    tiny_recipe: Callable[..., Path],
    orpo: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
    said: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = orpo(command, tiny_recipe(lora=None), "--set", f"lora.adapter={name}")
    assert code == 2
    assert said in err.replace("\n", " ")


@pytest.mark.parametrize("content", ["", "[]", "{", "\0", "null", '"x"'])
def test_a_damaged_adapter_configuration_is_an_error(tiny_base: Path, adapter: Path, content: str) -> None:
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(ModelError):
        load_adapter(load_model(section(tiny_base), CPU), adapter)


# Data


def test_a_loading_script_does_not_run(tmp_path: Path, mark: Path) -> None:
    directory = tmp_path / "pairs"
    directory.mkdir()
    (directory / "pairs.py").write_text(code(mark))
    spec = SourceSpec(path=str(directory))
    with pytest.raises(DataError, match="no data file"):
        open_source([spec])
    (directory / "pairs.jsonl").write_text('{"a": 1}\n')
    assert list(open_source([spec]).rows()) == [{"a": 1}]
    (directory / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: pairs.jsonl\n---\n")
    with pytest.raises(DataError, match="loading script"):
        open_source([spec])


def test_a_saved_dataset_that_is_spoilt_runs_nothing(tmp_path: Path, mark: Path) -> None:
    import datasets

    directory = tmp_path / "saved"
    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(directory)
    for name in ("dataset.pkl", "saved.py", "state.pkl"):
        (directory / name).write_bytes(pickle.dumps(Bomb(mark)))
    assert list(open_source([SourceSpec(path=str(directory))]).rows()) == [{"a": 1}]
    (directory / "data-00000-of-00001.arrow").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(DataError):
        list(open_source([SourceSpec(path=str(directory))]).rows())


# Recipes


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch MARK']",
        "!!python/object/new:os.system ['touch MARK']",
        "!!python/object/apply:builtins.open ['MARK', 'w']",
        "!!python/module:canary_module",
        "!!python/name:canary_module.x",
    ],
)
def test_a_recipe_s_tags_are_refused(tmp_path: Path, mark: Path, module: str, value: str) -> None:
    value = value.replace("MARK", str(mark))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{name_or_path: a/B}}\ndata:\n  train: {value}\n")
    with pytest.raises(RecipeError, match="tag"):
        load_recipe(path)
    path.write_text("model: {name_or_path: a/B}\ndata:\n  train: x\n")
    with pytest.raises(RecipeError, match="tag"):
        load_recipe(path, [f"data.train={value}"])


# Runs


def claim(path: Path, **options: bool) -> None:
    with RunDirectory(path).claimed(**options):
        pass


def test_pickles_in_a_checkpoint_are_left_alone(run: Path, mark: Path, tiny_recipe: Callable[..., Path]) -> None:
    before = (run / "adapter/adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints/step-000004")
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "adapter_model.bin", "state.pkl"):
        (run / "checkpoints/step-000002" / name).write_bytes(pickle.dumps(Bomb(mark)))
    train(load_recipe(tiny_recipe()), Start(resume=True))
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["optimizer.safetensors", "adapter_model.safetensors", "state.json"])
def test_a_forged_checkpoint_is_an_error(run: Path, mark: Path, name: str) -> None:
    """A pickle with a sha256 that is right."""
    import hashlib

    checkpoint = run / "checkpoints/step-000004"
    bomb = pickle.dumps(Bomb(mark))
    (checkpoint / name).write_bytes(bomb)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(bomb), "sha256": hashlib.sha256(bomb).hexdigest()}
    (checkpoint / MANIFEST).write_text(to_json(manifest))
    with pytest.raises(InputError, match="not written by orpo"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "merged", "manifest.json"])
def test_a_run_does_not_write_through_links(run: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (run / name).rename(outside)
    (run / name).symlink_to(outside)
    for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with pytest.raises(InputError, match="is a link"):
            claim(run, **options)
    assert outside.exists()


def test_a_checkpoint_that_is_a_link_is_none(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (run / "checkpoints/step-000002").rename(outside)
    (run / "checkpoints/step-000002").symlink_to(outside)
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-000004"]


@pytest.mark.parametrize("inside", ["checkpoints/x", "adapter", "merged/deep/er", "../run/checkpoints/x"])
def test_a_run_does_not_lie_in_what_another_one_replaces(run: Path, inside: str) -> None:
    with pytest.raises(InputError, match="lies inside the run"):
        claim(run / inside, resume=False, overwrite=True)
    claim(run / "sweep/x", resume=False, overwrite=False)


# Secrets and the network, seen from outside of the process

TOKEN = "hf_" + "q" * 34
PASSWORD = "swordfish"

_WATCHED = """
import json, os, sys
seen = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        seen.append(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[:2]}")
        raise OSError("no network here")
sys.addaudithook(watch)
from orpo_cli.cli import main
sys.argv[0] = "orpo"
try:
    main()
finally:
    print("NETWORK", json.dumps(seen))
"""


def watched(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `orpo` in a process in which every use of the network fails and is noted."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", _WATCHED, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "online"])
def test_a_local_run_uses_no_network_and_keeps_no_token(
    tiny_recipe: Callable[..., Path], tmp_path: Path, offline: bool
) -> None:
    environment = {"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")} | ({"HF_HUB_OFFLINE": "1"} if offline else {})
    folder = tmp_path / TOKEN
    folder.mkdir()
    recipe = shutil.copy(tiny_recipe(), folder / "recipe.yaml")
    done = watched(["train", str(recipe)], **environment)
    assert done.returncode == 0, done.stderr
    assert "NETWORK []" in done.stdout
    evaluated = watched(["eval", str(tmp_path / "run")], **environment)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "NETWORK []" in evaluated.stdout
    assert TOKEN not in done.stderr + done.stdout + evaluated.stderr + evaluated.stdout
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 10
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert "***/recipe.yaml" in (tmp_path / "run/manifest.json").read_text()


@pytest.mark.parametrize(
    "override",
    [
        f"data.system={TOKEN}",
        f"data.train=https://someone:{PASSWORD}@example.org/pairs.jsonl",
        f"model.token={TOKEN}",
        f"{TOKEN}=1",
        f"model.name_or_path={TOKEN}",
        f"train.sample_prompts=[{TOKEN}]",
        f"model.chat_template_kwargs={{a: {{b: {TOKEN}}}}}",
    ],
)
def test_a_recipe_with_a_secret_is_refused_and_the_secret_not_shown(
    tiny_recipe: Callable[..., Path], orpo: Any, override: str
) -> None:
    code, out, err = orpo("train", tiny_recipe(), "--set", override)
    assert (code, out) == (2, "")
    assert TOKEN not in err
    assert PASSWORD not in err
    assert "***" in err


def test_messages_do_not_command_the_terminal(orpo: Any, tiny_recipe: Callable[..., Path], tmp_path: Path) -> None:
    name = "\x1b]0;owned\x07\x1b[2J\u202e"
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({name: 1, "chosen": {name: name}, "rejected": name, "prompt": name}) + "\n")
    code, _, err = orpo("train", tiny_recipe(data={"train": str(path), "eval": None}))
    assert code == 2
    assert not set(err) & {"\x1b", "\x07", "\u202e"}
    assert "\\x1b" in err


# The supply


def test_every_pin_with_hashes_is_the_version_that_is_tested() -> None:
    root = Path(__file__).parents[1]
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (root / "requirements.txt").read_text(), re.MULTILINE))
    tested = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (root / "constraints.txt").read_text(), re.MULTILINE))
    tested = {name.lower().replace("_", "-"): version for name, version in tested.items()}
    assert {"torch", "transformers", "peft", "safetensors", "setuptools"} <= set(pinned)
    assert {name: tested[name] for name in pinned if name in tested} == {n: pinned[n] for n in pinned if n in tested}
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}", (root / "requirements.txt").read_text())) > len(pinned)
