"""LoRA through peft (Hu et al. 2021, arXiv 2106.09685): what the recipe asks for, as stock peft adapters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from warnings import catch_warnings, filterwarnings

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from orpo_cli.errors import ModelError
from orpo_cli.model.load import is_path
from orpo_cli.model.vocabulary import embedding_names
from orpo_cli.recipe.schema import LoraSection


def add_lora(model: PreTrainedModel, section: LoraSection, trained_rows: list[int]) -> PeftModel:
    """Put adapters into the model, to be trained; the base is frozen.

    `trained_rows` are the token ids whose embedding rows are trained beside the adapters. Initial values come from
    torch's random state. Raises ModelError for names that the model has not.
    """
    if section.adapter is not None:
        adapted = load_adapter(model, section.adapter, trainable=True)
        _check_rows(adapted, trained_rows, section.adapter)
        return adapted
    # What is trained and saved whole needs no rows of its own.
    names = [
        path.rpartition(".")[2]
        for path in filter(None, embedding_names(model))
        if not any(f".{path}".endswith(f".{saved}") for saved in section.modules_to_save)
    ]
    outputs = model.get_output_embeddings()
    if trained_rows and getattr(outputs, "bias", None) is not None and len(names) == 2:
        raise ModelError(
            "the model's output embeddings have a bias, which peft loses when it trains single token rows",
            f"set lora.modules_to_save: [{names[1]}], or a template without new tokens (model.chat_template: plain)",
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=section.target_modules if isinstance(section.target_modules, str) else [*section.target_modules],
        exclude_modules=[*section.exclude_modules] or None,
        modules_to_save=[*section.modules_to_save] or None,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights=section.init_lora_weights,
        rank_pattern={**section.rank_pattern},
        trainable_token_indices=dict.fromkeys(names, trained_rows) if trained_rows and names else None,
    )
    _check_names(model, section)
    hint = _linear_layers(model)
    try:
        with catch_warnings():
            filterwarnings("ignore", message="The following .*_pattern keys")  # of ranks, told below as an error
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError, re.error) as error:
        raise ModelError(f"LoRA cannot be added: {_in_a_line(error)}", hint) from error
    targets = [*adapted.base_model.targeted_module_names, *adapted.base_model.targeted_parameter_names]
    for pattern in section.rank_pattern:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targets):  # as peft matches them
            called = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
            raise ModelError(
                f"lora.rank_pattern: no layer with an adapter is called {pattern}", f"those that have one: {called}"
            )
    return adapted


def _check_names(model: PreTrainedModel, section: LoraSection) -> None:
    """Raise ModelError for a name that is no module's: peft takes the others and says nothing of it."""
    modules = dict(model.named_modules())
    # To be excluded, a layer itself has to be named: peft passes over the name of what contains it.
    layers = [name for name, module in modules.items() if next(module.children(), None) is None]
    targets = [] if isinstance(section.target_modules, str) else section.target_modules
    embeddings = " or ".join(path.rpartition(".")[2] for path in filter(None, embedding_names(model)))
    for key, names, known, hint in (
        ("target_modules", targets, modules, _linear_layers(model)),
        ("exclude_modules", section.exclude_modules, layers, _linear_layers(model)),
        ("modules_to_save", section.modules_to_save, modules, f"it takes any module of the model, say {embeddings}"),
    ):
        if missing := [name for name in names if not any(f".{path}".endswith(f".{name}") for path in known)]:
            what = "layer" if key == "exclude_modules" else "module"
            raise ModelError(f"lora.{key}: no {what} is called {' or '.join(missing)}", hint)


def names_modules(section: LoraSection) -> bool:
    """Whether the section speaks of single modules, which a model may not have."""
    named = section.exclude_modules or section.modules_to_save or section.rank_pattern
    return section.adapter is None and (bool(named) or section.target_modules != "all-linear")


def _linear_layers(model: nn.Module) -> str:
    linear = {n.rpartition(".")[2] for n, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    return f"the model's linear layers are called {', '.join(sorted(linear))}; all-linear takes all but the head"


def _check_rows(model: PeftModel, rows: list[int], adapter: str) -> None:
    """Raise ModelError when rows are to be trained that the loaded adapter has no place for."""
    indices = model.peft_config["default"].trainable_token_indices or {}
    per_module = list(indices.values()) if isinstance(indices, dict) else [indices]
    if rows and (not per_module or any(not set(rows) <= set(of_one) for of_one in per_module)):
        raise ModelError(
            f"the adapter {adapter} holds no rows for the template's new tokens",
            "go on with the template it was trained with, or begin a new adapter: remove lora.adapter",
        )


def load_adapter(model: PreTrainedModel, directory: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put a saved adapter (a directory or a hub id) into its base model, reading nothing but safetensors and JSON.

    Raises ModelError if there is none or it does not fit.
    """
    directory = adapter_directory(directory)
    try:
        return PeftModel.from_pretrained(model, str(directory), is_trainable=trainable)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ModelError(
            f"the adapter {directory} does not fit the base: {_in_a_line(error)}",
            "an adapter goes with the base it was trained on",
        ) from error


def adapter_directory(name: str | Path) -> Path:
    """The files of a saved adapter, a directory or a hub id. Raises ModelError unless it is a LoRA in safetensors."""
    directory = _downloaded(str(name)) if not Path(name).exists() else Path(name)
    if not (directory / "adapter_config.json").is_file():
        raise ModelError(f"{directory} is no adapter: it has no adapter_config.json", "name the directory `adapter/`")
    if not (directory / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{directory} has no adapter_model.safetensors",
            "orpo loads no pickled weights; save it as safetensors",
        )
    _check_kind(directory)
    return directory


def _check_kind(directory: Path) -> None:
    """Raise ModelError unless it is a LoRA: what peft does for other kinds may import modules or load tokenizers."""
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        kind, megatron = config.get("peft_type"), config.get("megatron_config")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{directory}/adapter_config.json is damaged: {error}", "copy or download it again") from error
    if kind != "LORA":
        raise ModelError(f"{directory} is an adapter of the kind {kind}", "orpo trains and loads LoRA adapters")
    if megatron:
        raise ModelError(f"{directory} is for Megatron, whose code its configuration names", "remove megatron_config")


def _downloaded(name: str) -> Path:
    """The local copy of a hub repository's adapter."""
    hint = "an adapter is a directory or a hub id, owner/name; a private one needs HF_TOKEN"
    if "/" not in name or is_path(name):
        raise ModelError(f"there is no directory {name}", hint)
    try:
        return Path(snapshot_download(name, allow_patterns=["adapter_config.json", "adapter_model.safetensors"]))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"the adapter {name} is not in the local cache, and the hub cannot be reached", hint
        ) from error
    except (OSError, ValueError) as error:  # the hub's own errors are kinds of these
        why = "" if isinstance(error, HFValidationError) else f": {_in_a_line(error)}"
        raise ModelError(f"there is no adapter {name}{why}", hint) from error


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def save_adapter(model: PeftModel, directory: Path, *, base: str, revision: str) -> None:
    """Write adapter_config.json and adapter_model.safetensors for stock peft, the same bytes for the same run.

    `base` and `revision` are the recipe's, so that the adapter finds its base again.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base, revision
    # The rows that were trained are in the adapter; the whole embedding matrix need not be.
    model.save_pretrained(str(directory), safe_serialization=True, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)  # peft's model card: a template to fill in
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(_ordered(json.loads(path.read_text())), indent=2, sort_keys=True) + "\n")


def _ordered(config: dict) -> dict:
    """peft keeps sets of module names and writes them in hash order, which differs from run to run."""
    names = ("target_modules", "exclude_modules", "modules_to_save")
    return {k: sorted(v) if k in names and isinstance(v, list) else v for k, v in config.items()}
