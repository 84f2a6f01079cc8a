"""Whole runs on a tiny base: what must not matter does not, and what is written is what was trained."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from datetime import date, timedelta
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from orpo_cli.data.batches import flat_batch
from orpo_cli.data.dataset import load_held_out, load_pairs
from orpo_cli.data.templates import BUILT_IN
from orpo_cli.errors import DataError, InputError, ModelError
from orpo_cli.evaluate import evaluate_target
from orpo_cli.generate import prompt_ids
from orpo_cli.merge import merge_target
from orpo_cli.model.build import build_for_training, load_text_side, pair_tokenizer
from orpo_cli.recipe import load_recipe
from orpo_cli.scores import score_pairs
from orpo_cli.train import loop
from orpo_cli.train.run import Start, train
from tests.runs import losses, rows, same_files


def orpo(*arguments: str | Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "orpo_cli", *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"{path} never appeared")


@pytest.mark.parametrize("reduction", ["pair", "token"])
def test_how_a_step_is_cut_changes_only_rounding(tiny_recipe, tmp_path, reduction):
    runs = []
    for budget in (1, 150, 100_000):  # one pair a micro-batch, a few, all
        output = tmp_path / str(budget)
        recipe = tiny_recipe(
            lora=None,
            loss={"beta": 0.5, "nll_reduction": reduction, "nll_tokens": "all"},
            train={"max_tokens_per_microbatch": budget, "learning_rate": 1e-3},
            output={"dir": str(output)},
        )
        train(load_recipe(recipe))
        runs.append(losses(output))
    torch.testing.assert_close(runs[0], runs[2], rtol=2e-5, atol=0)
    torch.testing.assert_close(runs[1], runs[2], rtol=2e-5, atol=0)


def test_the_loss_of_a_step_is_that_of_the_whole_step(tiny_recipe):
    """Against the pairs scored one by one by the stock model, with unequal lengths and both reductions."""
    recipe = load_recipe(tiny_recipe(loss={"beta": 0.3, "nll_tokens": "all", "nll_reduction": "token"}))
    train(recipe)
    run = Path(recipe.output.dir)
    first = next(row for row in rows(run) if row["step"] == 1 and "loss" in row)

    text = load_text_side(recipe)
    training, _ = load_pairs(recipe.data, pair_tokenizer(recipe, text), recipe.train)
    steps = training.steps(8, seed=42, shuffle=True, start=_start(), total_pairs=None)
    pairs, _ = next(steps)
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path).eval()
    nll, tokens, or_loss = 0.0, 0, 0.0
    for pair in pairs:
        logps = {}
        for side in ("chosen", "rejected"):
            ids = torch.tensor(getattr(pair, f"{side}_ids"), dtype=torch.int64)[None]
            with torch.no_grad():
                table = base(ids).logits[0].double().log_softmax(-1)
            of_tokens = table[:-1].gather(1, ids[0, 1:, None])[:, 0]
            logps[side] = of_tokens[getattr(pair, f"{side}_start") - 1 :].mean()
            if side == "chosen":
                nll, tokens = nll - of_tokens.sum(), tokens + len(of_tokens)
        odds = {side: value - torch.log1p(-value.exp()) for side, value in logps.items()}
        or_loss += torch.log1p(torch.exp(-(odds["chosen"] - odds["rejected"]))) / len(pairs)
    assert first["nll_loss"] == pytest.approx(float(nll / tokens), rel=1e-5)
    assert first["or_loss"] == pytest.approx(float(or_loss), rel=1e-5)
    assert first["loss"] == pytest.approx(float(nll / tokens + 0.3 * or_loss), rel=1e-5)


def _start():
    from orpo_cli.data.order import Position

    return Position()


@pytest.mark.parametrize("lora", [{"r": 4, "dropout": 0.2}, None], ids=["lora", "full"])
def test_the_same_recipe_twice_gives_the_same_bytes(tiny_recipe, tmp_path, lora):
    for name in ("one", "other"):
        train(load_recipe(tiny_recipe(lora=lora, train={"eval_steps": 2}, output={"dir": str(tmp_path / name)})))
    same_files(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"r": 4, "dropout": 0.2}, "model": {"chat_template": "chatml"}},
        {"lora": None, "model": {"dtype": "bfloat16"}},
        {"lora": {"r": 4}, "data": {"streaming": True}},
        {"lora": None, "model": {"dtype": "bfloat16"}, "train": {"optimizer": "adamw_8bit"}},
    ],
    ids=["lora", "full-bfloat16", "stream", "8-bit-moments"],
)
def test_a_killed_run_goes_on_to_the_same_bytes(tiny_recipe, tmp_path, changes):
    """SIGKILL after a checkpoint, mid-epoch, with steps and rows after the checkpoint lost."""
    common = {"train": {"max_steps": 12, "eval_steps": 3, "save_steps": 3, **changes.get("train", {})}}
    train(load_recipe(tiny_recipe(**{**changes, **common}, output={"dir": str(tmp_path / "whole")})))

    recipe = tiny_recipe(**{**changes, **common}, output={"dir": str(tmp_path / "killed")})
    process = orpo("train", recipe)
    wait_for(tmp_path / "killed/checkpoints/step-000003", process)
    process.kill()
    process.communicate()
    resumed = orpo("train", recipe, "--resume")
    output = resumed.communicate()[0]
    assert resumed.returncode == 0, output
    assert "going on after step" in output
    same_files(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    "changes", [{}, {"data": {"streaming": True}, "train": {"max_steps": None, "num_train_epochs": 1.5}}]
)
def test_batches_made_ahead_are_those_made_in_turn(tiny_recipe, tmp_path, monkeypatch, changes):
    """Against the same steps made one by one, each when it is needed: the same bytes, checkpoints included."""
    train(load_recipe(tiny_recipe(**changes, output={"dir": str(tmp_path / "ahead")})))
    monkeypatch.setattr(loop, "Ahead", lambda items, count, given_up: nullcontext(items))
    train(load_recipe(tiny_recipe(**changes, output={"dir": str(tmp_path / "in-turn")})))
    same_files(tmp_path / "ahead", tmp_path / "in-turn")
    states = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*/checkpoints/*/state.json"))]
    assert [state["position"] for state in states[: len(states) // 2]] == [s["position"] for s in states[2:]]


def test_a_fault_in_a_stream_is_told_when_its_step_has_come(tiny_recipe, tiny_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("orpo_cli.data.dataset.BLOCK_ROWS", 16)  # two steps
    lines = tiny_pairs.read_text().splitlines()
    lines[20] = '{"prompt": "no answers"}'
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    data = {"train": str(tmp_path / "pairs.jsonl"), "eval": None, "streaming": True, "strict": True}
    with pytest.raises(DataError, match=r"row 20 \(line 21\)"):
        train(load_recipe(tiny_recipe(data=data, train={"max_steps": 6})))
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]
    assert all(thread.name != "orpo-ahead" for thread in threading.enumerate())


def test_a_resumed_run_claims_no_counts_of_a_stream_that_it_did_not_read_from_its_start(
    tiny_recipe, tiny_pairs, tmp_path
):
    lines = tiny_pairs.read_text().splitlines()
    lines[3] = '{"prompt": "no answers"}'
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    data = {"train": str(tmp_path / "pairs.jsonl"), "eval": None, "streaming": True, "shuffle": False}

    def counts() -> list:
        said = json.loads((tmp_path / "run/manifest.json").read_text())["data"]["train"]
        return [said[name] for name in ("rows", "truncated", "dropped")]

    train(load_recipe(tiny_recipe(data=data)))
    read, truncated, dropped = counts()
    assert 33 <= read <= 64  # four steps of eight, and what was read together with them
    assert (truncated, list(dropped.values())) == (0, [1])
    train(load_recipe(tiny_recipe(data=data, train={"max_steps": 6})), Start(resume=True))
    assert counts() == [None, None, None]
    train(load_recipe(tiny_recipe(data=data, train={"max_steps": 6})), Start(resume=True))  # with no step left
    assert counts() == [None, None, None]
    assert "dropped" not in (tmp_path / "run/report.html").read_text().partition('id="data"')[2].partition("id=")[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(tiny_recipe, tmp_path, number, code):
    common = {"train": {"max_steps": 400, "save_steps": 100_000, "learning_rate": 1e-4}, "data": {"eval": None}}
    recipe = tiny_recipe(**common)
    process = orpo("train", recipe)
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    assert "Traceback" not in output
    [checkpoint] = (tmp_path / "run/checkpoints").iterdir()
    assert rows(tmp_path / "run")[-1]["step"] == int(checkpoint.name.removeprefix("step-"))


def test_two_processes_train_as_one(tiny_recipe, tmp_path):
    """gloo: each process takes its share of every step's pairs; only rounding differs."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        recipe = tiny_recipe(train={"eval_steps": 2}, output={"dir": str(tmp_path / name)})
        command = [sys.executable, *launcher, "-m", "orpo_cli", "train", str(recipe)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert two[key] == (pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value), key
    assert json.loads((tmp_path / "two/manifest.json").read_text())["processes"] == 2

    # Resumed after its last step, all processes have a part in what is still to be done.
    (tmp_path / "two/eval.json").unlink()
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    figures = [json.loads((tmp_path / name / "eval.json").read_text())["loss"] for name in ("one", "two")]
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)


@pytest.mark.parametrize("changes", [{}, {"lora": None}, {"model": {"chat_template": "chatml"}}])
def test_stock_libraries_reproduce_the_held_out_log_probs(tiny_recipe, changes):
    recipe = load_recipe(tiny_recipe(**changes, train={"max_steps": 6, "learning_rate": 0.02}))
    train(recipe)
    run = Path(recipe.output.dir)
    pairs = load_held_out(recipe.data, pair_tokenizer(recipe, load_text_side(recipe)), recipe.train).in_source_order()
    lines = [json.loads(line) for line in (run / "eval.pairs.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [pair.index for pair in pairs]

    models = [AutoModelForCausalLM.from_pretrained(run / "merged")]
    if recipe.lora is not None:
        tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
        base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path)
        if len(tokenizer) > base.config.vocab_size:
            base.resize_token_embeddings(len(tokenizer))
        models += [AutoPeftModelForCausalLM.from_pretrained(run / "adapter")]
        models += [PeftModel.from_pretrained(base, run / "adapter")]
    for model in models:
        for pair, line in zip(pairs, lines, strict=True):
            for side, start in (("chosen", pair.chosen_start), ("rejected", pair.rejected_start)):
                ids = torch.tensor(getattr(pair, f"{side}_ids"), dtype=torch.int64)[None]
                with torch.no_grad():
                    table = model.eval()(ids).logits[0].log_softmax(-1)
                mean = table[:-1].gather(1, ids[0, 1:, None])[start - 1 :].mean().item()
                assert line[f"{side}_logps"] == pytest.approx(mean, abs=1e-4)
                assert line[f"{side}_tokens"] == ids.shape[1] - start


def test_a_taught_template_travels_with_the_weights(tiny_recipe):
    recipe = load_recipe(tiny_recipe(model={"chat_template": "chatml"}))
    train(recipe)
    for directory in (Path(recipe.output.dir) / "merged", Path(recipe.output.dir) / "adapter"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.eos_token_id == stop
        assert "<|im_start|>" in tokenizer.chat_template
        stops = GenerationConfig.from_pretrained(directory).eos_token_id
        assert stop in (stops if isinstance(stops, list) else [stops])
    weights = AutoModelForCausalLM.from_pretrained(Path(recipe.output.dir) / "merged").get_input_embeddings().weight
    assert len(weights) == len(tokenizer)
    assert not torch.equal(weights[-1], weights[-2])  # both started at the mean and have moved since


def test_a_template_that_writes_the_date_reads_the_same_on_another_day(tiny_recipe, tmp_path, monkeypatch):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d %b') + '. ' }}" + BUILT_IN["plain"])
    model = {"chat_template": str(template)}
    recipe = load_recipe(tiny_recipe(model=model))
    directory = Path(recipe.output.dir)
    figures = train(recipe)
    begun = load_recipe(directory / "recipe.yaml").model.chat_template_date
    assert date.today() - date.fromisoformat(begun) <= timedelta(days=1)
    adapter, first = (directory / "adapter" / "adapter_model.safetensors").read_bytes(), rows(directory)

    class Later(date):
        @classmethod
        def today(cls) -> date:
            return cls(2031, 5, 4)

    monkeypatch.setattr("orpo_cli.data.templates.date", Later)
    text = load_text_side(recipe)
    assert text.tokenizer.decode(prompt_ids(text, "x")).startswith("<s>04 May. User: x")
    assert evaluate_target(str(directory))["loss"] == figures["loss"]
    train(recipe, Start(resume_from=directory / "checkpoints" / "step-000002"))
    assert (directory / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert rows(directory) == first
    another = load_recipe(tiny_recipe(model={**model, "chat_template_date": "2031-05-04"}))
    with pytest.raises(InputError, match=f'model.chat_template_date: "{begun}" before, now "2031-05-04"'):
        train(another, Start(resume=True))


@pytest.fixture(scope="session")
def base_for_4bit(tiny_base, tmp_path_factory):
    """Widths that divide by 64, as NF4's blocks want."""
    directory = tmp_path_factory.mktemp("base-4bit")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(directory)
    return directory


def test_evaluation_leaves_the_gradients_of_a_4bit_base_alone(tiny_recipe, base_for_4bit):
    recipe = load_recipe(tiny_recipe(model={"name_or_path": str(base_for_4bit), "load_in_4bit": True}))
    text = load_text_side(recipe)
    training, held_out = load_pairs(recipe.data, pair_tokenizer(recipe, text), recipe.train)
    built = build_for_training(recipe, text, torch.device("cpu"))
    # B starts at zero, where A's gradient is zero too: move it, so that both have one.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in built.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=generator)
    batch = flat_batch(training.in_source_order()[:4], "response")

    def gradients():
        built.model.zero_grad()
        built.logprobs(batch).sum().backward()
        return {n: p.grad.clone() for n, p in built.model.named_parameters() if p.grad is not None}

    before = gradients()
    pairs = held_out.in_source_order()
    score_pairs(built.logprobs, pairs, nll_tokens="response", max_tokens=512, device=torch.device("cpu"))
    after = gradients()
    assert before.keys() == after.keys()
    assert len(before) == 2 * 2 * 7  # A and B of seven projections in two layers
    for name, gradient in before.items():
        assert gradient.abs().sum() > 0
        assert torch.equal(gradient, after[name]), name


def test_a_4bit_run_learns_and_measures_what_merging_costs(tiny_recipe, base_for_4bit):
    recipe = load_recipe(
        tiny_recipe(
            model={"name_or_path": str(base_for_4bit), "load_in_4bit": True},
            train={"max_steps": 12, "learning_rate": 0.02, "eval_steps": 4},
        )
    )
    figures = train(recipe)
    run = Path(recipe.output.dir)
    assert figures["loss"] < rows(run)[0]["eval_loss"] - 0.1
    gap = json.loads((run / "manifest.json").read_text())["merge"]
    assert gap["base"] == str(base_for_4bit)
    assert 0 < gap["mean_gap_chosen_logps"] < 0.5
    weights = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert weights.dtype == torch.bfloat16
    assert not hasattr(weights.config, "quantization_config")


def test_float16_trains_with_loss_scaling(tiny_recipe):
    recipe = load_recipe(tiny_recipe(model={"dtype": "float16"}, train={"max_steps": 8, "save_steps": 8}))
    train(recipe)
    run = Path(recipe.output.dir)
    trained = [row for row in rows(run) if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, 9))
    assert trained[-1]["loss"] < trained[0]["loss"]
    state = json.loads((run / "checkpoints/step-000008/state.json").read_text())
    assert state["loss_scale"]["scale"] > 1


def test_a_bfloat16_model_is_stepped_in_float32(tiny_recipe):
    """At lr 1e-5 hardly a bfloat16 weight would move in a step; the float32 masters all do."""
    recipe = load_recipe(
        tiny_recipe(
            lora=None,
            model={"dtype": "bfloat16"},
            train={"max_steps": 4, "learning_rate": 1e-5, "save_steps": 4, "lr_scheduler_type": "constant_with_warmup"},
        )
    )
    train(recipe)

    saved = load_file(Path(recipe.output.dir) / "checkpoints/step-000004/optimizer.safetensors")
    base = AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=torch.bfloat16)
    master = saved["master.model.layers.0.mlp.up_proj.weight"]
    start = base.model.layers[0].mlp.up_proj.weight.float()
    moved = (master - start).abs()
    assert master.dtype == torch.float32
    assert (moved > 0).float().mean() > 0.99
    assert 2e-5 < moved.median() < 5e-5  # about four steps of 1e-5


def test_weights_that_are_not_finite_are_refused_before_the_first_step(tiny_recipe, tiny_base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "ill")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "ill")
    with pytest.raises(ModelError, match=r"NaN or infinities in float32: model.layers.1.mlp.up_proj.weight$"):
        train(load_recipe(tiny_recipe(model={"name_or_path": str(tmp_path / "ill")})))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_an_answer_ends_where_the_context_does(tiny_recipe, tiny_base, tmp_path):
    """With learnt positions there is no next one to compute."""
    base = tmp_path / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(base)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=1, n_head=2, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(base)
    changes = {"sample_prompts": ["Which is larger? " * 6], "max_steps": 2}
    recipe = load_recipe(tiny_recipe(model={"name_or_path": str(base)}, train=changes))
    train(recipe)
    sampled = [json.loads(line) for line in (Path(recipe.output.dir) / "samples.jsonl").read_text().splitlines()]
    assert len(sampled) == 2
    room = 128 - len(tokenizer(f"User: {changes['sample_prompts'][0]}\n\nAssistant:").input_ids)
    assert 0 < room < 30
    assert all(len(row["answer"]) <= room for row in sampled)  # a token is a byte


def test_a_sample_prompt_that_fills_the_context_is_refused_before_the_first_step(tiny_recipe):
    recipe = load_recipe(tiny_recipe(train={"sample_prompts": ["Hi", "x" * 127]}))
    with pytest.raises(InputError, match=r"train\.sample_prompts, 'xxxx.*and the model's context is 128") as refused:
        train(recipe)
    assert refused.value.hint == "shorten it"
    assert not (Path(recipe.output.dir) / "metrics.jsonl").exists()


def test_sample_prompts_are_answered_at_each_evaluation(tiny_recipe):
    recipe = load_recipe(tiny_recipe(train={"sample_prompts": ["Which is larger?"], "eval_steps": 2}))
    train(recipe)
    samples = [json.loads(line) for line in (Path(recipe.output.dir) / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 2, 4]
    assert {sample["prompt"] for sample in samples} == {"Which is larger?"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA has them all")
def test_an_optimizer_that_the_device_has_not_is_an_error_before_anything_is_written(tiny_recipe, tmp_path):
    with pytest.raises(InputError, match="paged_adamw_8bit runs on cuda"):
        train(load_recipe(tiny_recipe(train={"optimizer": "paged_adamw_8bit"})))
    assert not (tmp_path / "run").exists()


def test_a_surplus_checkpoint_that_a_kill_left_at_the_end_goes_on_resumption(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe(train={"save_total_limit": 1}))
    train(recipe)
    checkpoints = tmp_path / "run/checkpoints"
    shutil.copytree(checkpoints / "step-000004", checkpoints / "step-000003")
    train(recipe, Start(resume=True))
    assert [path.name for path in checkpoints.iterdir()] == ["step-000004"]


def test_a_checkpoint_of_another_run_is_refused(tiny_recipe, tiny_run, tmp_path):
    recipe = load_recipe(tiny_recipe())
    train(recipe)
    [other] = list((tiny_run / "checkpoints").glob("step-000002"))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="no checkpoint of this run"):
        train(recipe, Start(resume_from=other))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_the_padded_fallback_trains_to_the_same_numbers(tiny_recipe, tmp_path):
    for name, shared in (("shared", True), ("apart", False)):
        train(load_recipe(tiny_recipe(model={"shared_prefix": shared}, output={"dir": str(tmp_path / name)})))
    torch.testing.assert_close(losses(tmp_path / "apart"), losses(tmp_path / "shared"), rtol=1e-4, atol=0)


def test_new_tokens_in_spare_rows_are_trained_and_travel(tiny_recipe, tiny_base, tmp_path):
    """Many models have more rows than their tokenizer has tokens: what is taught then needs no row to be added."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.resize_token_embeddings(320)
    model.save_pretrained(tmp_path / "roomy")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "roomy")
    recipe = load_recipe(tiny_recipe(model={"name_or_path": str(tmp_path / "roomy"), "chat_template": "chatml"}))
    train(recipe)
    run = Path(recipe.output.dir)
    ids = json.loads((run / "manifest.json").read_text())["template"]["trained_rows"]
    assert ids == AutoTokenizer.from_pretrained(run / "merged").convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").get_input_embeddings().weight
    assert len(merged) == 320
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "roomy").get_input_embeddings().weight
    assert not torch.allclose(merged[ids], base[ids], atol=1e-2)


def test_merging_a_quantised_run_again_says_what_it_costs(tiny_recipe, base_for_4bit):
    changes = {"model": {"name_or_path": str(base_for_4bit), "load_in_4bit": True}, "output": {"merge": False}}
    recipe = load_recipe(tiny_recipe(**changes))
    train(recipe)
    run = Path(recipe.output.dir)
    assert "merge" not in json.loads((run / "manifest.json").read_text())
    merged = merge_target(str(run), output=None, base=None, dtype="auto")
    assert merged == run / "merged"
    assert json.loads((run / "manifest.json").read_text())["merge"]["mean_gap_chosen_logps"] > 0
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.bfloat16  # as it was trained


def test_truncated_pairs_are_said_and_kept_in_the_manifest(tiny_recipe, capsys):
    recipe = load_recipe(tiny_recipe(data={"max_length": 64, "overlong": "truncate_prompt"}, train={"max_steps": 2}))
    train(recipe)
    counted = json.loads((Path(recipe.output.dir) / "manifest.json").read_text())["data"]
    said = re.findall(r"truncated (\d+) of them to fit \(data.overlong: truncate_prompt\)", capsys.readouterr().err)
    assert said == [str(counted[name]["truncated"]) for name in ("train", "eval")]
    assert counted["train"]["truncated"] > 0
