"""`orpo check` against runs: what it says comes true."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from orpo_cli.data.batches import flat_tokens
from orpo_cli.data.dataset import load_pairs
from orpo_cli.model.build import load_text_side, pair_tokenizer
from orpo_cli.recipe import load_recipe
from orpo_cli.train.run import train


def checked(orpo, recipe, *arguments) -> dict:
    code, out, err = orpo("check", recipe, "--json", *arguments)
    assert code == 0, err
    return json.loads(out)


def test_what_is_said_is_what_the_run_does(tiny_recipe, tmp_path, orpo):
    recipe = tiny_recipe()
    said = checked(orpo, recipe)
    assert not (tmp_path / "run").exists()
    resolved = load_recipe(recipe)
    train(resolved)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    estimated = manifest["memory"]["estimated_bytes"]
    for part, size in said["memory"]["training"].items():
        if part not in ("process", "total"):  # of another process
            assert estimated[part] == size, part
    assert said["max_tokens_per_microbatch"] == manifest["max_tokens_per_microbatch"]
    assert said["memory"]["available"] == manifest["memory"]["available_bytes"]
    assert said["data"]["train"]["pairs"] == manifest["data"]["train"]["pairs"] == 56
    assert said["steps"] == 4

    pairs, _ = load_pairs(resolved.data, pair_tokenizer(resolved, load_text_side(resolved)), resolved.train)
    tokens = [flat_tokens(pair) for pair in pairs.in_source_order()]
    assert said["data"]["train"]["tokens"] == sum(tokens)
    longest = max(max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs.in_source_order())
    assert said["data"]["train"]["longest_pair"] == longest
    assert said["tokens"] == round(32 * sum(tokens) / 56)

    adapter = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert said["model"]["trained"] == sum(tensor.numel() for tensor in adapter.values())
    written = sum(p.stat().st_size for p in (tmp_path / "run/checkpoints").rglob("*.safetensors"))
    assert 0.8 * said["disk"]["checkpoints"] * 2 / 3 < written  # two of the three that there may be
    results = sum(p.stat().st_size for name in ("adapter", "merged") for p in (tmp_path / "run" / name).glob("*.saf*"))
    assert said["disk"]["results"] == pytest.approx(results, rel=0.1)


def test_the_text_is_the_resolved_recipe_and_the_plan_as_comments(tiny_recipe, orpo, tmp_path):
    code, out, _ = orpo("check", tiny_recipe(), "--set", "loss.beta=0.3")
    assert code == 0
    (tmp_path / "again.yaml").write_text(out)
    assert load_recipe(tmp_path / "again.yaml") == load_recipe(tiny_recipe(), ["loss.beta=0.3"])
    comments = [line for line in out.splitlines() if line.startswith("# ")]
    heads = ["model", "training data", "held-out data", "steps", "memory, training", "memory, evaluation", "disk"]
    for head in heads:
        assert any(line.startswith(f"# {head}: ") for line in comments), head


def test_of_two_keys_of_which_one_wins_that_is_said(tiny_recipe, orpo):
    train = {"max_steps": 3, "num_train_epochs": 2, "warmup_steps": 1, "warmup_ratio": 0.2}
    recipe = tiny_recipe(train=train)
    assert checked(orpo, recipe)["steps"] == 3
    for verb, place in (("check", 1), ("train", 2)):
        told = orpo(verb, recipe)[place]
        assert "train.max_steps: 3 wins over train.num_train_epochs: 2, which has no effect\n" in told
        assert "train.warmup_steps: 1 wins over train.warmup_ratio: 0.2, which has no effect\n" in told
    assert "wins" not in orpo("check", recipe, "--set", "train.max_steps=null", "--set", "train.warmup_steps=null")[1]
    assert "wins" not in orpo("check", tiny_recipe())[1]


def test_check_data_and_train_count_alike(tiny_recipe, tmp_path, orpo):
    rows = [{"prompt": f"Q{i}", "chosen": "a" * (i + 1), "rejected": "b"} for i in range(20)]
    rows += [{"prompt": "Q", "chosen": "", "rejected": "b"}, {"prompt": "Q", "chosen": "a" * 500, "rejected": "b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(data={"train": str(tmp_path / "rows.jsonl"), "eval": {"holdout": 4}})
    plan = checked(orpo, recipe)["data"]
    found = json.loads(orpo("data", recipe, "--json", "--summary")[1])
    for name in ("train", "eval"):
        for key in ("rows", "pairs", "held_out", "dropped", "truncated"):
            assert plan[name][key] == found[name][key], (name, key)
    assert plan["train"]["held_out"] == plan["eval"]["pairs"] == 4
    assert (plan["train"]["rows"], plan["train"]["pairs"]) == (22, 16)

    said = [orpo("check", recipe)[1], orpo("data", recipe)[1], orpo("train", recipe)[2]]
    for text in said:
        assert "16 pairs of 22 rows, 4 held out" in text
        assert "4 pairs, of the training data's rows" in text

    # Of whole pairs, `orpo data` sees the longest one of all.
    assert plan["train"]["longest_pair"] < found["train"]["tokens"]["pair"]["max"]
    kept = tiny_recipe(
        data={
            "train": str(tmp_path / "rows.jsonl"),
            "eval": None,
            "filter": [{"column": "chosen", "not_contains": "a" * 99}],
        }
    )
    plan, found = checked(orpo, kept)["data"], json.loads(orpo("data", kept, "--json", "--summary")[1])
    assert plan["train"]["longest_pair"] == found["train"]["tokens"]["pair"]["max"]


def test_every_fault_of_the_recipe_is_told_at_once(tiny_recipe, orpo):
    recipe = tiny_recipe(loss={"betta": 1}, train={"batch_size": 0})
    code, out, err = orpo("check", recipe)
    assert (code, out) == (2, "")
    assert "loss.betta" in err
    assert "train.batch_size" in err


def test_a_sample_prompt_that_fills_the_context_is_refused(tiny_recipe, orpo):
    code, _, err = orpo("check", tiny_recipe(), "--set", f"train.sample_prompts=[{'x' * 127}]")
    assert code == 2
    assert err.startswith(f"error: --set train.sample_prompts=[{'x' * 127}]: train.sample_prompts, 'xxxx")
    assert err.endswith(" tokens, and the model's context is 128\nhint: shorten it\n")


def test_what_does_not_fit_is_refused_with_what_would(tiny_recipe, orpo, monkeypatch):
    recipe = tiny_recipe(lora=None, train={"max_tokens_per_microbatch": 600}, model={"gradient_checkpointing": False})
    needed = checked(orpo, recipe)["memory"]["training"]
    little = needed["total"] - needed["process"] - needed["activations"] // 8
    monkeypatch.setattr("orpo_cli.plan.device_memory", lambda device: little)
    code, out, err = orpo("check", recipe, "--json")
    assert code == 1
    said = json.loads(out)
    assert not said["fits"]
    assert "error: does not fit" in err
    assert said["would_fit"] == {"train.max_tokens_per_microbatch": "auto"}
    # And it does.
    overrides = [f"--set={key}={json.dumps(value)}" for key, value in said["would_fit"].items()]
    assert checked(orpo, recipe, *overrides)["fits"]

    monkeypatch.setattr("orpo_cli.plan.device_memory", lambda device: 1000)
    code, out, err = orpo("check", recipe, "--json")
    assert (code, json.loads(out)["would_fit"]) == (1, None)
    assert "larger device" in err


def test_what_does_not_fit_at_the_end_alone_is_refused_too(tiny_recipe, orpo, monkeypatch):
    recipe = tiny_recipe(model={"load_in_4bit": True})
    needed = checked(orpo, recipe)["memory"]
    little = needed["training"]["total"] - needed["training"]["process"]  # what training takes, and no more
    monkeypatch.setattr("orpo_cli.plan.device_memory", lambda device: little)
    code, out, err = orpo("check", recipe, "--json")
    assert (code, json.loads(out)["too_large"]) == (1, ["merging"])
    assert "error: does not fit: merging takes" in err
    assert json.loads(out)["would_fit"] == {"output.merge": False}
    assert checked(orpo, recipe, "--set", "output.merge=false")["fits"]


def test_a_disk_that_is_too_small_does_not_fit(tiny_recipe, orpo, monkeypatch):
    room = checked(orpo, tiny_recipe())["disk"]
    needed = room["checkpoints"] + room["results"]
    for free in (needed, needed - 1):
        monkeypatch.setattr("orpo_cli.plan.shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        code, out, err = orpo("check", tiny_recipe(), "--json")
        assert (code, json.loads(out)["too_large"]) == ((0, []) if free == needed else (1, ["disk"]))
    assert "--output-dir" in err


def test_time_is_told_on_demand_and_no_weight_is_read_otherwise(tiny_recipe, tiny_base, tmp_path, orpo):
    recipe = tiny_recipe()
    took = checked(orpo, recipe, "--probe")["time"]
    assert took["run"] == pytest.approx(4 * took["step"] + 2 * took["evaluation"])
    assert min(took.values()) > 0
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_base.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    assert "time" not in checked(orpo, recipe, "--set", f"model.name_or_path={bare}")


def test_a_stream_is_not_counted(tiny_recipe, orpo):
    said = checked(orpo, tiny_recipe(data={"streaming": True, "eval": None}))
    assert said["data"] == {"train": {**said["data"]["train"], "pairs": None, "tokens": None, "longest_pair": None}}
    assert said["tokens"] is None
    assert said["memory"]["evaluation"] is None
    assert torch.get_default_device().type == "cpu"
    assert yaml.safe_load(json.dumps(said["recipe"]))["data"]["streaming"] is True


def test_merging_onto_a_base_that_was_quantised_takes_the_whole_one_besides(tiny_recipe, orpo):
    plain, four = (checked(orpo, tiny_recipe(model={"load_in_4bit": bits})) for bits in (False, True))
    whole = 4 * (plain["model"]["parameters"] - plain["model"]["trained"])  # float32, without the adapter
    more = four["memory"]["merging"]["host"] - four["memory"]["training"]["total"]
    assert more == whole
    assert plain["memory"]["merging"]["host"] <= plain["memory"]["training"]["total"] + whole
    none = checked(orpo, tiny_recipe(model={"load_in_4bit": True}, output={"merge": False}))
    assert none["memory"]["merging"] is None
