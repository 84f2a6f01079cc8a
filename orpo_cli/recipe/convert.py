"""Another tool's recipe -> ours: axolotl's, LLaMA-Factory's, TRL's (`ORPOConfig`, scripts), alignment-handbook's.

What means the same is carried over, with the other tool's default written out where it differs from ours. Whatever
else the file says is left out and named, each key with why. Nothing is dropped silently but blank keys.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from orpo_cli.errors import RecipeError
from orpo_cli.recipe import foreign, strict_yaml
from orpo_cli.recipe.checks import NOT_YET
from orpo_cli.recipe.faults import allowed, annotation_at, either
from orpo_cli.recipe.load import read_text
from orpo_cli.recipe.schema import Recipe
from orpo_cli.recipe.strict_yaml import YamlFault

AXOLOTL, LLAMA_FACTORY, TRL, HANDBOOK = "axolotl", "LLaMA-Factory", "TRL", "alignment-handbook"

# What a tool does where its recipe is silent, and ours would do otherwise.
_HF_DEFAULTS = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
}
_TRL_DEFAULTS = {**_HF_DEFAULTS, "learning_rate": 1e-6, "max_length": 1024, "lora_dropout": 0.05}
DEFAULTS: dict[str, dict[str, Any]] = {
    AXOLOTL: {
        "num_epochs": 1,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "sequence_len": 512,
    },
    LLAMA_FACTORY: {**_HF_DEFAULTS, "cutoff_len": 2048, "lora_rank": 8, "lora_dropout": 0.0, "finetuning_type": "lora"},
    TRL: _TRL_DEFAULTS,
    HANDBOOK: _TRL_DEFAULTS,
}

# Names that mean the same in all tools that have them, beside those that are spelt like ours.
_SAME = {
    "model.revision": ("base_model_revision", "revision_of_model", "model_revision"),
    "model.load_in_4bit": ("load_in_4bit",),
    "model.load_in_8bit": ("load_in_8bit",),
    "model.disable_dropout": ("disable_dropout",),
    "data.max_length": ("sequence_len", "cutoff_len", "max_length"),
    "data.max_prompt_length": ("max_prompt_length",),
    "data.system": ("default_system", "default_system_message", "system_prompt"),
    "loss.beta": ("orpo_alpha", "pref_beta", "rl_beta", "beta"),
    "train.learning_rate": ("learning_rate",),
    "train.num_train_epochs": ("num_train_epochs", "num_epochs"),
    "train.adam_beta1": ("adam_beta1",),
    "train.adam_beta2": ("adam_beta2",),
    "train.adam_epsilon": ("adam_epsilon",),
    "train.weight_decay": ("weight_decay",),
    "train.max_grad_norm": ("max_grad_norm",),
    "train.seed": ("seed",),
    "train.logging_steps": ("logging_steps",),
    "train.save_total_limit": ("save_total_limit",),
    "output.dir": ("output_dir",),
}
_SAME_LORA = {
    "lora.r": ("lora_r", "lora_rank"),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout",),
    "lora.use_rslora": ("use_rslora", "peft_use_rslora"),
    "lora.use_dora": ("use_dora", "peft_use_dora"),
    "lora.init_lora_weights": ("peft_init_lora_weights",),
}
_TEMPLATES = {
    "tokenizer_default": "auto",
    "chatml": "chatml",
    "qwen": "chatml",
    "llama3": "llama3",
    "empty": "none",
}


@dataclass
class Conversion:
    """A recipe of ours in the making: what is carried over, in whose words, and what is not."""

    path: Path
    tool: str
    given: dict[str, Any]
    """The other tool's keys that are still to be looked at, without blank ones."""
    lines: dict[str, int]
    tree: dict[str, Any] = field(default_factory=lambda: {section: {} for section in Recipe.model_fields})
    """Our recipe: the keys that differ from our defaults, by section."""
    comments: dict[str, str] = field(default_factory=dict)
    """Our dotted key -> what stands beside it in the file."""
    left_out: list[tuple[int, str]] = field(default_factory=list)
    """(line, what to know), for what the file says and ours does not."""
    template: str | None = None
    """A chat template written out in the recipe, which ours keeps in a file of its own."""

    def take(self, *names: str, default: bool = True) -> Any:
        """The value of the first of the names that is given, else the tool's default, else None."""
        for name in names:
            if name in self.given:
                return self.given.pop(name)
        defaults = DEFAULTS[self.tool] if default else {}
        return next((defaults[name] for name in names if name in defaults), None)

    def put(self, key: str, value: Any, name: str, comment: str = "") -> None:
        """Set our key to what the other tool's `name` says, unless it is our default or nothing that ours may be."""
        annotation = annotation_at(tuple(key.split(".")))
        fitting = [v for v in (value, _as_number(value)) if _is_valid(annotation, v)]
        if not fitting:
            shown = json.dumps(value, ensure_ascii=False, default=str)
            self.leave(name, f"{shown[:60]} is none of what {key} may be: {either(allowed(annotation))}")
            return
        value = fitting[0]
        values_today, instead = NOT_YET.get(key, ((value,), ""))
        if value not in values_today:
            self.leave(name, f"{key} comes with a later version; {instead}")
            return
        section, _, last = key.partition(".")
        if value == _default(section, last):
            return
        self.tree[section][last] = value
        if not comment and name in DEFAULTS[self.tool] and name not in self.lines:
            comment = f"{self.tool}'s default"
        if comment:
            self.comments[key] = comment

    def carry(self, table: dict[str, tuple[str, ...]]) -> None:
        """Take all keys of a table that mean the same as ours."""
        for key, names in table.items():
            name = next((name for name in names if name in self.given or name in DEFAULTS[self.tool]), None)
            if name is not None:
                self.put(key, self.take(name), name)

    def leave(self, name: str, why: str) -> None:
        """Note a key of the other tool that is not carried over."""
        self.given.pop(name, None)
        self.left_out.append((self.lines.get(name, 0), f"{name}: {why}"))

    @property
    def is_trl(self) -> bool:
        """Whether TRL's trainer does the work, under whatever name."""
        return self.tool != LLAMA_FACTORY


def convert(path: Path) -> Conversion:
    """Read another tool's recipe. Raises RecipeError where it is none that can become one of ours."""
    try:
        tree = strict_yaml.parse(read_text(path))
    except YamlFault as fault:
        raise RecipeError(f"{path}:{fault.line}: {fault.message}", fault.hint) from fault
    if not isinstance(tree.value, dict):
        raise RecipeError(f"{path}: a recipe is a mapping, and this is none")
    given = {name: value for name, value in tree.value.items() if value is not None}
    lines = {name: tree.written[name].line for name in tree.value}
    draft = Conversion(path, _tool(path, given, lines), given, lines)
    for name, line in tree.duplicates:
        draft.left_out.append((line, f"{name}: given twice; the first one counts"))
    for name in ("rl", "stage", "pref_loss"):
        draft.take(name)  # they have said that it is for ORPO
    _model(draft)
    _lora(draft)
    {AXOLOTL: _axolotl_data, LLAMA_FACTORY: _llamafactory_data, TRL: _trl_data, HANDBOOK: _handbook_data}[draft.tool](
        draft
    )
    _length_and_loss(draft)
    _train(draft)
    _output(draft)
    for name in list(draft.given):
        draft.leave(name, _why_left(name))
    if draft.tool in (TRL, HANDBOOK):
        draft.left_out.append((0, f"no recipe of {draft.tool} says which method it is for; taken for ORPO's"))
    return draft


def _tool(path: Path, given: dict[str, Any], lines: dict[str, int]) -> str:
    """Whose recipe it is; RecipeError if it is not for ORPO, or nobody's we know."""
    if isinstance(given.get("model"), dict) and "name_or_path" in given["model"]:
        raise RecipeError(f"{path} is a recipe of orpo already", f"orpo train {path}")
    tells = [("rl", AXOLOTL), ("base_model", AXOLOTL), ("pref_loss", LLAMA_FACTORY), ("stage", LLAMA_FACTORY)]
    tells += [("finetuning_type", LLAMA_FACTORY), ("dataset_mixer", HANDBOOK), ("dataset_mixture", HANDBOOK)]
    tells += [("model_name_or_path", TRL)]
    tool = next((tool for name, tool in tells if name in given), None)
    if tool is None:
        raise RecipeError(
            f"{path}: no recipe of axolotl, LLaMA-Factory, TRL or alignment-handbook",
            "one of base_model, pref_loss, dataset_mixer and model_name_or_path tells whose it is",
        )
    says = {AXOLOTL: "rl", LLAMA_FACTORY: "pref_loss"}.get(tool)
    if says is not None and given.get(says) != "orpo":
        line = lines.get(says, lines.get("stage", 1))
        method = given.get(says) or ("sft" if tool == AXOLOTL else given.get("stage", "sft"))
        raise RecipeError(f"{path}:{line}: this recipe is not for ORPO but for {method}", f"ORPO there is {says}: orpo")
    return tool


def _why_left(name: str) -> str:
    key, note = foreign.translate(name) or (None, "")
    if key is not None:
        return f"not carried over; see {key}" + (f" ({note})" if note else "")
    return note or "no key of ours, and unknown here"


# ------------------------------------------------------------------------------------------------------- model


def _model(draft: Conversion) -> None:
    names = ("base_model", "model_name_or_path")
    draft.put("model.name_or_path", draft.take(*names), next((n for n in names if n in draft.lines), names[0]))
    _dtype(draft)
    bits = draft.take("quantization_bit")
    if bits is not None:
        draft.put(
            f"model.load_in_{bits}bit" if bits in (4, 8) else "model.load_in_4bit", bits in (4, 8), "quantization_bit"
        )
    for name in ("attn_implementation", "flash_attn", "flash_attention", "use_flash_attention_2"):
        if draft.take(name) not in (None, "auto", False):
            draft.leave(name, "left auto: both answers share their prompt by an attention of its own")
    for name in ("gradient_checkpointing", "disable_gradient_checkpointing"):
        if draft.take(name) is not None:
            draft.leave(name, "left auto: where the device's memory asks for it")
    if draft.take("trust_remote_code"):
        draft.leave("trust_remote_code", "left false: set model.trust_remote_code if you have read the model's code")
    _template(draft)
    tokens = draft.take("special_tokens")
    if isinstance(tokens, dict) and "eos_token" in tokens:
        draft.put("model.eos_token", tokens.pop("eos_token"), "special_tokens")
    if tokens:
        others = ", ".join(tokens) if isinstance(tokens, dict) else tokens
        draft.leave("special_tokens", f"{others}: not needed; there is no padding, the rest is the template's")
    if (eos := draft.take("eos_token")) is not None:
        draft.put("model.eos_token", eos, "eos_token")
    if (thinking := draft.take("enable_thinking")) is not None:
        draft.put("model.chat_template_kwargs", {"enable_thinking": thinking}, "enable_thinking")
    draft.carry({key: names for key, names in _SAME.items() if key.startswith("model.")})


def _dtype(draft: Conversion) -> None:
    """`bf16: true` computes in bfloat16 whatever dtype the weights are loaded in."""
    stated = {name: draft.take(name) for name in ("bf16", "bfloat16", "fp16", "float16", "pure_bf16")}
    loaded = draft.take("torch_dtype", "dtype")
    for name, value in stated.items():
        if value is True:
            draft.put("model.dtype", "bfloat16" if "b" in name else "float16", name)
            return
    if loaded is not None:
        draft.put(
            "model.dtype", foreign.VALUES.get(str(loaded), loaded), "dtype" if "dtype" in draft.lines else "torch_dtype"
        )


def _template(draft: Conversion) -> None:
    for name in ("chat_template_jinja", "chat_template_path", "chat_template", "template"):
        value = draft.take(name)
        if value is None or (name == "chat_template" and (value == "jinja" or draft.template is not None)):
            continue
        if "{" in str(value):
            draft.template = value
        elif str(value).endswith(".jinja"):
            draft.tree["model"]["chat_template"] = value  # the loader looks whether it is there
        elif value in _TEMPLATES:
            draft.put("model.chat_template", _TEMPLATES[value], name)
        else:
            draft.leave(
                name, f"{value}: no template of ours; left auto, the tokenizer's own, or write it to a file.jinja"
            )


# -------------------------------------------------------------------------------------------------------- lora


def _lora(draft: Conversion) -> None:
    if not _wants_lora(draft):
        draft.tree["lora"] = None
        for name in [
            name for name in draft.given if name.startswith(("lora_", "peft_")) or name in ("use_rslora", "use_dora")
        ]:
            draft.leave(name, "a full fine-tune has no adapter")
        return
    if (adapter := draft.take("lora_model_dir", "adapter_name_or_path")) is not None:
        draft.put("lora.adapter", adapter, "adapter_name_or_path")
        for name in [name for name in draft.given if name.startswith(("lora_", "peft_"))]:
            draft.leave(name, "the configuration of lora.adapter decides it")
        return
    rank = draft.given.get("lora_rank", DEFAULTS[LLAMA_FACTORY]["lora_rank"])
    if draft.tool == LLAMA_FACTORY and "lora_alpha" not in draft.given:
        draft.put("lora.alpha", 2 * rank, "lora_alpha", "LLaMA-Factory's default: twice the rank")
    draft.carry(_SAME_LORA)
    _lora_targets(draft)
    if (whole := draft.take("lora_modules_to_save", "additional_target")) is not None:
        draft.put("lora.modules_to_save", _listed(whole), "lora_modules_to_save")


def _wants_lora(draft: Conversion) -> bool:
    """Whether an adapter is trained; RecipeError for what is neither that nor a full fine-tune."""
    name = {AXOLOTL: "adapter", LLAMA_FACTORY: "finetuning_type"}.get(draft.tool, "use_peft")
    method = draft.take(name)
    if method not in ("lora", "qlora", True, "full", False, None):
        at = f"{draft.path}:{draft.lines[name]}: {name}"
        raise RecipeError(f"{at}: {method} has no counterpart", "there are LoRA and a full fine-tune")
    if method == "qlora":
        draft.put("model.load_in_4bit", True, name)
    return method in ("lora", "qlora", True)


def _lora_targets(draft: Conversion) -> None:
    everything = draft.take("lora_target_linear")
    targets = draft.take("lora_target_modules", "lora_target")
    name = "lora_target" if draft.tool == LLAMA_FACTORY else "lora_target_modules"
    if (
        everything
        or targets in ("all", "all-linear", ["all-linear"])
        or (draft.tool == LLAMA_FACTORY and targets is None)
    ):
        return
    if targets is not None:
        draft.put(
            "lora.target_modules", _listed(targets) if isinstance(targets, list) or "," in targets else targets, name
        )
    else:
        draft.left_out.append(
            (0, f"{name} is not given, which leaves it to peft (mostly q_proj, v_proj); all-linear here")
        )


# -------------------------------------------------------------------------------------------------------- data


def _axolotl_data(draft: Conversion) -> None:
    for ours, name in (("train", "datasets"), ("eval", "test_datasets")):
        entries = draft.take(name)
        if entries is not None:
            found = [_axolotl_source(draft, name, entry) for entry in _listed(entries)]
            draft.tree["data"][ours] = _simplest(found)
    _holdout(draft, "val_set_size")
    if "strict" in draft.given:
        draft.leave("strict", "not needed: an unknown key is always an error; data.strict is about rows")


def _axolotl_source(draft: Conversion, name: str, entry: Any) -> dict[str, Any]:
    entry = dict(entry) if isinstance(entry, dict) else {"path": entry}
    source = _source(entry, {"path": "path", "name": "name", "split": "split", "revision": "revision"})
    if files := _listed(entry.pop("data_files", None)):
        source["path"] = files[0]
        if len(files) > 1:
            draft.left_out.append(
                (draft.lines[name], f"{name}: of several data_files the first is taken; list the others")
            )
    fields = {**entry, **(entry["type"] if isinstance(entry.get("type"), dict) else {})}
    columns = {
        ours: fields[theirs]
        for ours, theirs in (
            ("prompt", "field_prompt"),
            ("prompt", "field_messages"),
            ("system", "field_system"),
            ("chosen", "field_chosen"),
            ("rejected", "field_rejected"),
        )
        if theirs in fields
    }
    _add_columns(source, columns)
    entry.pop("ds_type", None)
    if entry.pop("type", None) is not None:
        draft.left_out.append((draft.lines[name], f"{name}: type: not needed; the shape is recognised from the rows"))
    if rest := sorted(key for key in entry if not key.startswith("field_")):
        draft.left_out.append((draft.lines[name], f"{name}: {', '.join(rest)}: no counterpart in a source"))
    return source


def _llamafactory_data(draft: Conversion) -> None:
    folder = Path(str(draft.take("dataset_dir") or "data"))
    listing = folder / "dataset_info.json"
    try:
        known = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    most = draft.take("max_samples")
    for ours, name in (("train", "dataset"), ("eval", "eval_dataset")):
        names = _listed(draft.take(name))
        if not names:
            continue
        sources = []
        for dataset in names:
            if dataset not in known:
                draft.left_out.append(
                    (
                        draft.lines[name],
                        f"{name}: {dataset} is not in {listing}; taken for a path or hub id: correct data.{ours}",
                    )
                )
            sources.append(_llamafactory_source(known.get(dataset, {"hf_hub_url": dataset}), folder, most))
        draft.tree["data"][ours] = _simplest(sources)
    _holdout(draft, "val_size")
    if draft.take("disable_shuffling") is True:
        draft.put("data.shuffle", False, "disable_shuffling")


def _llamafactory_source(entry: dict[str, Any], folder: Path, most: int | None) -> dict[str, Any]:
    path = entry.get("hf_hub_url") or str(folder / entry.get("file_name", ""))
    source = {"path": path, **_source(dict(entry), {"subset": "name", "split": "split", "num_samples": "max_pairs"})}
    if most is not None:
        source["max_pairs"] = min(most, source.get("max_pairs", most))
    theirs = entry.get("columns", {})
    ours = {"chosen": theirs.get("chosen"), "rejected": theirs.get("rejected"), "system": theirs.get("system")}
    if "query" in theirs:  # the prompt, a line break, the query
        ours |= {"instruction": theirs.get("prompt"), "input": theirs["query"]}
    else:
        ours |= {"prompt": theirs.get("messages") or theirs.get("prompt")}
    # A dialogue and its two answers are recognised by their usual names.
    usual = {"prompt": "conversations"} if ours.get("prompt") == "conversations" else {}
    _add_columns(source, {key: column for key, column in ours.items() if column and usual.get(key) != column})
    return source


def _trl_data(draft: Conversion) -> None:
    listed = draft.take("datasets")
    names = {"path": "path", "name": "name", "split": "split"}
    if listed:
        sources = []
        for entry in map(dict, _listed(listed)):
            source = _source(entry, names)
            if files := _listed(entry.pop("data_files", None)):
                source["path"] = files[0]
            if entry:
                draft.left_out.append(
                    (draft.lines["datasets"], f"datasets: {', '.join(entry)}: no counterpart in a source")
                )
            sources.append(source)
        draft.tree["data"]["train"] = _simplest(sources)
    name, config = draft.take("dataset_name"), draft.take("dataset_config")
    train, test = draft.take("dataset_train_split"), draft.take("dataset_test_split")
    if name is not None:
        base = {"path": name, **({"name": config} if config else {})}
        draft.tree["data"]["train"] = _simplest(
            [{**base, **({"split": train} if train not in (None, "train") else {})}]
        )
        if test is not None or draft.given.get("eval_strategy", "no") not in ("no", False):
            draft.tree["data"]["eval"] = _simplest([{**base, **({"split": test} if test else {})}])
    _holdout(draft, "test_split_size")
    if draft.take("dataset_streaming", "streaming") is True:
        draft.put("data.streaming", True, "dataset_streaming")


def _handbook_data(draft: Conversion) -> None:
    mixture = draft.take("dataset_mixture")
    configs = _listed(draft.take("dataset_configs"))
    splits = _listed(draft.take("dataset_splits")) or ["train", "test"]
    mixer = draft.take("dataset_mixer") or {}
    entries = [dict(entry) for entry in (mixture or {}).get("datasets", [])]
    for number, (path, share) in enumerate(mixer.items()):
        entries.append({"id": path, "weight": share} | ({"config": configs[number]} if number < len(configs) else {}))
    name = "dataset_mixture" if mixture else "dataset_mixer"
    train: list[dict[str, Any]] = []
    for entry in entries:
        if entry.pop("weight", 1.0) not in (1, 1.0):
            draft.left_out.append(
                (draft.lines[name], f"{name}: a share of {entry['id']}; write the max_pairs of its source")
            )
        train.append(_source(entry, {"id": "path", "config": "name", "split": "split"}))
    held_out = [split for split in splits if "test" in split or "val" in split] if mixer else []
    trained_on = [split for split in splits if split not in held_out] if mixer else []
    for ours, chosen in (("train", trained_on), ("eval", held_out)):
        sources = [{**source, **({"split": split} if split != ours else {})} for source in train for split in chosen]
        if sources or (ours == "train" and train):
            draft.tree["data"][ours] = _simplest(sources or train)
    if mixture and mixture.get("test_split_size"):
        draft.given["test_split_size"], draft.lines["test_split_size"] = mixture["test_split_size"], draft.lines[name]
    _holdout(draft, "test_split_size")


def _holdout(draft: Conversion, name: str) -> None:
    size = draft.take(name)
    if size and "eval" not in draft.tree["data"]:
        draft.tree["data"]["eval"] = {"holdout": int(size) if size >= 1 else size}


def _source(entry: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The part of an entry that a source of ours has, taken out of it."""
    return {ours: value for theirs, ours in names.items() if (value := entry.pop(theirs, None)) is not None}


def _add_columns(source: dict[str, Any], columns: dict[str, str]) -> None:
    if any(ours != theirs for ours, theirs in columns.items()):
        source["columns"] = columns


def _simplest(sources: list[dict[str, Any]]) -> Any:
    """Sources as one would write them by hand."""
    short = [source["path"] if set(source) == {"path"} else source for source in sources]
    return short[0] if len(short) == 1 else short


# ---------------------------------------------------------------------------------------------- loss, train, output


def _length_and_loss(draft: Conversion) -> None:
    draft.carry({key: names for key, names in _SAME.items() if key.startswith(("data.", "loss."))})
    if draft.is_trl:
        draft.put("loss.nll_tokens", "all", "nll", "as in TRL: the prompt is learnt too; ours would be response")
        draft.put("loss.nll_reduction", "token", "nll", "as in TRL: a mean over tokens; ours would be pair")
    draft.left_out.append(
        (0, f"pairs over data.max_length are dropped, where {draft.tool} truncates them (data.overlong)")
    )


def _train(draft: Conversion) -> None:
    _batch(draft)
    draft.carry({key: names for key, names in _SAME.items() if key.startswith("train.")})
    steps = draft.take("max_steps")
    if steps is not None and steps > 0:
        draft.put("train.max_steps", steps, "max_steps")
    _schedule(draft)
    optimizer = draft.take("optim", "optimizer")
    if optimizer is not None:
        name = "optim" if "optim" in draft.lines else "optimizer"
        draft.put("train.optimizer", foreign.VALUES.get(optimizer, optimizer), name)
    if draft.take("train_sampling_strategy") == "sequential":
        draft.put("data.shuffle", False, "train_sampling_strategy")
    _intervals(draft)


def _batch(draft: Conversion) -> None:
    name = "micro_batch_size" if draft.tool == AXOLOTL else "per_device_train_batch_size"
    device, accumulated = draft.take(name), draft.take("gradient_accumulation_steps")
    if not (isinstance(device, int) and isinstance(accumulated, int)):
        draft.leave(name, "not carried over: train.batch_size is a whole number of pairs")
        return
    how = f"{name} {device} * gradient_accumulation_steps {accumulated}"
    draft.put(
        "train.batch_size", device * accumulated, name, f"{device} * {accumulated}; on N devices it was N times that"
    )
    draft.left_out.append(
        (draft.lines.get(name, 0), f"{how} is train.batch_size on one device; on N it was N times that")
    )


def _schedule(draft: Conversion) -> None:
    name = "lr_scheduler" if draft.tool == AXOLOTL else "lr_scheduler_type"
    kind = draft.take(name)
    draft.put("train.lr_scheduler_type", foreign.VALUES.get(kind, kind), name)
    settings = draft.take("lr_scheduler_kwargs")
    lowest = draft.take("cosine_min_lr_ratio", "min_lr_rate")
    if isinstance(settings, dict) and "min_lr_rate" in settings:
        lowest = settings.pop("min_lr_rate")
    if lowest is not None:
        draft.put("train.min_lr_ratio", lowest, "min_lr_rate")
    if settings:
        draft.leave("lr_scheduler_kwargs", f"{settings}: only the lowest rate can be set, train.min_lr_ratio")
    steps, share = draft.take("warmup_steps"), draft.take("warmup_ratio")
    if kind == "constant":
        return
    if steps is not None and steps >= 1:
        draft.put("train.warmup_steps", steps, "warmup_steps")
    else:  # transformers takes a number of steps below 1 for a share
        draft.put("train.warmup_ratio", steps if steps else share, "warmup_ratio")


def _intervals(draft: Conversion) -> None:
    """When to evaluate and save. Shares of an epoch become shares of the run."""
    epochs = draft.tree["train"].get("num_train_epochs", 1)
    strategy = draft.take("eval_strategy", "evaluation_strategy")
    steps, times = draft.take("eval_steps"), draft.take("evals_per_epoch")
    if times or strategy == "epoch":
        share = 1 / ((times or 1) * epochs)
        steps = share if share < 1 else None
    evaluates = "eval" in draft.tree["data"]
    for name in ("eval_on_start", "metric_for_best_model", "load_best_model_at_end", "early_stopping_patience"):
        value = draft.take(name)
        if value is not None and evaluates:
            draft.put(f"train.{name}", foreign.VALUES.get(str(value), value), name)
        elif value:
            draft.leave(name, "nothing is held out to evaluate on")
    if steps is not None and evaluates:
        draft.put("train.eval_steps", steps, "eval_steps")
    strategy, save, times = draft.take("save_strategy"), draft.take("save_steps"), draft.take("saves_per_epoch")
    if strategy in ("no", "epoch", "best") or times is not None:
        draft.leave(
            "saves_per_epoch" if times else "save_strategy", "checkpoints are written every train.save_steps steps"
        )
    elif save is not None:
        draft.put("train.save_steps", save, "save_steps")


def _output(draft: Conversion) -> None:
    draft.carry({key: names for key, names in _SAME.items() if key.startswith("output.")})
    trackers = [name for name in _listed(draft.take("report_to")) if name not in ("none", "all")]
    if any(name.startswith("wandb_") for name in draft.given) and "wandb" not in trackers:
        trackers.append("wandb")
    if trackers:
        draft.put("output.trackers", trackers, "report_to")


def _listed(value: Any) -> list[Any]:
    """A list as it is; `a, b` and single values as lists."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value if isinstance(value, list) else [] if value is None else [value]


def _as_number(value: Any) -> Any:
    """Numbers in quotes, and whole numbers with a point, as plain numbers."""
    number = strict_yaml.scalar(value) if isinstance(value, str) else value
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _is_valid(annotation: Any, value: Any) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _fields(section: str) -> dict[str, Any]:
    """The keys of a section, in the order of the schema."""
    annotation: Any = Recipe.model_fields[section].annotation
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return next(kind.model_fields for kind in kinds if hasattr(kind, "model_fields"))


def _default(section: str, key: str) -> Any:
    return _fields(section)[key].get_default(call_default_factory=True)


# ----------------------------------------------------------------------------------------------------- written out


def written(draft: Conversion) -> str:
    """The recipe as a file, with what is the other tool's default, or needs a thought, explained beside it."""
    blocks = [f"# From {draft.path.name}, a recipe of {draft.tool}.\n"]
    for section, keys in draft.tree.items():
        if keys is None:
            blocks.append(f"{_commented(f'{section}: null', 'a full fine-tune')}\n")
        elif keys:
            ordered = [key for key in _fields(section) if key in keys]
            blocks.append(f"{section}:\n" + "".join(_entry(draft, section, key) for key in ordered))
    return "\n".join(blocks)


def _entry(draft: Conversion, section: str, key: str) -> str:
    lines = [f"  {line}" for line in strict_yaml.dump({key: draft.tree[section][key]}).splitlines()]
    comment = draft.comments.get(f"{section}.{key}")
    if comment and len(lines) == 1:
        lines = [_commented(lines[0], comment)]
    return "".join(f"{line}\n" for line in lines)


def _commented(line: str, comment: str) -> str:
    return f"{line:<33} # {comment}"
