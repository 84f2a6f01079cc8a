"""Recipes of four other tools become ours: what they say, what they leave to defaults, what is left out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orpo_cli.errors import InputError, RecipeError
from orpo_cli.init import write_converted
from orpo_cli.recipe import Holdout, Recipe, SourceSpec, load_recipe
from orpo_cli.recipe.conversion import written
from orpo_cli.recipe.convert import convert
from tests.conftest import tiny_rows
from tests.recipe.test_foreign import NAMES

SAMPLES = Path(__file__).with_name("others")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The same pairs as the samples of the tools name them: one file, two splits, an entry of dataset_info.json."""
    folder = tmp_path / "data"
    (folder / "splits").mkdir(parents=True)
    rows = tiny_rows(64)

    def write(name: str, rows: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("all.jsonl", rows)
    write("splits/train.jsonl", rows[:48])
    write("splits/test.jsonl", rows[48:])
    write("numbers.jsonl", [{"ask": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in rows])
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    entry = {"file_name": "numbers.jsonl", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"numbers": entry}), encoding="utf-8")
    return folder


@pytest.fixture
def sample(tmp_path: Path, data: Path, tiny_base: Path) -> Callable[[str], Path]:
    """`sample("trl")` is the path of that tool's sample recipe, for the tiny base and pairs."""

    def write(tool: str) -> Path:
        text = (SAMPLES / f"{tool}.yaml").read_text(encoding="utf-8")
        for name, path in {"BASE": tiny_base, "DATA": data, "RUN": tmp_path / "run"}.items():
            text = text.replace(name, str(path))
        path = tmp_path / f"{tool}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Recipe, list[str]]]:
    """`converted(path or text)` -> our recipe and the lines about what is not in it, the paths left out.

    As on a machine that has every tracker.
    """
    monkeypatch.setattr("orpo_cli.report.trackers.is_installed", lambda name: True)

    def convert_it(source: Path | str) -> tuple[Recipe, list[str]]:
        if isinstance(source, str):
            (tmp_path / "theirs.yaml").write_text(source, encoding="utf-8")
            source = tmp_path / "theirs.yaml"
        said = write_converted(source, tmp_path / "ours.yaml", overwrite=True)
        return load_recipe(tmp_path / "ours.yaml"), [line.removeprefix(f"{source}:") for line in said]

    return convert_it


# ---- samples, whole


TOOLS = ["axolotl", "llamafactory", "trl", "alignment-handbook"]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_sample_trains(tool, sample, converted, tmp_path):
    from orpo_cli.metrics import read_metrics
    from orpo_cli.train.run import train

    recipe, _ = converted(sample(tool))
    train(recipe)
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2]
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["pairs"] >= 5
    if recipe.lora is not None:
        assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_axolotl(sample, converted, data, tmp_path):
    recipe, said = converted(sample("axolotl"))
    assert (recipe.loss.beta, recipe.loss.nll_tokens, recipe.loss.nll_reduction) == (0.3, "all", "token")
    assert recipe.model.chat_template == "chatml"
    assert recipe.data.train == [SourceSpec(path=str(data / "all.jsonl"), split="train")]
    assert recipe.data.eval == Holdout(holdout=0.1)
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (4, 8, 0.05)
    train = recipe.train
    assert (train.batch_size, train.num_train_epochs, train.warmup_steps, train.weight_decay) == (8, 2, 1, 0.01)
    assert train.eval_steps == 0.25  # twice an epoch, of two
    assert recipe.output.dir == str(tmp_path / "run")
    assert "18: dataset_prepared_path: not needed: prepared data is not kept" in said
    assert "49: flash_attention: left auto: both answers share their prompt by an attention of its own" in said
    assert any(
        line.startswith("36: micro_batch_size * gradient_accumulation_steps: 4 * 2 on one device") for line in said
    )
    assert not any(": rl:" in line or "lora_model_dir" in line or "wandb" in line for line in said)


def test_llamafactory(sample, converted, data):
    recipe, said = converted(sample("llamafactory"))
    assert (recipe.loss.beta, recipe.loss.nll_tokens, recipe.loss.nll_reduction) == (0.2, "response", "pair")
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.target_modules) == (4, 8, ["q_proj", "v_proj"])
    [source] = recipe.data.train
    assert (source.path, source.max_pairs) == (str(data / "numbers.jsonl"), 40)
    assert source.columns == {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    assert (recipe.data.eval, recipe.data.max_length) == (Holdout(holdout=6), 128)
    assert (recipe.model.dtype, recipe.model.chat_template, recipe.model.trust_remote_code) == (
        "bfloat16",
        "chatml",
        False,
    )
    train = recipe.train
    assert (train.batch_size, train.num_train_epochs, train.warmup_ratio, train.eval_steps) == (8, 3, 0.2, 1)
    assert "3: trust_remote_code: left false: set model.trust_remote_code if you have read the model's code" in said
    assert "39: flash_attn: left auto: both answers share their prompt by an attention of its own" in said


def test_trl(sample, converted, data):
    recipe, said = converted(sample("trl"))
    assert (recipe.loss.beta, recipe.loss.nll_tokens, recipe.loss.nll_reduction) == (0.25, "all", "token")
    assert recipe.data.train == [SourceSpec(path=str(data / "splits"))]
    assert recipe.data.eval == [SourceSpec(path=str(data / "splits"), split="test")]
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (4, 8, 0.05)  # its default dropout
    train = recipe.train
    assert (train.learning_rate, train.batch_size, train.num_train_epochs) == (1e-4, 8, 3)
    assert (train.lr_scheduler_type, train.min_lr_ratio) == ("cosine_with_min_lr", 0.1)
    assert (train.warmup_steps, train.warmup_ratio) == (None, 0.5)
    assert " no recipe of TRL says which method it is for; taken for ORPO's" in said


def test_alignment_handbook(sample, converted, data, tmp_path):
    recipe, said = converted(sample("alignment-handbook"))
    assert recipe.lora is None
    assert recipe.data.train == [SourceSpec(path=str(data / "splits"))]
    assert recipe.data.eval == [SourceSpec(path=str(data / "splits"), split="test")]
    assert (recipe.data.max_length, recipe.data.max_prompt_length) == (128, 100)
    assert recipe.model.chat_template == str(tmp_path / "ours.jinja")
    assert (tmp_path / "ours.jinja").read_text().startswith("{% for message in messages %}")
    train = recipe.train
    assert (train.optimizer, train.lr_scheduler_type, train.warmup_steps) == ("adamw_8bit", "inverse_sqrt", 1)
    assert (train.learning_rate, train.seed, recipe.loss.beta) == (5e-6, 7, 0.05)
    assert "22: hub_model_id: there is none: runs are written to the disk only" in said


# ---- single keys

AXOLOTL = "base_model: a/B\nrl: orpo\ndatasets: [{path: x/y}]\nlearning_rate: 1e-5\n"
FACTORY = "model_name_or_path: a/B\npref_loss: orpo\nstage: dpo\ndataset: x/y\n"
TRL = "model_name_or_path: a/B\ndataset_name: x/y\n"
HANDBOOK = "model_name_or_path: a/B\ndataset_mixer: {x/y: 1.0, z/w: 0.5}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            AXOLOTL,
            {"lora": None, "train.batch_size": 1, "train.warmup_ratio": 0.03, "data.max_length": 512, "loss.beta": 0.1},
        ),
        (
            FACTORY,
            {"train.learning_rate": 5e-5, "train.batch_size": 8, "train.num_train_epochs": 3, "train.warmup_ratio": 0}
            | {"train.lr_scheduler_type": "linear", "lora.r": 8, "lora.alpha": 16, "data.max_length": 2048},
        ),
        (
            TRL,
            {"train.learning_rate": 1e-6, "train.batch_size": 8, "train.num_train_epochs": 3, "train.warmup_ratio": 0}
            | {"train.lr_scheduler_type": "linear", "lora": None, "data.max_length": 1024, "data.eval": None}
            | {"model.dtype": "bfloat16"},
        ),
    ],
)
def test_defaults_of_the_other_tool_are_written_out(text, expected, converted, tmp_path):
    recipe, _ = converted(text)
    for key, value in expected.items():
        found = recipe
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key
    assert "'s default" in (tmp_path / "ours.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        (AXOLOTL + "adapter: qlora\nload_in_4bit: true\nlora_r: 8\n", "model.load_in_4bit", True),
        (AXOLOTL + "adapter: lora\nlora_target_modules: [q_proj]\n", "lora.target_modules", ["q_proj"]),
        (AXOLOTL + "adapter: lora\npeft_use_dora: true\n", "lora.use_dora", True),
        (AXOLOTL + "adapter: lora\nlora_model_dir: runs/x/adapter\nlora_r: 8\n", "lora.adapter", "runs/x/adapter"),
        (AXOLOTL + "fp16: true\n", "model.dtype", "float16"),
        (AXOLOTL + "bf16: true\nfloat16: false\n", "model.dtype", "bfloat16"),
        (AXOLOTL + "special_tokens: {eos_token: <|im_end|>}\n", "model.eos_token", "<|im_end|>"),
        (AXOLOTL + "cosine_min_lr_ratio: 0.2\nlr_scheduler: cosine\n", "train.min_lr_ratio", 0.2),
        (AXOLOTL + "learning_rate: '3e-4'\n", "train.learning_rate", 1e-5),  # given twice: the first one
        (AXOLOTL + "adam_beta2: '0.95'\n", "train.adam_beta2", 0.95),
        (AXOLOTL + "val_set_size: 20\n", "data.eval.holdout", 20),
        (AXOLOTL + "revision_of_model: v2\n", "model.revision", "v2"),
        (
            AXOLOTL.replace("{path: x/y}", "{path: x/y, type: chat_template.default, field_chosen: good}"),
            "data.train.0.columns",
            {"chosen": "good"},
        ),
        (AXOLOTL + "wandb_project: x\n", "output.trackers", ["wandb"]),
        (AXOLOTL + "wandb_project: x\nuse_wandb: false\n", "output.trackers", []),
        (AXOLOTL + "wandb_project: ''\n", "output.trackers", []),
        (
            AXOLOTL + "use_tensorboard: true\nmlflow_experiment_name: x\n",
            "output.trackers",
            ["tensorboard", "mlflow"],
        ),
        (FACTORY + "report_to: none\n", "output.trackers", []),
        (FACTORY + "finetuning_type: full\n", "lora", None),
        (FACTORY + "quantization_bit: 4\n", "model.load_in_4bit", True),
        (FACTORY + "val_size: 0.05\n", "data.eval.holdout", 0.05),
        (FACTORY + "dataset: x/y, z/w\n", "data.train.0.path", "x/y"),
        (FACTORY + "disable_shuffling: true\n", "data.shuffle", False),
        (FACTORY + "max_steps: -1\n", "train.max_steps", None),
        (TRL + "fp16: true\n", "model.dtype", "float16"),
        (TRL + "bf16: false\ndtype: float32\n", "model.dtype", "float32"),
        (TRL + "report_to: [tensorboard, wandb, swanlab]\n", "output.trackers", ["tensorboard", "wandb"]),
        (TRL + "report_to: trackio\n", "output.trackers", ["trackio"]),
        (TRL + "report_to: tensorboard\ntrackio_space_id: x\n", "output.trackers", ["tensorboard"]),
        (TRL + "report_to: none\ntrackio_space_id: x\n", "output.trackers", []),
        (TRL + "dataset_config: small\n", "data.train.0.name", "small"),
        (TRL + "dataset_train_split: train_prefs\n", "data.train.0.split", "train_prefs"),
        (TRL + "dataset_streaming: true\n", "data.streaming", True),
        (TRL + "use_peft: true\nlora_target_modules: [q_proj, v_proj]\n", "lora.target_modules", ["q_proj", "v_proj"]),
        (TRL + "eval_strategy: epoch\ndataset_test_split: test\n", "train.eval_steps", 1 / 3),
        (TRL + "attn_implementation: flash_attention_2\n", "model.attn_implementation", "auto"),
        (TRL + "lr_scheduler_type: constant\nwarmup_steps: 10\n", "train.warmup_steps", None),
        (HANDBOOK + "dataset_splits: [train_prefs, test_prefs]\n", "data.train.1.split", "train_prefs"),
        (HANDBOOK + "dataset_splits: [train_prefs, test_prefs]\n", "data.eval.0.split", "test_prefs"),
        (
            "model_name_or_path: a/B\ndataset_mixture: {datasets: [{id: x/y, split: s}], test_split_size: 0.1}\n",
            "data.eval.holdout",
            0.1,
        ),
    ],
)
def test_a_key(text, key, expected, converted):
    found, _ = converted(text)
    for part in key.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    assert found == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (AXOLOTL + "zzz: 1\n", "5: zzz: no key of ours, and unknown here"),
        (
            AXOLOTL + "optimizer: lion_8bit\n",
            '5: optimizer: "lion_8bit" is none of what train.optimizer may be: adamw,',
        ),
        (AXOLOTL + "chat_template: gemma\n", "5: chat_template: gemma: no template of ours; left auto"),
        (AXOLOTL + "deepspeed: zero3.json\n", "5: deepspeed: there is none: processes are placed by accelerate"),
        (AXOLOTL + "train_on_inputs: false\n", "5: train_on_inputs: not carried over; see loss.nll_tokens"),
        (AXOLOTL + "wandb_run_id: x\n", "5: wandb_run_id: a tracker's own"),
        (AXOLOTL + "wandb_project: x\n", "5: wandb_project: not carried over; WANDB_PROJECT in the environment names"),
        (AXOLOTL + "rl: dpo\n", "5: rl: given twice; the first one counts"),
        (FACTORY, "4: dataset: x/y is not in data/dataset_info.json; taken for a path or hub id: see data.train"),
        (AXOLOTL + "use_comet: true\n", "5: use_comet: no key of ours"),
        (
            TRL + "report_to: [wandb, swanlab]\n",
            "3: report_to: swanlab: there are tensorboard, wandb, trackio or mlflow",
        ),
        (TRL + "report_to: all\n", "3: report_to: all: there are tensorboard, wandb"),
        (FACTORY + "galore_rank: 8\n", "5: galore_rank: there is none: AdamW"),
        (TRL + "lora_r: 8\n", "3: lora_r: a full fine-tune has no adapter"),
        (TRL + "use_peft: true\n", " no layers are named for LoRA, which leaves them to peft"),
        (TRL + "load_best_model_at_end: true\n", "3: load_best_model_at_end: nothing is held out to evaluate on"),
        (
            AXOLOTL + "early_stopping_patience: 3\nval_set_size: 0.1\n",
            "5: early_stopping_patience: only the end is evaluated",
        ),
        (HANDBOOK, "2: dataset_mixer: a share of z/w; write the max_pairs of its source"),
    ],
)
def test_what_is_left_out_is_said(text, line, converted):
    _, said = converted(text)
    assert any(found.startswith(line) for found in said), said


def test_a_tracker_that_is_not_installed_is_a_comment(converted, monkeypatch, tmp_path):
    monkeypatch.setattr("orpo_cli.report.trackers.is_installed", lambda name: name == "tensorboard")
    recipe, said = converted(TRL + "report_to: [mlflow, tensorboard]\n")
    assert recipe.output.trackers == ["tensorboard"]
    assert "3: mlflow is not installed, so that output.trackers has it in a comment alone" in said, said
    written = (tmp_path / "ours.yaml").read_text()
    assert "# output.trackers: mlflow, once it is installed: pip install mlflow-skinny\n" in written
    recipe, said = converted(AXOLOTL + "wandb_project: x\n")
    assert recipe.output.trackers == []
    assert any("wandb is not installed" in line for line in said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AXOLOTL.replace("orpo", "dpo"), "theirs.yaml:2: this recipe is not for ORPO but for dpo"),
        ("base_model: a/B\n", "this recipe is not for ORPO but for sft"),
        (FACTORY.replace("orpo", "sigmoid"), "theirs.yaml:2: this recipe is not for ORPO but for sigmoid"),
        (AXOLOTL + "adapter: llama-adapter\n", "theirs.yaml:5: adapter: llama-adapter has no counterpart"),
        ("model: {name_or_path: a/B}\n", "is a recipe of orpo already"),
        ("a: 1\n", "no recipe of axolotl, LLaMA-Factory, TRL or alignment-handbook"),
        ("- a\n", "a recipe is a mapping"),
        ("a: [\n", "theirs.yaml:2: not valid YAML"),
    ],
)
def test_what_cannot_be_converted(text, message, tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        convert(path)
    assert message in caught.value.message
    assert caught.value.exit_code == 2


def test_what_is_missing_is_asked_for_in_our_file(tmp_path):
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text("model_name_or_path: a/B\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"data\.train: required"):
        write_converted(theirs, ours, overwrite=False)
    assert "name_or_path: a/B" in ours.read_text()
    with pytest.raises(InputError, match="exists"):
        write_converted(theirs, ours, overwrite=False)


ODD = ["true", "-1", "0.5", "''", "x", "[]", "[x, 1]", "[[x]]", "{a: b}", "[{}]", "{datasets: [1]}", "{path: {a: 1}}"]
WHOLE = {
    "axolotl": AXOLOTL + "adapter: lora\n",
    "LLaMA-Factory": FACTORY,
    "TRL": TRL + "use_peft: true\n",
    "alignment-handbook": HANDBOOK,
}


@pytest.mark.slow
@pytest.mark.parametrize("tool", WHOLE)
def test_no_value_makes_it_crash(tool, tmp_path):
    """Every key of the tool with every odd value is taken, left out with a reason, or an error that says why."""
    path = tmp_path / "theirs.yaml"
    for name in [*NAMES[tool].split(), "zzz"]:
        kept = "".join(line for line in WHOLE[tool].splitlines(keepends=True) if not line.startswith(f"{name}:"))
        for value in ODD:
            path.write_text(f"{kept}{name}: {value}\n", encoding="utf-8")
            with contextlib.suppress(RecipeError):
                written(convert(path))
