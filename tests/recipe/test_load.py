"""Loading: wrong recipes, one fault and many at a time; overrides; round trips."""

from __future__ import annotations

from pathlib import Path

import pytest

from orpo_cli.errors import RecipeError
from orpo_cli.recipe import Holdout, Recipe, SourceSpec, dump_recipe, load_recipe
from orpo_cli.recipe.faults import section_keys

HEAD = "model: {name_or_path: a/B}\ndata:\n  train: x.jsonl\n"  # three lines; a case goes on inside of data


def write(folder: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(write(folder, text), overrides)


def error_of(folder: Path, text: str, *overrides: str) -> str:
    """Message and hint of the error, the folder's name left out."""
    path = write(folder, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    whole = f"{caught.value.message}\nhint: {caught.value.hint}".replace(f"{folder}/", "")
    assert not [word for word in ("pydantic", "Input should", "errors.pydantic.dev", "Traceback") if word in whole]
    return whole


# The text after HEAD, the line of its only fault, the key, and what message and hint say.
WRONG: list[tuple[str, int, str, list[str]]] = [
    # unknown keys
    ("train:\n  learnig_rate: 1", 5, "train.learnig_rate", ["unknown key", "did you mean train.learning_rate?"]),
    ("train:\n  Batch-Size: 1", 5, "train.Batch-Size", ["did you mean train.batch_size?"]),
    ("train:\n  beta: 0.2", 5, "train.beta", ["did you mean loss.beta?"]),
    ("loss:\n  alpha: 0.2", 5, "loss.alpha", ["did you mean loss.beta?", "LoRA's alpha is lora.alpha"]),
    ("beta: 0.2", 4, "beta", ["did you mean loss.beta?"]),
    ("lossbeta: 0.2", 4, "lossbeta", ["did you mean loss.beta?"]),
    ("loss_bta: 0.2", 4, "loss_bta", ["did you mean loss.beta?"]),
    ("trainlearningrate: 0.2", 4, "trainlearningrate", ["did you mean train.learning_rate?"]),
    ("los: {beta: 1}", 4, "los", ["did you mean loss?"]),
    ("trian: {}", 4, "trian", ["did you mean train?"]),
    ("zzz: {}", 4, "zzz", ["the sections are model, lora, data, loss, train, output"]),
    ("loss: {zzz: 1}", 4, "loss.zzz", ["the keys of loss are beta, nll_tokens, nll_reduction"]),
    ("  columns: {promt: q}", 4, "data.columns.promt", ["did you mean data.columns.prompt?"]),
    ("  eval: {hold_out: 0.1}", 4, "data.eval.hold_out", ["did you mean data.eval.holdout?"]),
    ("  eval: [{path: y, splits: test}]", 4, "data.eval.0.splits", ["did you mean data.eval.0.split?"]),
    ("  eval: {path: y, holdout: 0.1}", 4, "data.eval.holdout", ["does not go with", "a mapping of holdout"]),
    ("  eval: {split: test}", 4, "data.eval.path", ["required"]),
    ("  filter:\n    - {column: a, equals: 1}", 5, "data.filter.0.equals", ["did you mean data.filter.0.eq?"]),
    ("  filter:\n    - {column: a, zzz: 1}", 5, "data.filter.0.zzz", ["column, eq, ne, gt"]),
    # other tools' keys
    (
        "train:\n  gradient_accumulation_steps: 4",
        5,
        "train.gradient_accumulation_steps",
        ["train.batch_size", "pairs an"],
    ),
    ("micro_batch_size: 4", 4, "micro_batch_size", ["did you mean train.batch_size?", "max_tokens_per_microbatch"]),
    ("  cutoff_len: 4", 4, "data.cutoff_len", ["did you mean data.max_length?"]),
    ("bf16: true", 4, "bf16", ["did you mean model.dtype?"]),
    ("val_set_size: 0.1", 4, "val_set_size", ["did you mean data.eval.holdout?", "{holdout: 0.02}"]),
    ("rl: orpo", 4, "rl", ["not needed: the method is always ORPO"]),
    ("gradient_acumulation_steps: 4", 4, "gradient_acumulation_steps", ["did you mean train.batch_size?"]),
    # wrong types
    (
        'train: {batch_size: "16"}',
        4,
        "train.batch_size",
        ["a whole number >= 1", 'got "16"', "write 16 without quotes"],
    ),
    ("train: {batch_size: 1_000}", 4, "train.batch_size", ['got "1_000"', "write 1000"]),
    ("train: {batch_size: true}", 4, "train.batch_size", ["wrong type", "got true"]),
    ("train: {batch_size: 16.0}", 4, "train.batch_size", ["got 16.0", "write 16"]),
    ("train: {max_steps: 1e3}", 4, "train.max_steps", ["or null", "got 1e3", "write 1000"]),
    ("loss: {beta: true}", 4, "loss.beta", ["a number >= 0", "got true"]),
    ("loss:\n  beta:\n", 5, "loss.beta", ["got nothing", "write a value, or remove the line"]),
    ("loss: {beta: [1]}", 4, "loss.beta", ["wrong type", "got [1]"]),
    ("  shuffle: no", 4, "data.shuffle", ["true or false", 'got "no"', "write false"]),
    ("  streaming: yes", 4, "data.streaming", ["auto, true or false", "write true"]),
    ("  system: 5", 4, "data.system", ["text or null", 'write "5", in quotes']),
    ("  system: true", 4, "data.system", ['write "true", in quotes']),
    ("  max_prompt_length: none", 4, "data.max_prompt_length", ["write null"]),
    ("train: {sample_prompts: Hello}", 4, "train.sample_prompts", ["a list of text", "write a list: [Hello]"]),
    ("lora:\n  target_modules:\n    - q_proj\n    - 3", 7, "lora.target_modules.1", ["text", "got 3"]),
    ("lora: {rank_pattern: {q_proj: many}}", 4, "lora.rank_pattern.q_proj", ["a whole number >= 1", 'got "many"']),
    ("loss: 3", 4, "loss", ["a mapping of beta, nll_tokens, nll_reduction", "got 3"]),
    ("output: [runs]", 4, "output", ["a mapping of dir, merge"]),
    # values out of range or unheard of
    ("loss: {beta: -0.1}", 4, "loss.beta", ["out of range", ">= 0", "got -0.1"]),
    ("loss: {beta: .nan}", 4, "loss.beta", ["out of range", "got .nan"]),
    ("train: {weight_decay: 1e999}", 4, "train.weight_decay", ["out of range", "got 1e999"]),
    ("train: {learning_rate: 0}", 4, "train.learning_rate", ["auto or a number > 0", "got 0"]),
    ("train: {learning_rate: '1e-5'}", 4, "train.learning_rate", ["wrong type", "write 1e-5 without quotes"]),
    ("train: {warmup_ratio: 1}", 4, "train.warmup_ratio", ["a number >= 0 and < 1", "got 1"]),
    ("train: {eval_steps: 1.5}\n", 4, "train.eval_steps", ["a whole number >= 1, a number > 0 and < 1 or null"]),
    ("  max_length: 1", 4, "data.max_length", ["a whole number >= 2"]),
    ("  eval: {holdout: 1.0}", 4, "data.eval.holdout", ["a number > 0 and < 1 or a whole number >= 1", "write 1"]),
    ("  eval: {holdout: 0}", 4, "data.eval.holdout", ["got 0"]),
    ("  eval: []", 4, "data.eval", ["empty", "a hub id, file, glob or directory"]),
    ("train: {lr_scheduler_type: cosin}", 4, "train.lr_scheduler_type", ["unknown value", "did you mean cosine?"]),
    ("train: {optimizer: adamw_torch}", 4, "train.optimizer", ["adamw_8bit", "did you mean adamw?"]),
    ("  overlong: keep_end", 4, "data.overlong", ["did you mean truncate_prompt?"]),
    ('  filter: [{column: a, matches: "("}]', 4, "data.filter.0.matches", ["not a regular expression", 'got "("']),
    ("  filter:\n  - {column: a}", 5, "data.filter.0", ["exactly one operator", "not none", "is_null: true"]),
    ("  filter: [{column: a, ge: 1, lt: 3}]", 4, "data.filter.0", ["exactly one operator", "ge and lt"]),
    ("  filter: [{eq: 1}]", 4, "data.filter.0.column", ["required"]),
    # given twice, left blank
    ("train:\n  seed: 1\n  seed: 2", 6, "train.seed", ["given twice, first at recipe.yaml:5", "remove one"]),
    ("lora:\n  # r: 8\n", 4, "lora", ["empty", "lora: null for a full fine-tune"]),
    # impossible together
    ("train: {eval_steps: 10}", 4, "train.eval_steps", ["nothing to evaluate on", "holdout"]),
    ("train: {metric_for_best_model: eval_accuracy}", 4, "train.metric_for_best_model", ["nothing to evaluate on"]),
    ("  max_prompt_length: 1024", 4, "data.max_prompt_length", ["no room for a response", "got 1024"]),
    ("  min_response_tokens: 1024", 4, "data.min_response_tokens", ["no response can be that long"]),
    ("lora: {adapter: runs/x, r: 8}", 4, "lora.r", ["lora.adapter decides this"]),
    ("lora:\n  adapter: runs/x\n  dropout: 0.1", 6, "lora.dropout", ["lora.adapter decides this"]),
    ("lora: {init_lora_weights: orthogonal, r: 7}", 4, "lora.r", ["even rank", "write 8"]),
    ("train: {max_steps: 10, warmup_steps: 10}", 4, "train.warmup_steps", ["the whole run"]),
    ("train: {lr_scheduler_type: constant, warmup_steps: 5}", 4, "train.warmup_steps", ["constant_with_warmup"]),
    ("train: {lr_scheduler_type: constant, min_lr_ratio: 0.1}", 4, "train.min_lr_ratio", ["does not decay"]),
    ("train: {early_stopping_patience: 3}\n  ", 4, "train.early_stopping_patience", ["nothing to evaluate on"]),
    (
        "  eval: {holdout: 9}\ntrain: {early_stopping_patience: 3}",
        5,
        "train.early_stopping_patience",
        ["only the end is evaluated", "set train.eval_steps"],
    ),
    ("  eval:\n  - {path: y, weight: 2}", 5, "data.eval.0.weight", ["counts once", "max_pairs"]),
]


@pytest.mark.parametrize(("rest", "line", "key", "said"), WRONG, ids=[case[0].strip() for case in WRONG])
def test_a_wrong_recipe_says_where_and_what_to_write(
    rest: str, line: int, key: str, said: list[str], tmp_path: Path
) -> None:
    error = error_of(tmp_path, HEAD + rest)
    assert f"recipe.yaml:{line}: {key}: " in error
    for words in said:
        assert words in error


WRONG_MODELS = [
    ("dtype: bf16", "model.dtype", ["auto, bfloat16, float16 or float32", "did you mean bfloat16?"]),
    ("dtype: fp16", "model.dtype", ["did you mean float16?"]),
    ("revision: 123", "model.revision", ["text", "got 123", 'write "123", in quotes']),
    ("revision: 12345e7", "model.revision", ["got 12345e7", 'write "12345e7", in quotes']),
    ('name_or_path: ""', "model.name_or_path", ["empty"]),
    ("load_in_4bit: on", "model.load_in_4bit", ["write true"]),
    ("load_in_4bit: true\n  load_in_8bit: true", "model.load_in_8bit", ["in 4 bits or in 8, not in both"]),
    ("load_in_4bit: true\nlora: null", "model.load_in_4bit", ["a full fine-tune (lora: null) cannot train quantised"]),
    ("load_in_8bit: true\nlora: null", "model.load_in_8bit", ["a full fine-tune (lora: null) cannot train quantised"]),
    ("dtype: float32\n  attn_implementation: flash_attention_2", "model.attn_implementation", ["float32"]),
    ("chat_template: chatm", "model.chat_template", ["a file.jinja", "did you mean chatml?"]),
    ("chat_template: none\n  chat_template_kwargs: {a: 1}", "model.chat_template_kwargs", ["takes no variables"]),
    ("chat_template: none\nloss: {nll_tokens: assistant}", "loss.nll_tokens", ["no turns", "use response or all"]),
    ("device_map: auto", "model.device_map", ["not yet", "leave it null"]),
    ("name: b", "model.name", ["did you mean model.name_or_path?"]),
]


@pytest.mark.parametrize(("rest", "key", "said"), WRONG_MODELS, ids=[case[0] for case in WRONG_MODELS])
def test_a_wrong_model_section(rest: str, key: str, said: list[str], tmp_path: Path) -> None:
    name = "" if rest.startswith("name_or_path") else "  name_or_path: a/B\n"
    error = error_of(tmp_path, f"data: {{train: x}}\nmodel:\n{name}  {rest}")
    assert f": {key}: " in error
    assert " faults" not in error
    for words in said:
        assert words in error


def test_six_faults_are_six_lines(tmp_path: Path) -> None:
    error = error_of(
        tmp_path,
        "model:\n"
        "  name_or_path: a/B\n"
        "  load_in_4bit: yes\n"
        "data:\n"
        "  train: x.jsonl\n"
        "  max_lenght: 512\n"
        "lora: {r: 0}\n"
        "train:\n"
        "  seed: 1\n"
        "  seed: 2\n"
        "  eval_steps: 5\n"
        "  micro_batch_size: 4\n",
    )
    assert error.splitlines()[0] == "recipe.yaml has 6 faults:"
    starts = [line.strip().split(": ")[:2] for line in error.splitlines()[1:-1]]
    assert starts == [
        ["recipe.yaml:3", "model.load_in_4bit"],
        ["recipe.yaml:6", "data.max_lenght"],
        ["recipe.yaml:7", "lora.r"],
        ["recipe.yaml:10", "train.seed"],
        ["recipe.yaml:11", "train.eval_steps"],
        ["recipe.yaml:12", "train.micro_batch_size"],
    ]
    assert error.splitlines()[-1].startswith("hint: ")


def test_one_fault_stands_alone_with_its_hint(tmp_path: Path) -> None:
    assert error_of(tmp_path, HEAD + "loss: {beta: '0.1'}") == (
        'recipe.yaml:4: loss.beta: wrong type (allowed: a number >= 0; got "0.1")\nhint: write 0.1 without quotes'
    )


def test_a_fault_breeds_no_others(tmp_path: Path) -> None:
    # max_length was meant to be 4096 and is not the default 1024, so that nothing is known about the prompt's.
    error = error_of(tmp_path, HEAD + "  max_lenght: 4096\n  max_prompt_length: 2000")
    assert "max_prompt_length" not in error
    # The held-out set was meant to be there.
    assert "eval_steps" not in error_of(tmp_path, HEAD + "  evl: y\ntrain: {eval_steps: 5}")
    assert "required" not in error_of(tmp_path, "model_name_or_path: x\ndata: {train: y}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the recipe is empty"),
        ("# nothing\n", "the recipe is empty"),
        ("- model\n- data\n", "recipe.yaml:1: a recipe is a mapping of sections, not a list"),
        ("\n\nhello", "recipe.yaml:3: a recipe is a mapping of sections, not a single value"),
        ("model: {\n", "recipe.yaml:2: not valid YAML"),
        ("model: !!python/object:os.x {}\n", "recipe.yaml:1: the tag !!python/object:os.x is not used in recipes"),
        (
            "data: {train: x}\n",
            "recipe.yaml:1: model.name_or_path: required, and missing (allowed: a hub id or directory",
        ),
        ("model: {name_or_path: x}\n", "data.train: required, and missing (allowed: a hub id, file, glob or directory"),
        ("model:\ndata:\n", "recipe.yaml:1: model.name_or_path: required"),
    ],
)
def test_what_is_no_recipe(text: str, said: str, tmp_path: Path) -> None:
    assert said in error_of(tmp_path, text)


def test_what_is_no_readable_file(tmp_path: Path) -> None:
    recipe = write(tmp_path, HEAD)
    with pytest.raises(RecipeError, match="no such file") as caught:
        load_recipe(tmp_path / "recpie.yaml")
    assert caught.value.hint == f"did you mean {recipe}?"
    with pytest.raises(RecipeError, match="a directory, not a recipe"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"latin.yaml:2: not UTF-8 text"):
        load_recipe(write(tmp_path, "a: 1\nb: \xe9\n".encode("latin-1"), "latin.yaml"))
    with pytest.raises(RecipeError, match="too large for a recipe"):
        load_recipe(write(tmp_path, b"# " + b"x" * 2_000_000, "large.yaml"))
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "nowhere" / "recipe.yaml")


def test_a_byte_order_mark_and_windows_lines_are_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + HEAD.replace("\n", "\r\n").encode())
    assert load_recipe(path).model.name_or_path == "a/B"


def test_blank_sections_have_their_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, HEAD + "train:\n  # seed: 1\noutput:\n") == load(tmp_path, HEAD)
    assert load(tmp_path, HEAD + "lora: {}\n") == load(tmp_path, HEAD)
    assert load(tmp_path, HEAD + "lora: null\n").lora is None


def test_a_recipe_knows_where_its_keys_were_written(tmp_path: Path) -> None:
    recipe = load(tmp_path, "model:\n  name_or_path: a/B\ndata:\n  train:\n    - x\n    - path: y\n")
    file = tmp_path / "recipe.yaml"
    for key, line in (("model.name_or_path", 2), ("model.dtype", 1), ("data.train.1.path", 6), ("loss.beta", 1)):
        assert recipe.place_of(key).text == f"{file}:{line}", key
    assert load_recipe(file, ["data.train=z"]).place_of("data.train.0").text == "--set data.train=z"
    assert recipe.model_copy().place_of("data.train.0").text == f"{file}:5"
    assert Recipe.model_validate(recipe.model_dump()).place_of("model") is None
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


# ------------------------------------------------------------------------------------------------- overrides


def test_overrides_win_and_the_last_one_most(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        HEAD + "train: {seed: 1}\n",
        "train.seed=2",
        "train.seed=3",
        "loss.beta=2e-1",
        "data.eval.holdout=100",
        "lora.target_modules=[q_proj, v_proj]",
        "lora.rank_pattern.model.layers.0.q_proj=4",
        "model.chat_template_kwargs.enable_thinking=false",
        "data.system=Be brief = be kind",
        "output.dir=runs/b",
    )
    assert (recipe.train.seed, recipe.loss.beta, recipe.data.eval) == (3, 0.2, Holdout(holdout=100))
    assert recipe.lora is not None
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    assert recipe.lora.rank_pattern == {"model.layers.0.q_proj": 4}
    assert recipe.model.chat_template_kwargs == {"enable_thinking": False}
    assert recipe.data.system == "Be brief = be kind"
    assert recipe.output.dir == "runs/b"


def test_overrides_of_sources(tmp_path: Path) -> None:
    def train(text: str, *overrides: str) -> list[SourceSpec]:
        return load(tmp_path, text, *overrides).data.train

    two = "model: {name_or_path: a/B}\ndata: {train: [x, {path: y}]}\n"
    assert train(HEAD, "data.train=file.jsonl") == [SourceSpec(path="file.jsonl")]
    assert train(HEAD, "data.train=[a, b]") == [SourceSpec(path="a"), SourceSpec(path="b")]
    assert train(HEAD, "data.train.max_pairs=5") == [SourceSpec(path="x.jsonl", max_pairs=5)]
    assert train(two, "data.train.1.max_pairs=5") == [SourceSpec(path="x"), SourceSpec(path="y", max_pairs=5)]
    dumped = dump_recipe(load(tmp_path, HEAD))
    assert train(dumped, "data.train.max_pairs=5") == [SourceSpec(path="x.jsonl", max_pairs=5)]


def test_overrides_replace_what_stands_in_their_way(tmp_path: Path) -> None:
    assert load(tmp_path, HEAD, "lora=null").lora is None
    assert load(tmp_path, HEAD + "lora: null\n", "lora.r=8").lora is not None
    assert load(tmp_path, HEAD + "  eval: y\n", "data.eval.holdout=0.1").data.eval == Holdout(holdout=0.1)
    assert load(tmp_path, HEAD + "  eval: [y, z]\n", "data.eval.holdout=0.1").data.eval == Holdout(holdout=0.1)
    assert load(tmp_path, "data: {train: x}", "model.name_or_path=a/B").model.name_or_path == "a/B"
    assert load(tmp_path, HEAD + "  system: x\n", "data.system=").data.system is None


def test_an_override_repairs_a_fault_of_the_file(tmp_path: Path) -> None:
    assert load(tmp_path, HEAD + "loss: {beta: much}", "loss.beta=0.3").loss.beta == 0.3
    assert load(tmp_path, HEAD + "loss: 5", "loss={beta: 0.3}").loss.beta == 0.3
    assert load(tmp_path, HEAD + "train: {eval_steps: 5}", "data.eval=y").train.eval_steps == 5


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.beta=fast", '--set loss.beta=fast: loss.beta: wrong type (allowed: a number >= 0; got "fast")'),
        ("loss.bata=1", "--set loss.bata=1: loss.bata: unknown key\nhint: did you mean loss.beta?"),
        ("beta=1", "did you mean loss.beta?"),
        ("loss.beta", "--set loss.beta: loss.beta: not of the form section.key=value"),
        ("=1", "not of the form section.key=value"),
        ("loss..beta=1", "not of the form section.key=value"),
        ("loss.beta=", "--set loss.beta=: loss.beta: wrong type"),
        ("loss.beta=[1", "--set loss.beta=[1: loss.beta: not valid YAML"),
        ("data.system=a: b: c", "mapping values are not allowed here"),
        ("data.shuffle=no", "write false"),
        ("train={seed: 1, seed: 2}", "train.seed: given twice"),
        ("train.seed.x=1", "train.seed: wrong type"),
        ("data.filter.0.eq=1", "data.filter is a list of 0"),
        ("model.revision=2024", 'write "2024", in quotes'),
        ("lora.adapter=!!python/name:os.system", "the tag !!python/name:os.system is not used"),
        (
            "train.warmup_steps=7",
            "--set train.warmup_steps=7: train.warmup_steps: the warm-up would last the whole run",
        ),
    ],
)
def test_a_wrong_override_is_named(override: str, said: str, tmp_path: Path) -> None:
    text = HEAD + "  filter: []\ntrain: {max_steps: 5}\n"
    error = error_of(tmp_path, text, override)
    assert said in error
    assert "--set" in error


def test_faults_of_overrides_come_after_those_of_the_file(tmp_path: Path) -> None:
    error = error_of(tmp_path, HEAD + "train: {seed: -1}", "model.dtype=x", "loss.beta=y")
    keys = [line.strip().split(": ")[1] for line in error.splitlines()[1:-1]]
    assert keys == ["train.seed", "model.dtype", "loss.beta"]


# ----------------------------------------------------------------------------------------------- round trips

ROUND = [
    HEAD,
    HEAD + "lora: null\ntrain: {learning_rate: 8e-6, num_train_epochs: 0.5, eval_steps: null}\noutput: {dir: 'no'}\n",
    HEAD + "  eval: {holdout: 7}\n  columns: {prompt: a.b}\n  filter:\n  - {column: s, in: ['1', 1, 1.5, true]}\n"
    "  - {column: t, matches: '^\\d+: #$'}\n  - {column: u, is_null: true}\n  - {column: v, ge: 8}\n",
    "model:\n  name_or_path: ./m\n  revision: '123'\n  chat_template_kwargs: {a: [1, null, {b: 1e-5}], c: 'off'}\n"
    "data:\n  train: [x, {path: y, split: 'train[:10]', filter: [{column: c, not_in: ['']}], max_pairs: 3}]\n"
    '  eval: [e, {path: f, columns: {chosen: good}}]\n  system: "two\\nlines: # and more "\n'
    "lora: {rank_pattern: {q: 4}, init_lora_weights: gaussian, target_modules: '.*(q|v)_proj'}\n"
    "train: {sample_prompts: ['1e-5', 'Why?', ' ', 'ключ'], eval_steps: 0.25}\n",
]


@pytest.mark.parametrize("text", ROUND)
def test_a_dumped_recipe_is_read_back_equal(text: str, tmp_path: Path) -> None:
    recipe = load(tmp_path, text)
    dumped = dump_recipe(recipe)
    again = load(tmp_path, dumped)
    assert again == recipe
    assert dump_recipe(again) == dumped
    for section in Recipe.model_fields:
        assert f"\n{section}:" in f"\n{dumped}"


def test_a_recipe_that_another_program_wrote_as_json(tmp_path: Path) -> None:
    assert load(tmp_path, '{"model": {"name_or_path": "a/B"}, "data": {"train": "x.jsonl"}}') == load(tmp_path, HEAD)


ODD = [
    *["null", "true", "-1", "0", "0.5", "1e400", ".nan", "''", "x", "[]", "{}", "[x]", "[[x]]", "{a: b}", "[{}]"],
    *["{path: {}}", "[{path: x, filter: [3]}]", "[null]", '"' + "9" * 5000 + '"', "{holdout: {}}", "{1: 2}"],
]


def test_no_value_makes_it_crash(tmp_path: Path) -> None:
    """Every key with every odd value is taken, or explained where it was given."""
    path = write(tmp_path, HEAD)
    for key in [*Recipe.model_fields, *section_keys(), "zzz", "zzz.a", "data.train.0.path", "lora.rank_pattern.a"]:
        for value in ODD:
            try:
                load_recipe(path, [f"{key}={value}"])
            except RecipeError as error:
                assert f"--set {key}" in error.message, (key, value, error.message)  # noqa: PT017


@pytest.mark.parametrize(
    ("sources", "key", "said"),
    [
        ("[{path: x, weight: 2}]", "data.train.0.weight", ["no other source"]),
        ("[{path: x}, {path: y, weight: 2}]", "data.train.1.weight", ["data.train.0 has no weight: x"]),
        ("[{path: x, weight: 1}, {path: y, weight: 0}]", "data.train.1.weight", ["> 0"]),
    ],
)
def test_weights_are_for_every_source_of_several(sources: str, key: str, said: list[str], tmp_path: Path) -> None:
    error = error_of(tmp_path, f"model: {{name_or_path: m}}\ndata:\n  train: {sources}\n")
    assert f"recipe.yaml:3: {key}: " in error
    for words in said:
        assert words in error
