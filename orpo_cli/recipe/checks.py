"""What a recipe may not say although each key is right by itself: impossible combinations, work to come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orpo_cli.redact import redact

if TYPE_CHECKING:
    from orpo_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a recipe.

    `key` is the dotted key to report it at, `others` the further keys that have a part in it; `place` says where
    it stands if that is not where `key` stands (a duplicate).
    """

    key: str
    message: str
    hint: str | None = None
    others: tuple[str, ...] = ()
    place: Place | None = None


@dataclass(frozen=True, order=True)
class Place:
    """Where a value was written: `file:line`, or the `--set` that gave it; in reading order."""

    order: int
    text: str


def place_of(key: str, places: Mapping[str, Place]) -> Place | None:
    """Where a dotted key stands, or the nearest that it belongs to; None where not even that was written."""
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key)


class ImpossibleRecipeError(ValueError):
    """Keys that are right one by one and cannot stand together; carries every fault of the kind."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("; ".join(f"{fault.key}: {fault.message}" for fault in faults))
        self.faults = faults


# key -> (the values that work today, what to do meanwhile). A key leaves this table when its work is done.
# `*` stands for each item of a list.
NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    "model.device_map": ((None,), "leave it null; load_in_4bit makes a large base fit one device"),
}


def not_yet(recipe: Recipe) -> Iterator[Fault]:
    """Faults for values whose work is still to come, so that none is accepted and ignored."""
    tree = recipe.model_dump(mode="json")
    for pattern, (values_today, instead) in NOT_YET.items():
        for key, value in _matches(tree, pattern.split(".")):
            if value not in values_today:
                yield Fault(key, f"not yet: {_brief(value)} comes with a later version", instead)


def _matches(tree: Any, parts: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The (dotted key, value) of each place of the tree that the pattern names."""
    if not parts:
        yield prefix.removesuffix("."), tree
    elif parts[0] == "*" and isinstance(tree, list):
        for index, item in enumerate(tree):
            yield from _matches(item, parts[1:], f"{prefix}{index}.")
    elif isinstance(tree, dict) and parts[0] in tree:
        yield from _matches(tree[parts[0]], parts[1:], f"{prefix}{parts[0]}.")


def _brief(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def secrets(recipe: Recipe) -> Iterator[Fault]:
    """Faults for tokens and passwords: the recipe is saved with the run, and runs are passed on."""
    for key, text in _texts(recipe.model_dump(mode="json")):
        if redact(text) != text:
            yield Fault(
                key.removesuffix("."),
                "holds a token or password, and recipes are saved with the run",
                "take it out; a hub token goes into the environment, as HF_TOKEN, or `hf auth login` keeps it",
            )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a tree, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, f"{key}{name}.")


# Keys of `train` that win over others if both are written.
_WINS = (("max_steps", "num_train_epochs"), ("warmup_steps", "warmup_ratio"))


def overruled(recipe: Recipe) -> Iterator[str]:
    """What to know of keys that are written and have no effect, since another one wins over them."""
    train = recipe.train
    for winner, other in _WINS:
        value = getattr(train, winner)
        if value is not None and {winner, other} <= train.model_fields_set:
            yield f"train.{winner}: {value} wins over train.{other}: {getattr(train, other):g}, which has no effect"


def impossible(recipe: Recipe) -> Iterator[Fault]:
    """Faults for keys that cannot stand together."""
    yield from _impossible_model(recipe)
    yield from _impossible_lora(recipe)
    yield from _impossible_data(recipe)
    yield from _impossible_train(recipe)


def _impossible_model(recipe: Recipe) -> Iterator[Fault]:
    model = recipe.model
    quantised = [f"model.load_in_{bits}bit" for bits in (4, 8) if getattr(model, f"load_in_{bits}bit")]
    if len(quantised) == 2:
        yield Fault(
            quantised[1],
            "a base is held in 4 bits or in 8, not in both",
            "set one of load_in_4bit and load_in_8bit to false",
            (quantised[0],),
        )
    if quantised and recipe.lora is None:
        yield Fault(
            quantised[0],
            "a full fine-tune (lora: null) cannot train quantised weights",
            "set it to false, or remove lora: null to train an adapter",
            ("lora",),
        )
    if model.attn_implementation.startswith("flash_attention") and model.dtype == "float32":
        yield Fault(
            "model.attn_implementation",
            f"{model.attn_implementation} does not compute in float32",
            "set model.dtype to bfloat16, or attn_implementation to auto",
            ("model.dtype",),
        )
    if model.attn_implementation != "auto" and model.shared_prefix is True:
        yield Fault(
            "model.shared_prefix",
            "prefixes are shared by an attention of its own, in place of attn_implementation",
            "remove one of the two",
            ("model.attn_implementation",),
        )
    if model.chat_template in ("none", "plain") and model.chat_template_kwargs:
        yield Fault(
            "model.chat_template_kwargs",
            f"the template {model.chat_template} takes no variables",
            "remove it, or choose another chat_template",
            ("model.chat_template",),
        )


def _impossible_lora(recipe: Recipe) -> Iterator[Fault]:
    lora = recipe.lora
    if lora is None:
        return
    if lora.adapter is not None:
        defaults = type(lora)()
        for name in type(lora).model_fields:
            if name != "adapter" and getattr(lora, name) != getattr(defaults, name):
                yield Fault(
                    f"lora.{name}",
                    "the configuration of lora.adapter decides this",
                    f"remove {name}, or remove adapter to begin a new one",
                    ("lora.adapter",),
                )
    ranks = {"lora.r": lora.r, **{f"lora.rank_pattern.{name}": r for name, r in lora.rank_pattern.items()}}
    if lora.init_lora_weights == "orthogonal":
        for key, rank in ranks.items():
            if rank % 2:
                yield Fault(
                    key,
                    f"orthogonal initialisation needs an even rank (got {rank})",
                    f"write {rank + 1}, or another init_lora_weights",
                    ("lora.init_lora_weights",),
                )


def _impossible_data(recipe: Recipe) -> Iterator[Fault]:
    data = recipe.data
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_length:
        yield Fault(
            "data.max_prompt_length",
            f"leaves no room for a response: max_length, which counts both, is {data.max_length} "
            f"(got {data.max_prompt_length})",
            "make it smaller than data.max_length, or remove it",
            ("data.max_length",),
        )
    yield from _impossible_weights(recipe)
    if data.min_response_tokens >= data.max_length:
        yield Fault(
            "data.min_response_tokens",
            f"no response can be that long: max_length, which counts the prompt too, is {data.max_length} "
            f"(got {data.min_response_tokens})",
            "make it smaller than data.max_length",
            ("data.max_length",),
        )
    if recipe.model.chat_template == "none":
        if data.system is not None:
            yield Fault(
                "data.system",
                "with chat_template: none rows are taken as they are, so that there is no system turn",
                "put the text into the prompts, or choose a template (chatml, plain, ...)",
                ("model.chat_template",),
            )
        if recipe.loss.nll_tokens == "assistant":
            yield Fault(
                "loss.nll_tokens",
                "with chat_template: none there are no turns to tell assistant turns by",
                "use response or all",
                ("model.chat_template",),
            )


def _impossible_weights(recipe: Recipe) -> Iterator[Fault]:
    sources, held_out = recipe.data.train, recipe.data.eval
    weighted = [i for i, source in enumerate(sources) if source.weight is not None]
    for i in weighted:
        if len(sources) == 1:
            yield Fault(f"data.train.{i}.weight", "there is no other source to weigh it against", "remove it")
        elif len(weighted) < len(sources):
            without = next(i for i in range(len(sources)) if i not in weighted)
            yield Fault(
                f"data.train.{i}.weight",
                f"data.train.{without} has no weight: {sources[without].path}",
                "give every source a weight, or none",
            )
    for i, source in enumerate(held_out if isinstance(held_out, list) else []):
        if source.weight is not None:
            yield Fault(f"data.eval.{i}.weight", "every held-out pair counts once", "remove it; limit with max_pairs")


def _impossible_train(recipe: Recipe) -> Iterator[Fault]:
    train, evaluates = recipe.train, recipe.data.eval is not None
    needs_eval = {
        "eval_steps": train.eval_steps is not None,
        "load_best_model_at_end": train.load_best_model_at_end,
        "early_stopping_patience": train.early_stopping_patience is not None,
        "metric_for_best_model": train.metric_for_best_model != "eval_loss",
    }
    for name, is_asked_for in needs_eval.items():
        if is_asked_for and not evaluates:
            yield Fault(
                f"train.{name}",
                "there is nothing to evaluate on: data.eval is null",
                "hold some pairs out, e.g. data.eval: {holdout: 0.02}, or remove it",
                ("data.eval",),
            )
    needs_several = {
        "load_best_model_at_end": train.load_best_model_at_end,
        "early_stopping_patience": train.early_stopping_patience is not None,
    }
    for name, is_asked_for in needs_several.items():
        if is_asked_for and evaluates and train.eval_steps is None:
            yield Fault(
                f"train.{name}",
                "there is one evaluation to choose from: eval_steps is null, so that only the end is evaluated",
                "set train.eval_steps, e.g. 0.1, or remove it",
                ("train.eval_steps",),
            )
    if train.warmup_steps and train.max_steps is not None and train.warmup_steps >= train.max_steps:
        yield Fault(
            "train.warmup_steps",
            f"the warm-up would last the whole run, max_steps: {train.max_steps} (got {train.warmup_steps})",
            "make it smaller than train.max_steps",
            ("train.max_steps",),
        )
    if train.warmup_steps and train.lr_scheduler_type == "constant":
        yield Fault(
            "train.warmup_steps",
            "the schedule constant has no warm-up",
            "set lr_scheduler_type to constant_with_warmup, or remove warmup_steps",
            ("train.lr_scheduler_type",),
        )
    if train.min_lr_ratio and train.lr_scheduler_type in ("constant", "constant_with_warmup"):
        yield Fault(
            "train.min_lr_ratio",
            f"the schedule {train.lr_scheduler_type} does not decay",
            "remove it, or set lr_scheduler_type to cosine_with_min_lr",
            ("train.lr_scheduler_type",),
        )
