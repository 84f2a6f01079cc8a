"""The recipe: every key, its default, what it does, its unit, and what `auto` means.

This is the only home of every default. The order of sections and keys is the order of the reference that is
generated from it. What a key may hold stands in its type; what keys may not say together, in `checks.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    Tag,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic.functional_validators import AfterValidator
from pydantic_core import PydanticCustomError

from orpo_cli.recipe import checks


class Section(BaseModel):
    """What all sections share: no unknown key, no silent conversion, no infinite number, no change later."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def _is_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return pattern


def _is_template_file(path: str) -> str:
    if not path.endswith(".jinja"):
        raise PydanticCustomError("not_jinja", "not a .jinja file")
    return path


def _is_day(text: str) -> str:
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        raise PydanticCustomError("not_a_day", "not a day written as 2026-11-21")
    try:
        date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"not a day: {error}") from error
    return text


@dataclass(frozen=True)
class InWords:
    """What a type allows, for messages, where its structure does not say it well."""

    text: str


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Regex = Annotated[Text, AfterValidator(_is_regex)]
JinjaFile = Annotated[
    str,
    AfterValidator(_is_template_file),
    InWords("a file.jinja"),
    WithJsonSchema({"type": "string", "pattern": r"\.jinja$"}),
]
Day = Annotated[
    str,
    AfterValidator(_is_day),
    InWords("a day as 2026-11-21"),
    WithJsonSchema({"type": "string", "format": "date"}),
]
Scalar = str | int | float | bool
Number = int | float


class ModelSection(Section):
    """The base model, how it is loaded, and the template that turns dialogues into its text."""

    name_or_path: Annotated[Text, InWords("a hub id or directory")]
    """The base model: a hub id or a directory. Required."""
    revision: Text = "main"
    """Branch, tag or commit of the hub repository; the commit found goes into `manifest.json`."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype. `auto`: float32 if the base is stored so, else bfloat16 (float16 on a GPU that has none). float16
    trains with loss scaling. Trained weights live in float32 whatever this says."""
    load_in_4bit: bool = False
    """Hold the frozen base in 4 bits (NF4, double quantisation), computing in `dtype`. Needs LoRA."""
    load_in_8bit: bool = False
    """Hold the frozen base in 8 bits (LLM.int8). Needs LoRA."""
    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """Attention kernels. `auto`: prefixes are shared where the model allows it, else what transformers chooses.
    Any other: that one, and prefixes are not shared."""
    shared_prefix: Literal["auto"] | bool = "auto"
    """Compute a pair's prompt once for both of its answers. `auto`: where the model is shown to allow it; false:
    chosen and rejected are padded and run apart."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Compute activations again in the backward pass: less memory, a third to a half more time. `auto`: in as many
    layers as the device's memory asks for."""
    device_map: Text | dict[str, int | str] | None = None
    """Spread one model over several devices. null: the whole model on each process's device."""
    disable_dropout: bool = True
    """Switch the base model's own dropout off (`lora.dropout` stays as it is)."""
    chat_template: Literal["auto", "plain", "chatml", "llama3", "none"] | JinjaFile = "auto"
    """How dialogues become text. `auto`: the tokenizer's own template, else `plain`. `plain`: `User: ...`,
    `Assistant: ...`; `none`: prompt and responses as they are, then EOS; or the path of a Jinja file."""
    chat_template_kwargs: dict[str, JsonValue] = {}
    """Extra variables for the template, e.g. `{enable_thinking: false}`."""
    chat_template_date: Literal["auto"] | Day = "auto"
    """The day that it is for a template that writes one. `auto`: the day on which the run begins, kept in its
    `recipe.yaml`, so that a resumption and `orpo eval` read the same tokens on another."""
    eos_token: Text = "auto"
    """The token that ends a turn and stops generation. `auto`: the end of a turn in the template, else the
    tokenizer's EOS."""
    new_token_init: Literal["mean"] = "mean"
    """How the rows added for a template's control tokens start: `mean` of the rows the base has."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for repositories that you have read."""


class LoraSection(Section):
    """The adapter. Absent: LoRA with these defaults; `lora: null`: a full fine-tune."""

    r: Count = 16
    """Rank of each adapter matrix pair."""
    alpha: Count = 32
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the adapter's inputs that is dropped in training."""
    target_modules: Text | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    """Layers that get an adapter: `all-linear` (all but the head), a list of name endings, or a regular expression
    over whole names."""
    exclude_modules: list[Text] = []
    """Name endings of layers that get none."""
    trainable_tokens: Literal["auto"] | list[Text] = "auto"
    """Tokens whose embedding rows are trained beside the adapter. `auto`: those of the template that were added or
    never trained; a list: these as well."""
    modules_to_save: list[Text] = []
    """Layers trained whole and saved with the adapter, e.g. `[embed_tokens, lm_head]`."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: scale by alpha / sqrt(r)."""
    use_dora: bool = False
    """DoRA: train direction and magnitude apart. Slower."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """Start of the adapter. true: A Kaiming-uniform, B zero, so that training starts at the base model."""
    rank_pattern: dict[str, Count] = {}
    """Ranks of single layers, by name or regular expression, e.g. `{down_proj: 32}`."""
    adapter: Text | None = None
    """Go on training this adapter (hub id or directory), whose own configuration then decides everything above."""


FILTER_OPERATORS = {
    "eq": "eq",
    "ne": "ne",
    "gt": "gt",
    "ge": "ge",
    "lt": "lt",
    "le": "le",
    "in": "in_",
    "not_in": "not_in",
    "contains": "contains",
    "not_contains": "not_contains",
    "matches": "matches",
    "is_null": "is_null",
}
"""The operators of a filter, by the name a recipe uses, with the field of `FilterSpec` that holds its operand."""


class FilterSpec(Section):
    """A condition on a row that keeps it: one column and exactly one operator, e.g. `{column: score, ge: 8}`."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 2, "maxProperties": 2})

    column: Text
    """The column of the source, as the data calls it."""
    eq: Scalar | None = None
    """The value equals this."""
    ne: Scalar | None = None
    """The value differs from this."""
    gt: Number | str | None = None
    """The value is greater."""
    ge: Number | str | None = None
    """The value is greater or equal."""
    lt: Number | str | None = None
    """The value is less."""
    le: Number | str | None = None
    """The value is less or equal."""
    in_: Annotated[list[Scalar], Field(min_length=1)] | None = Field(default=None, alias="in")
    """The value is one of these."""
    not_in: Annotated[list[Scalar], Field(min_length=1)] | None = None
    """The value is none of these."""
    contains: Scalar | None = None
    """The text holds this text, or the list this item."""
    not_contains: Scalar | None = None
    """The text does not hold this text, or the list this item."""
    matches: Regex | None = None
    """The text matches this regular expression somewhere (`re.search`)."""
    is_null: bool | None = None
    """true: the value is missing; false: it is there."""

    @model_validator(mode="after")
    def _one_operator(self) -> FilterSpec:
        given = self._operators_given()
        if len(given) != 1:
            raise ValueError(
                f"a filter needs exactly one operator with a value, not {' and '.join(given) or 'none'}; "
                "missing values are asked for by is_null: true"
            )
        return self

    def _operators_given(self) -> list[str]:
        return [op for op, field in FILTER_OPERATORS.items() if getattr(self, field) is not None]

    @property
    def op(self) -> str:
        """The operator's name as the recipe writes it: eq ne gt ge lt le in not_in contains ... is_null."""
        return self._operators_given()[0]

    @property
    def value(self) -> Any:
        """The operator's operand."""
        return getattr(self, FILTER_OPERATORS[self.op])

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        del handler  # the shape that is written is the one that is read
        return {"column": self.column, self.op: self.value}


ColumnMap = dict[Literal["prompt", "chosen", "rejected", "system", "instruction", "input"], Text]


class SourceSpec(Section):
    """One source of preference pairs."""

    path: Text
    """A hub id, file, glob or directory."""
    name: Text | None = None
    """The configuration (subset) of a hub data set."""
    split: Text | None = None
    """The split; null: `train` or `train_prefs` (for `data.eval`: `test`, `validation` or `test_prefs`), or the only
    one there is."""
    revision: Text | None = None
    """Branch, tag or commit of a hub data set; null: its default branch."""
    weight: Positive | None = None
    """How often this source is drawn against the others: its pairs come in as many times as an epoch's share for it
    asks for, while an epoch keeps the number of pairs that all sources have. All sources have one, or none: then every
    pair comes once."""
    group_by: Text | None = None
    """For rows that hold one answer each: those that follow one another with one value in this column become one row
    with that value, and all of them in a column `rows`."""
    columns: ColumnMap = {}
    """This source's columns, over those of `data.columns`."""
    filter: list[FilterSpec] = []
    """This source's conditions, besides those of `data.filter`."""
    max_pairs: Count | None = None
    """Take at most this many pairs, the first ones that pass the filters; null: all."""


class Holdout(Section):
    """Take the held-out set from the training data: all pairs of a prompt go to one side."""

    holdout: Share | Count
    """A share below 1, or a number of pairs if an integer."""


def _as_sources(value: Any) -> Any:
    """A path, a source, or a list of both -> a list of sources."""
    items = value if isinstance(value, list) else [value] if isinstance(value, str | dict | SourceSpec) else value
    if not isinstance(items, list):
        return value
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _eval_kind(value: Any) -> str:
    is_mapping = isinstance(value, dict) and value.keys().isdisjoint(SourceSpec.model_fields)
    return "<holdout>" if is_mapping or isinstance(value, Holdout) else "<sources>"


Sources = Annotated[
    list[SourceSpec],
    Field(min_length=1),
    InWords("a hub id, file, glob or directory, or a list of {path, split, ...}"),
    BeforeValidator(_as_sources, json_schema_input_type=Text | SourceSpec | list[Text | SourceSpec]),
]
EvalData = Annotated[
    Annotated[Sources, Tag("<sources>")] | Annotated[Holdout, Tag("<holdout>")], Discriminator(_eval_kind)
]


class DataSection(Section):
    """The preference pairs: where from, in which shape, how long, and what becomes of those that do not fit."""

    train: Sources
    """Training pairs: a hub id, file, glob or directory, or a list of `{path, name, split, revision, weight, group_by,
    columns, filter, max_pairs}`. Required."""
    eval: EvalData | None = None
    """Held-out pairs: the same, or `{holdout: 0.02}` (a share, or a number of pairs if an integer), taken from
    `train` by prompt. null: no evaluation."""
    format: Literal[
        "auto", "prompt", "alpaca", "question", "sharegpt", "input", "paired", "judged", "messages", "hh"
    ] = "auto"
    """Shape of the rows, by the columns that hold the prompt, or `messages` and `hh` for whole dialogues, as messages
    or as text. `auto`: recognised from the first rows."""
    columns: ColumnMap = {}
    """Our names to the data's, e.g. `{prompt: question, chosen: good, rejected: bad}`; a dot reaches into nested
    values, and `answers[max score]` is the best of a list. Our names: prompt, chosen, rejected, system, instruction,
    input."""
    filter: list[FilterSpec] = []
    """Keep only rows that meet all of these, e.g. `[{column: status, ne: tie}, {column: chosen_score, ge: 8}]`."""
    system: Text | None = None
    """A system turn for rows that have none."""
    streaming: Literal["auto"] | bool = "auto"
    """true: the set is never held; false: it is. `auto`: stream what is large or remote."""
    shuffle: bool = True
    """Draw the pairs in a new order each epoch, fixed by `train.seed`."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens of the prompt and the longer response together; at most the model's context."""
    max_prompt_length: Count | None = None
    """Tokens of the prompt alone; null: no limit of its own."""
    overlong: Literal["drop", "truncate_prompt", "truncate_response", "error"] = "drop"
    """What becomes of a pair over `max_length` or `max_prompt_length`."""
    min_response_tokens: Count = 1
    """Tokens that each response must have left; a pair with fewer is dropped."""
    deduplicate: bool = False
    """Drop pairs that occurred before."""
    add_bos: Literal["auto"] | bool = "auto"
    """Begin each sequence with BOS (never twice). `auto`: what the template or tokenizer does by itself."""
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of dropped pairs above which the run is refused; above a tenth of it there is a warning."""
    strict: bool = False
    """true: the first malformed row is an error, instead of being dropped and counted."""


class LossSection(Section):
    """The objective: NLL of the chosen answer plus beta times the odds-ratio term (arXiv 2403.07691, eq. 6)."""

    beta: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the odds-ratio term (lambda in the paper); 0 is plain SFT on the chosen answers."""
    nll_tokens: Literal["response", "assistant", "all"] = "response"
    """Tokens of the NLL: the chosen response; every assistant turn before it too; or all, prompt included (the
    paper's code, TRL)."""
    nll_reduction: Literal["pair", "token"] = "pair"
    """`pair`: mean over pairs of each one's token mean (the paper's equation, LLaMA-Factory); `token`: mean over all
    tokens of the step (TRL)."""


class TrainSection(Section):
    """The run: steps, optimizer, schedule, and when to log, evaluate and save."""

    learning_rate: Literal["auto"] | Positive = "auto"
    """Peak learning rate. `auto`: 8e-6 for a full fine-tune, 8e-5 for LoRA; printed."""
    num_train_epochs: Positive = 1.0
    """Passes over the data; may be a fraction."""
    max_steps: Count | None = None
    """Optimizer steps; wins over epochs. null: by epochs."""
    batch_size: Count = 16
    """Pairs an optimizer step, over all devices."""
    max_tokens_per_microbatch: Literal["auto"] | Count = "auto"
    """Tokens computed at once on a device: the memory knob, which changes nothing but rounding. `auto`: what is fast
    and fits the device's memory, kept in the checkpoint; halved whenever memory runs out all the same."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """AdamW. `8bit`: its moments take a quarter of the memory (CUDA and CPU); `paged`: they give way to the host's
    memory when the device's runs out (CUDA)."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: Positive = 1e-8
    """Added to Adam's denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, times the learning rate."""
    max_grad_norm: Positive = 1.0
    """Clip the gradient to this norm."""
    lr_scheduler_type: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "cosine"
    """Course of the learning rate after the warm-up."""
    min_lr_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The learning rate never decays below this share of its peak."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps in which the learning rate rises linearly."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps in which the learning rate rises; wins over the ratio. null: by the ratio."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything random: order, initial adapter, dropout. The hold-out is the same for every seed."""
    logging_steps: Count = 1
    """Steps between two training rows of `metrics.jsonl`."""
    eval_steps: Count | Share | None = None
    """Steps between two evaluations; below 1: a share of the run. null: only at the end."""
    eval_on_start: bool = True
    """Evaluate before the first step, where there is `data.eval`."""
    save_steps: Count = 100
    """Steps between two checkpoints."""
    save_total_limit: Count = 2
    """Newest checkpoints to keep; the best one is kept besides."""
    metric_for_best_model: Literal[
        "eval_loss",
        "eval_nll_loss",
        "eval_or_loss",
        "eval_log_odds_ratio",
        "eval_accuracy",
        "eval_chosen_logps",
        "eval_perplexity",
    ] = "eval_loss"
    """Evaluation metric that says which checkpoint is the best (losses and perplexity: lower; the rest: higher)."""
    load_best_model_at_end: bool = False
    """End with the best checkpoint's weights instead of the last ones."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations without a better one; null: never."""
    sample_prompts: list[Text] = []
    """Prompts answered at each evaluation, into `samples.jsonl`."""


class OutputSection(Section):
    """What is written, and where."""

    dir: Text = "auto"
    """The run directory. `auto`: `runs/<last part of the model's name, lower case>-orpo`."""
    merge: bool = True
    """Write `merged/`, the full weights with the adapter in them, which stock transformers loads."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = []
    """Experiment trackers that are told what `metrics.jsonl` is; their packages are installed apart."""


class Recipe(Section):
    """One run: which base model, which preference pairs, which objective, how to train, where to write."""

    model: ModelSection
    lora: LoraSection | None = Field(default_factory=LoraSection)
    data: DataSection
    loss: LossSection = Field(default_factory=LossSection)
    train: TrainSection = Field(default_factory=TrainSection)
    output: OutputSection = Field(default_factory=OutputSection)
    _places: dict[str, checks.Place] = PrivateAttr(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Whether two recipes say the same, wherever they were written."""
        return isinstance(other, Recipe) and self.model_dump() == other.model_dump()

    @model_validator(mode="before")
    @classmethod
    def _name_the_run(cls, tree: Any) -> Any:
        """Replace `output.dir: auto` by the directory it stands for."""
        if not isinstance(tree, dict):
            return tree
        model, output = tree.get("model"), tree.get("output", {})
        name = model.get("name_or_path") if isinstance(model, dict) else getattr(model, "name_or_path", None)
        if isinstance(name, str) and isinstance(output, dict) and output.get("dir", "auto") == "auto":
            return {**tree, "output": {**output, "dir": default_run_dir(name)}}
        return tree

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if faults := [*checks.not_yet(self), *checks.impossible(self), *checks.secrets(self)]:
            raise checks.ImpossibleRecipeError(faults)
        return self

    def written_at(self, places: Mapping[str, checks.Place]) -> Recipe:
        """The same recipe, which knows where its keys were written."""
        recipe = self.model_copy()
        recipe._places = dict(places)
        return recipe

    def place_of(self, key: str) -> checks.Place | None:
        """Where a dotted key was written, or else what it belongs to; None for a recipe that was not read."""
        return checks.place_of(key, self._places)

    @property
    def peak_learning_rate(self) -> float:
        """`train.learning_rate` with `auto` resolved: 8e-6 for a full fine-tune (the paper), 8e-5 with LoRA."""
        if self.train.learning_rate != "auto":
            return self.train.learning_rate
        return 8e-6 if self.lora is None else 8e-5

    def on_day(self, day: str | None) -> Recipe:
        """The recipe with this day for `model.chat_template_date: auto`; as it is for None, or where it names one."""
        if day is None or self.model.chat_template_date != "auto":
            return self
        return self.model_copy(update={"model": self.model.model_copy(update={"chat_template_date": day})})


def default_run_dir(model_name: str) -> str:
    """`meta-llama/Llama-3.1-8B` -> `runs/llama-3.1-8b-orpo`."""
    slug = re.sub(r"[^a-z0-9._-]+", "-", Path(model_name).name.lower()).strip("-.")
    return f"runs/{slug or 'model'}-orpo"
