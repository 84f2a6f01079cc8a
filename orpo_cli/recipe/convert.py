"""Another tool's recipe -> ours: axolotl's, LLaMA-Factory's, TRL's (`ORPOConfig`, scripts), alignment-handbook's.

What means the same is carried over, with the other tool's default written out where it differs from ours. Whatever
else the file says is left out and named, each key with why. Nothing is dropped silently but blank keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orpo_cli.errors import RecipeError
from orpo_cli.recipe import foreign, strict_yaml
from orpo_cli.recipe.conversion import Conversion, listed
from orpo_cli.recipe.faults import allowed, annotation_at, either
from orpo_cli.recipe.load import read_text
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
    LLAMA_FACTORY: {
        **_HF_DEFAULTS,
        "cutoff_len": 2048,
        "lora_rank": 8,
        "lora_target": "all",
        "finetuning_type": "lora",
    },
    TRL: {**_TRL_DEFAULTS, "bf16": True},
    HANDBOOK: _TRL_DEFAULTS,
}

# Names that mean the same in all tools that have them, beside those that are spelt like ours.
_SAME = {
    "model.eos_token": ("eos_token",),
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
    tool = _tool(path, given, lines)
    draft = Conversion(path, tool, given, lines, DEFAULTS[tool])
    draft.remarks += [(line, f"{name}: given twice; the first one counts") for name, line in tree.duplicates]
    for name in ("rl", "stage", "pref_loss"):
        draft.take(name)  # they have said that it is for ORPO
    _model(draft)
    _lora(draft)
    readers = {AXOLOTL: _axolotl_data, LLAMA_FACTORY: _llamafactory_data, TRL: _trl_data, HANDBOOK: _handbook_data}
    readers[tool](draft)
    _length_and_loss(draft)
    _train(draft)
    _output(draft)
    for name in list(draft.given):
        draft.leave(name, _why_left(name))
    if tool in (TRL, HANDBOOK):
        draft.remark(f"no recipe of {tool} says which method it is for; taken for ORPO's")
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
    if key == "output.trackers" and note:  # what the tracker itself is told
        return f"not carried over; {note}"
    if key is not None:
        return f"not carried over; see {key}" + (f" ({note})" if note else "")
    return note or "no key of ours, and unknown here"


# ------------------------------------------------------------------------------------------------------- model


def _model(draft: Conversion) -> None:
    if (name := draft.named("base_model", "model_name_or_path")) is not None:
        draft.put("model.name_or_path", draft.take(name), name)
    _dtype(draft)
    if (bits := draft.number("quantization_bit")) is not None:
        if bits in (4, 8):
            draft.put(f"model.load_in_{bits}bit", True, "quantization_bit")
        else:
            draft.leave("quantization_bit", f"{bits}: there are 4 and 8")
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
        others = ", ".join(map(str, tokens)) if isinstance(tokens, dict | list) else tokens
        draft.leave("special_tokens", f"{others}: not needed; there is no padding, the rest is the template's")
    if (thinking := draft.take("enable_thinking")) is not None:
        draft.put("model.chat_template_kwargs", {"enable_thinking": thinking}, "enable_thinking")
    draft.carry(_SAME, "model.")


def _dtype(draft: Conversion) -> None:
    """`bf16: true` computes in bfloat16 whatever dtype the weights are loaded in."""
    loaded_by = draft.named("torch_dtype", "dtype")
    loaded = draft.take("torch_dtype", "dtype")
    half = {name: draft.take(name) for name in ("fp16", "float16", "bf16", "bfloat16", "pure_bf16")}
    wanted = next((name for name, value in half.items() if value is True), None)
    if wanted is not None:
        draft.put("model.dtype", "bfloat16" if "b" in wanted else "float16", wanted)
    elif loaded_by is not None:
        draft.put("model.dtype", _word(loaded), loaded_by)


def _template(draft: Conversion) -> None:
    for name in ("chat_template_jinja", "chat_template_path", "chat_template", "template"):
        value = draft.take(name)
        if value is None or (name == "chat_template" and (value == "jinja" or draft.template is not None)):
            continue
        if "{" in str(value):
            draft.template = str(value)
        elif str(value).endswith(".jinja"):
            draft.tree["model"]["chat_template"] = value  # the loader looks whether it is there
        elif str(value) in _TEMPLATES:
            draft.put("model.chat_template", _TEMPLATES[value], name)
        else:
            draft.leave(name, f"{value}: no template of ours; left auto (the tokenizer's own), or write it to a file")


# -------------------------------------------------------------------------------------------------------- lora


def _lora(draft: Conversion) -> None:
    settings = [
        name for name in draft.given if name.startswith(("lora_", "peft_")) or name in ("use_rslora", "use_dora")
    ]
    if not _wants_lora(draft):
        draft.tree["lora"] = None
        for setting in settings:
            draft.leave(setting, "a full fine-tune has no adapter")
    elif (adapter := draft.named("lora_model_dir", "adapter_name_or_path")) is not None:
        draft.put("lora.adapter", draft.take(adapter), adapter)
        for setting in settings:
            if setting != adapter:
                draft.leave(setting, "the configuration of lora.adapter decides it")
    else:
        rank = draft.number("lora_r", "lora_rank")
        if rank is not None:
            draft.put("lora.r", rank, "lora_r" if "lora_r" in draft.lines else "lora_rank")
            if draft.tool == LLAMA_FACTORY and "lora_alpha" not in draft.given:
                draft.put("lora.alpha", 2 * rank, "lora_alpha", "LLaMA-Factory's default: twice the rank")
        draft.carry(_SAME, "lora.")
        _lora_targets(draft)
        if (whole := draft.named("lora_modules_to_save", "additional_target")) is not None:
            draft.put("lora.modules_to_save", listed(draft.take(whole)), whole)


def _wants_lora(draft: Conversion) -> bool:
    """Whether an adapter is trained; RecipeError for what is neither that nor a full fine-tune."""
    name = {AXOLOTL: "adapter", LLAMA_FACTORY: "finetuning_type"}.get(draft.tool, "use_peft")
    method = draft.take(name)
    if isinstance(method, list | dict) or method not in ("lora", "qlora", True, "full", False, None):
        at = f"{draft.path}:{draft.lines[name]}: {name}"
        raise RecipeError(f"{at}: {method} has no counterpart", "there are LoRA and a full fine-tune")
    if method == "qlora":
        draft.put("model.load_in_4bit", True, name)
    return method in ("lora", "qlora", True)


def _lora_targets(draft: Conversion) -> None:
    if draft.take("lora_target_linear") is True:
        return
    name = draft.named("lora_target_modules", "lora_target")
    if name is None:
        draft.remark("no layers are named for LoRA, which leaves them to peft (mostly q_proj, v_proj); all-linear here")
        return
    targets = draft.take(name)
    if targets not in ("all", "all-linear", ["all-linear"]):
        several = isinstance(targets, list) or "," in str(targets)
        draft.put("lora.target_modules", listed(targets) if several else targets, name)


# -------------------------------------------------------------------------------------------------------- data


def _axolotl_data(draft: Conversion) -> None:
    for ours, name in (("train", "datasets"), ("eval", "test_datasets")):
        _put_sources(draft, ours, [s for entry in draft.entries(name) for s in _axolotl_sources(draft, name, entry)])
    _holdout(draft, "val_set_size")
    if "strict" in draft.given:
        draft.leave("strict", "not needed: an unknown key is always an error; data.strict is about rows")


def _axolotl_sources(draft: Conversion, name: str, entry: dict[str, Any]) -> list[dict[str, Any]]:
    source = _source(entry, {"path": "path", "name": "name", "split": "split", "revision": "revision"})
    files, kind = entry.pop("data_files", None), entry.pop("type", None)
    entry.pop("ds_type", None)
    fields = {**entry, **(kind if isinstance(kind, dict) else {})}
    theirs = {
        "prompt": "field_prompt",
        "system": "field_system",
        "chosen": "field_chosen",
        "rejected": "field_rejected",
    }
    if "field_messages" in fields:
        theirs["prompt"] = "field_messages"
    _add_columns(source, {ours: fields[field] for ours, field in theirs.items() if field in fields})
    if kind is not None:
        draft.remark(f"{name}: type: not needed; the shape is recognised from the rows", name)
    _say_rest(draft, name, [key for key in entry if not str(key).startswith("field_")])
    return _of_files(source, files)


def _llamafactory_data(draft: Conversion) -> None:
    folder = Path(str(draft.take("dataset_dir") or "data"))
    listing = folder / "dataset_info.json"
    try:
        found = json.loads(listing.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    entries = found.items() if isinstance(found, dict) else ()
    known = {name: entry for name, entry in entries if isinstance(entry, dict)}
    most = draft.number("max_samples")
    for ours, name in (("train", "dataset"), ("eval", "eval_dataset")):
        sources = []
        for dataset in map(str, listed(draft.take(name))):
            if dataset not in known:
                draft.remark(
                    f"{name}: {dataset} is not in {listing}; taken for a path or hub id: see data.{ours}", name
                )
            sources.append(_llamafactory_source(known.get(dataset, {"hf_hub_url": dataset}), folder))
            if most is not None:
                sources[-1]["max_pairs"] = min(most, sources[-1].get("max_pairs", most))
        _put_sources(draft, ours, sources)
    _holdout(draft, "val_size")
    if draft.take("disable_shuffling") is True:
        draft.put("data.shuffle", False, "disable_shuffling")


def _llamafactory_source(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A source from an entry of dataset_info.json."""
    path = entry.get("hf_hub_url") or str(folder / str(entry.get("file_name") or ""))
    source = {"path": path, **_source(dict(entry), {"subset": "name", "split": "split", "num_samples": "max_pairs"})}
    theirs = found if isinstance(found := entry.get("columns"), dict) else {}
    columns = {ours: theirs[ours] for ours in ("chosen", "rejected", "system") if theirs.get(ours)}
    if theirs.get("query"):  # the prompt, a line break, the query
        columns |= {"instruction": theirs.get("prompt", "instruction"), "input": theirs["query"]}
    elif prompt := theirs.get("messages") or theirs.get("prompt"):
        columns |= {"prompt": prompt} if prompt != "conversations" else {}  # which is recognised by that name
    _add_columns(source, columns)
    return source


def _trl_data(draft: Conversion) -> None:
    sources = []
    for entry in draft.entries("datasets"):
        source, files = (
            _source(entry, {"path": "path", "name": "name", "split": "split"}),
            entry.pop("data_files", None),
        )
        _say_rest(draft, "datasets", list(entry))
        sources += _of_files(source, files)
    _put_sources(draft, "train", sources)
    name, config = draft.take("dataset_name"), draft.take("dataset_config")
    train, test = draft.take("dataset_train_split"), draft.take("dataset_test_split")
    if name is not None:
        source = {"path": name} | ({"name": config} if config else {})
        _put_sources(draft, "train", [_at_split(source, train, usual="train")])
        if test is not None or draft.given.get("eval_strategy", "no") not in ("no", False):
            _put_sources(draft, "eval", [_at_split(source, test, usual=None)])
    _holdout(draft, "test_split_size")
    if draft.take("dataset_streaming", "streaming") is True:
        draft.put("data.streaming", True, "dataset_streaming")


def _handbook_data(draft: Conversion) -> None:
    mixture = draft.take("dataset_mixture")
    mixer, configs, splits = (draft.take(name) for name in ("dataset_mixer", "dataset_configs", "dataset_splits"))
    if isinstance(mixture, dict):
        draft.given["datasets"], draft.lines["datasets"] = mixture.get("datasets"), draft.lines["dataset_mixture"]
        draft.defaults = {**draft.defaults, "test_split_size": mixture.get("test_split_size")}
        sources = []
        for entry in draft.entries("datasets"):
            _say_share(draft, "dataset_mixture", entry.get("id"), entry.pop("weight", None))
            sources.append(_source(entry, {"id": "path", "config": "name", "split": "split"}))
        _put_sources(draft, "train", sources)
    if isinstance(mixer, dict):
        names = [*listed(configs), *[None] * len(mixer)]
        sources = [{"path": path} | ({"name": name} if name else {}) for path, name in zip(mixer, names, strict=False)]
        for path, share in mixer.items():
            _say_share(draft, "dataset_mixer", path, share)
        wanted = [str(split) for split in listed(splits)] or ["train", "test"]
        held_out = [split for split in wanted if "test" in split or "val" in split]
        for ours, theirs in (("train", [split for split in wanted if split not in held_out]), ("eval", held_out)):
            _put_sources(draft, ours, [_at_split(s, split, usual=ours) for s in sources for split in theirs])
    _holdout(draft, "test_split_size")


def _put_sources(draft: Conversion, ours: str, sources: list[dict[str, Any]]) -> None:
    """Set data.train or data.eval, written as one would by hand."""
    short = [source["path"] if set(source) == {"path"} else source for source in sources]
    if short:
        draft.tree["data"][ours] = short[0] if len(short) == 1 else short


def _holdout(draft: Conversion, name: str) -> None:
    size = draft.number(name)
    if size and "eval" not in draft.tree["data"]:
        draft.tree["data"]["eval"] = {"holdout": size}


def _at_split(source: dict[str, Any], split: Any, *, usual: str | None) -> dict[str, Any]:
    return source if split in (None, usual) else {**source, "split": split}


def _of_files(source: dict[str, Any], files: Any) -> list[dict[str, Any]]:
    """The source itself, or where it is `json` with its data_files, one a file."""
    names = [name for group in files.values() for name in listed(group)] if isinstance(files, dict) else listed(files)
    return [{**source, "path": name} for name in names] or [source]


def _say_rest(draft: Conversion, name: str, rest: list[Any]) -> None:
    if rest:
        draft.remark(f"{name}: {', '.join(map(str, rest))}: no counterpart in a source", name)


def _say_share(draft: Conversion, name: str, path: Any, share: Any) -> None:
    if share not in (None, 1, 1.0):
        draft.remark(f"{name}: a share of {path}; write the max_pairs of its source", name)


def _source(entry: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The part of an entry that a source of ours has, taken out of it."""
    return {ours: value for theirs, ours in names.items() if (value := entry.pop(theirs, None)) is not None}


def _add_columns(source: dict[str, Any], columns: dict[str, str]) -> None:
    if any(ours != theirs for ours, theirs in columns.items()):
        source["columns"] = columns


# ---------------------------------------------------------------------------------------------- loss, train, output


def _length_and_loss(draft: Conversion) -> None:
    draft.carry(_SAME, "data.", "loss.")
    if draft.tool != LLAMA_FACTORY:  # the others leave it to TRL's trainer
        draft.put("loss.nll_tokens", "all", "", "as in TRL: the prompt is learnt too; ours would be response")
        draft.put("loss.nll_reduction", "token", "", "as in TRL: a mean over tokens; ours would be pair")
    draft.remark(f"pairs over data.max_length are dropped, where {draft.tool} truncates them (data.overlong)")


def _train(draft: Conversion) -> None:
    _batch(draft)
    draft.carry(_SAME, "train.")
    steps = draft.number("max_steps")
    if steps is not None and steps > 0:  # -1 is no limit
        draft.put("train.max_steps", steps, "max_steps")
    _schedule(draft)
    if (name := draft.named("optim", "optimizer")) is not None:
        draft.put("train.optimizer", _word(draft.take(name)), name)
    if draft.take("train_sampling_strategy") == "sequential":
        draft.put("data.shuffle", False, "train_sampling_strategy")
    _evaluations(draft)
    _checkpoints(draft)


def _batch(draft: Conversion) -> None:
    name = "micro_batch_size" if draft.tool == AXOLOTL else "per_device_train_batch_size"
    micro, accumulated = draft.number(name), draft.number("gradient_accumulation_steps")
    if micro is None or accumulated is None:
        return
    product = f"{micro} * {accumulated}"
    draft.put("train.batch_size", micro * accumulated, name, f"{product}; on N devices it was N times that")
    draft.remark(f"{name} * gradient_accumulation_steps: {product} on one device; on N it was N times that", name)


def _schedule(draft: Conversion) -> None:
    name = "lr_scheduler" if draft.tool == AXOLOTL else "lr_scheduler_type"
    kind = _word(draft.take(name))
    draft.put("train.lr_scheduler_type", kind, name)
    settings = draft.take("lr_scheduler_kwargs")
    lowest = settings.pop("min_lr_rate", None) if isinstance(settings, dict) else None
    if settings:
        draft.leave("lr_scheduler_kwargs", "only the lowest rate can be set, train.min_lr_ratio")
    if (lowest := draft.number("cosine_min_lr_ratio", "min_lr_rate") or lowest) is not None:
        draft.put(
            "train.min_lr_ratio", lowest, "lr_scheduler_kwargs" if settings is not None else "cosine_min_lr_ratio"
        )
    steps, share = draft.number("warmup_steps"), draft.number("warmup_ratio")
    if kind == "constant":
        if steps:
            draft.leave("warmup_steps", "the schedule constant has no warm-up, there and here")
    elif steps is not None and steps >= 1:
        draft.put("train.warmup_steps", steps, "warmup_steps")
    else:  # transformers takes a number of steps below 1 for a share
        draft.put("train.warmup_ratio", steps or share or 0, "warmup_ratio")


def _evaluations(draft: Conversion) -> None:
    """When to evaluate: so many times an epoch becomes a share of the run."""
    strategy = draft.take("eval_strategy", "evaluation_strategy")
    name = draft.named("eval_steps", "evals_per_epoch")
    steps, times = draft.number("eval_steps"), draft.number("evals_per_epoch")
    if "eval" not in draft.tree["data"]:
        for asked in (name, "metric_for_best_model", "load_best_model_at_end", "early_stopping_patience"):
            if asked is not None and draft.given.get(asked, asked == name):
                draft.leave(asked, "nothing is held out to evaluate on")
        return
    if times or strategy == "epoch":
        share = 1 / ((times or 1) * draft.tree["train"].get("num_train_epochs", 1))
        steps = share if share < 1 else None
    if steps:
        draft.put("train.eval_steps", steps, name or "eval_strategy")
    for key in ("eval_on_start", "metric_for_best_model", "load_best_model_at_end", "early_stopping_patience"):
        several = key in ("load_best_model_at_end", "early_stopping_patience")
        if several and draft.given.get(key) and not steps:
            draft.leave(key, "only the end is evaluated")
        elif (value := draft.take(key)) is not None:
            draft.put(f"train.{key}", _word(value), key)


def _checkpoints(draft: Conversion) -> None:
    strategy, steps = draft.take("save_strategy"), draft.number("save_steps")
    if "saves_per_epoch" in draft.given:
        draft.leave("saves_per_epoch", "checkpoints are written every train.save_steps steps")
    elif strategy not in (None, "steps"):
        draft.leave("save_strategy", "checkpoints are written every train.save_steps steps")
    elif steps is not None:
        draft.put("train.save_steps", steps, "save_steps")


def _output(draft: Conversion) -> None:
    draft.carry(_SAME, "output.")
    known, named = allowed(annotation_at(("output", "trackers", 0))), listed(draft.take("report_to"))
    trackers = [name for name in named if name in known]
    if others := [str(name) for name in named if name not in (*known, "none")]:
        draft.leave("report_to", f"{', '.join(others)}: there are {either(known)}")
    for name in known:
        flag = draft.take(f"use_{name}")
        # A tool that has no report_to takes a tracker for wanted where one of its own keys is set.
        has_keys = not named and any(key.startswith(f"{name}_") and draft.given[key] for key in draft.given)
        if name not in trackers and (flag or (has_keys and flag is None)):
            trackers.append(name)
    if trackers:
        draft.put("output.trackers", trackers, "report_to")


def _word(value: Any) -> Any:
    """Our word for another tool's, or the value as it is."""
    return foreign.VALUES.get(value, value) if isinstance(value, str) else value
