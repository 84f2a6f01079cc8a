"""The command line: exit code, stdout and stderr together, and never a traceback for a user's mistake."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orpo_cli import __version__
from orpo_cli.errors import OrpoError, RunError

# Usage


def test_without_arguments_help_is_an_error(orpo):
    code, out, err = orpo()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: orpo [OPTIONS] COMMAND [ARGS]...\n")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_goes_to_stdout(orpo, flag):
    code, out, err = orpo(flag)
    assert (code, err) == (0, "")
    assert all(
        f"\n  {verb} " in out
        for verb in ("train", "eval", "merge", "demo", "init", "generate", "runs", "doctor", "schema")
    )


def test_help_groups_the_verbs_and_cuts_no_sentence(orpo):
    _, out, _ = orpo("--help")
    assert re.findall(r"^([A-Z].*):$", out, re.MULTILINE) == ["Options", "Start", "Train", "Judge and use", "Around it"]
    assert "..." not in out.split("Start:")[1]
    assert re.search(r"^Train:\n(  .*\n)*  train ", out, re.MULTILINE)


def test_init_lists_writes_and_converts(orpo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = orpo("init")
    assert (code, err) == (0, "")
    assert out.startswith("demo\n    The recipe of `orpo demo`")
    assert orpo("init", "phi-2-hh") == (0, "recipe.yaml\n", "")
    code, out, err = orpo("init", "phi-2-hh")
    assert (code, out) == (2, "")
    assert err == "error: recipe.yaml exists\nhint: --overwrite replaces it, -o names another file\n"
    assert orpo("init", "phi-2-hh", "--overwrite")[0] == 0
    (tmp_path / "theirs.yaml").write_text("base_model: a/B\nrl: orpo\ndatasets: [{path: x/y}]\nzzz: 1\n")
    code, out, err = orpo("init", "--from", "theirs.yaml", "-o", "ours.yaml")
    assert (code, out) == (0, "ours.yaml\n")
    assert "theirs.yaml:4: zzz: no key of ours, and unknown here\n" in err
    code, out, err = orpo("init", "phi-2-hh", "--from", "theirs.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("error: a starter recipe and --from were both given\n")


def test_runs_is_a_table_or_json(orpo, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = orpo("runs", tiny_run.parent)
    assert (code, err) == (0, "")
    assert out.splitlines()[1].split()[:3] == [str(tiny_run), "finished", "4"]
    code, out, err = orpo("runs", tiny_run.parent, "--json", "--sort", "loss")
    assert [run["run"] for run in json.loads(out)] == [str(tiny_run)]
    code, out, err = orpo("runs")
    assert (code, out) == (2, "")
    assert err == "error: runs is no directory\nhint: name one that holds runs; without a name it is runs/\n"
    (tmp_path / "runs").mkdir()
    assert orpo("runs") == (0, "", "no runs\n")
    assert orpo("runs", "--json") == (0, "[]\n", "")


def test_the_schema_is_json_for_editors_or_a_page(orpo):
    code, out, err = orpo("schema")
    assert (code, err) == (0, "")
    assert json.loads(out)["$schema"].endswith("2020-12/schema")
    code, out, err = orpo("schema", "--markdown")
    assert (code, err) == (0, "")
    assert out.startswith("# Recipe reference\n")


def test_shells_complete_verbs_and_options():
    command = "import orpo_cli.cli; orpo_cli.cli.main()"
    for typed, expected in {"orpo sch": ["schema"], "orpo train --resu": ["--resume", "--resume-from"]}.items():
        done = subprocess.run(
            [sys.executable, "-c", command],
            env={
                **os.environ,
                "_ORPO_COMPLETE": "complete_bash",
                "COMP_WORDS": typed,
                "COMP_CWORD": str(typed.count(" ")),
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.split() == expected


def test_version(orpo):
    assert orpo("--version") == (0, f"orpo {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "error", "where"),
    [
        (["frobnicate"], "No such command 'frobnicate'.", "orpo"),
        (["trian"], "No such command 'trian'. Did you mean 'train'?", "orpo"),
        (["train"], "Missing argument 'RECIPE'.", "orpo train"),
        (["train", "a.yaml", "b.yaml"], "Got unexpected extra argument(s) (b.yaml)", "orpo train"),
        (["train", "a.yaml", "--frobnicate"], "No such option: --frobnicate", "orpo train"),
        (["--frobnicate"], "No such option: --frobnicate", "orpo"),
    ],
)
def test_wrong_usage(orpo, arguments, error, where):
    assert orpo(*arguments) == (2, "", f"error: {error}\nhint: {where} --help says what it takes\n")


def test_a_choice_says_what_it_may_be(orpo):
    code, out, err = orpo("merge", "run", "--dtype", "int8")
    assert (code, out) == (2, "")
    assert "'int8' is not one of 'auto', 'bfloat16', 'float16', 'float32'" in err


def test_overwrite_and_resume_contradict_each_other(orpo, tiny_recipe):
    recipe = tiny_recipe()
    expected = (2, "", "error: --overwrite and --resume contradict each other\nhint: give one of them\n")
    assert orpo("train", recipe, "--overwrite", "--resume") == expected
    assert orpo("train", recipe, "--overwrite", "--resume-from", "x") == expected


# Recipe, model, data


def test_a_missing_recipe(orpo, tmp_path):
    path = tmp_path / "recipe.yaml"
    assert orpo("train", path) == (
        2,
        "",
        f"error: {path}: no such file\nhint: give the path of a recipe, a YAML file\n",
    )


def test_every_fault_of_a_recipe_at_once(orpo, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model:\n  name_or_path: some/model\n  dtyp: bfloat16\n"
        "data:\n  train: pairs.jsonl\n  max_length: long\n"
        "loss:\n  beta: -1\n  nll_tokens: some\n"
        "train:\n  per_device_train_batch_size: 4\n  seed: 1.5\n"
    )
    code, out, err = orpo("train", path)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    for line, key in [
        (3, "model.dtyp"),
        (6, "data.max_length"),
        (8, "loss.beta"),
        (9, "loss.nll_tokens"),
        (11, "train.per_device_train_batch_size"),
        (12, "train.seed"),
    ]:
        assert f"{path}:{line}: {key}" in err
    assert "train.batch_size" in err


def test_a_wrong_override(orpo, tiny_recipe):
    code, out, err = orpo("train", tiny_recipe(), "--set", "loss.bta=0.5")
    assert (code, out) == (2, "")
    assert "--set loss.bta=0.5" in err
    assert "loss.beta" in err


def test_an_empty_output_directory_is_not_the_working_directory(orpo, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = orpo("train", tiny_recipe(), "--output-dir", "")
    assert (code, out) == (2, "")
    assert "output.dir" in err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_missing_model(orpo, tiny_recipe, tmp_path):
    code, out, err = orpo("train", tiny_recipe(model={"name_or_path": str(tmp_path / "no-model")}))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert str(tmp_path / "no-model") in err
    assert "\nhint: " in err


def test_missing_data(orpo, tiny_recipe, tmp_path):
    recipe = tiny_recipe(data={"train": str(tmp_path / "no-pairs.jsonl")})
    line = next(i for i, line in enumerate(recipe.read_text().splitlines(), 1) if "no-pairs" in line)
    code, out, err = orpo("train", recipe)
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == f"error: {recipe}:{line}: there is no file or directory {tmp_path / 'no-pairs.jsonl'}"
    assert err.splitlines()[1].startswith("hint: ")


def test_a_directory_that_holds_a_run(orpo, tiny_recipe, tiny_run):
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    assert orpo("train", tiny_recipe(output={"dir": str(tiny_run)})) == (
        2,
        "",
        f"error: {tiny_run} already holds a run\n"
        "hint: --resume goes on with it, --overwrite starts anew, --output-dir names another directory\n",
    )
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before


def test_a_missing_checkpoint(orpo, tiny_recipe, tmp_path):
    code, out, err = orpo("train", tiny_recipe(), "--resume-from", tmp_path / "step-000009")
    assert (code, out) == (2, "")
    assert f"error: {tmp_path / 'step-000009'} is no checkpoint of this run" in err


# A run, from here on with everything it says


def test_train_speaks_on_stderr_and_writes_the_run(orpo, tiny_recipe, tmp_path):
    rows = [json.dumps({"prompt": f"p{i}", "chosen": f"yes {i}", "rejected": f"no {i}"}) for i in range(30)]
    rows += ["{broken", json.dumps({"prompt": "p", "chosen": "same", "rejected": "same"})]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(rows))
    recipe = tiny_recipe(data={"train": str(pairs)}, train={"max_steps": 2}, loss={"beta": 0.25})
    directory = tmp_path / "elsewhere"
    code, out, err = orpo("train", recipe, "--output-dir", directory, "--set", "train.seed=7")
    assert (code, out) == (0, "")
    assert "training data: 22 pairs of 32 rows" in err
    assert f"  dropped 1 identical, e.g. {pairs}, row 31 (line 32): chosen and rejected are the same" in err
    assert f"  dropped 1 malformed, e.g. {pairs}, row 30 (line 31): not JSON" in err
    assert "warning: 6% of the rows were dropped; above 50% is an error" in err
    assert "step 2/2" in err
    assert f'from_pretrained("{directory}/merged")' in err
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["command"].startswith("orpo train ")
    assert manifest["seed"] == 7
    assert not (tmp_path / "run").exists()

    # It holds a run now; overwriting it leaves what is not a run's.
    (directory / "notes.txt").write_text("mine")
    assert orpo("train", recipe, "--output-dir", directory)[0] == 2
    code, _, err = orpo("train", recipe, "--output-dir", directory, "--resume", "--set", "loss.beta=0.5")
    assert code == 2
    assert f"error: {directory} is not what it was; these differ:\n" in err
    assert "\n  loss.beta: 0.25 before, now 0.5\n  train.seed: 7 before, now 42\n" in err
    assert orpo("train", recipe, "--output-dir", directory, "--overwrite")[0] == 0
    assert (directory / "notes.txt").exists()

    # Other data under the same recipe.
    pairs.write_text("\n".join(rows[:-1]))
    code, _, err = orpo("train", recipe, "--output-dir", directory, "--resume")
    assert code == 2
    assert "\n  data.train (content): [" in err


def test_data_shows_figures_and_pairs_on_stdout_and_warnings_on_stderr(orpo, tiny_recipe):
    code, out, err = orpo("data", tiny_recipe(), "--pairs", "1")
    assert code == 0
    assert "\ntraining: " in out
    assert "\nheld-out: 8 pairs, of the training data's rows\n" in out
    assert out.count("\n  chosen: [context]") == out.count("\n  rejected: [context]") == 1
    assert "[nll+or]11 is.</s>\n" in out
    assert "\x1b" not in out
    assert all(line.startswith("warning: ") for line in err.splitlines())
    assert "the shorter answer is the chosen one" in err


def test_data_gives_programs_every_pair_or_the_figures(orpo, tiny_recipe, tiny_pairs):
    recipe = tiny_recipe()
    code, out, err = orpo("data", recipe, "--json")
    pairs = [json.loads(line) for line in out.splitlines()]
    assert (code, err, len(pairs)) == (0, "", 56)
    assert all(list(pair) == ["index", "prompt_ids", "chosen_ids", "rejected_ids"] for pair in pairs)
    code, held_out, _ = orpo("data", recipe, "--json", "--held-out")
    everything = pairs + [json.loads(line) for line in held_out.splitlines()]
    assert sorted(pair["index"] for pair in everything) == list(range(64))
    rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
    for pair in everything:
        row = rows[pair["index"]]
        before = f"User: {row['prompt']}\n\nAssistant: "
        # The tiny tokenizer's tokens are bytes, here ASCII: BOS and the prompt, the answer and its end.
        lengths = [len(pair[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")]
        assert lengths == [len(before) + 1, len(row["chosen"]) + 1, len(row["rejected"]) + 1]
    assert orpo("data", recipe, "--json", "--row", pairs[5]["index"])[1] == json.dumps(pairs[5]) + "\n"
    code, out, _ = orpo("data", recipe, "--json", "--summary")
    assert (code, json.loads(out)["train"]["pairs"]) == (0, 56)


@pytest.mark.parametrize(
    ("changes", "arguments", "error"),
    [
        ({"eval": None}, ["--held-out"], "--held-out: the recipe has no held-out data"),
        ({}, ["--row", "64"], "there is no row 64"),
        ({}, ["--set", "data.max_length=3"], "holds no usable pair"),
    ],
)
def test_data_that_is_not_there(orpo, tiny_recipe, changes, arguments, error):
    code, out, err = orpo("data", tiny_recipe(data=changes), *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert error in err
    assert "\nhint: " in err


def test_eval_prints_json_and_nothing_else_on_stdout(orpo, tiny_run, tmp_path):
    code, out, err = orpo("eval", tiny_run, "--output", tmp_path / "figures.json", "--fail-under", "accuracy=0.5")
    assert code == 0
    assert json.loads(out)["pairs"] == 8
    assert (tmp_path / "figures.json").read_text() == out
    assert len((tmp_path / "figures.pairs.jsonl").read_text().splitlines()) == 8
    assert "error" not in err


def test_eval_fails_under_a_threshold_but_prints_the_figures(orpo, tiny_run):
    code, out, err = orpo("eval", tiny_run, "--fail-under", "accuracy=0.1", "--fail-under", "loss=99.5")
    loss = json.loads(out)["loss"]
    assert code == 1
    assert err.endswith(f"\nerror: loss is {loss:.4g}, below 99.5\n")
    nested = "accuracy_by_length.chosen_longer.accuracy"
    code, _, err = orpo("eval", tiny_run, "--fail-under", f"{nested}=1.5")
    assert code == 1
    assert f"error: {nested} is " in err


def test_eval_refuses_a_threshold_of_no_figure(orpo, tiny_run):
    code, out, err = orpo("eval", tiny_run, "--fail-under", "acuracy=0.1")
    assert (code, out) == (2, "")  # before anything is scored
    assert err.startswith("error: --fail-under: there is no figure acuracy\nhint: there are accuracy, ")
    assert orpo("eval", tiny_run, "--fail-under", "delta.accuracy=0.1")[:2] == (2, "")
    code, out, err = orpo("eval", tiny_run, "--fail-under", "accuracy_by_length.acuracy=0.1")
    assert code == 2
    assert json.loads(out)
    assert "\nerror: --fail-under: there is no figure accuracy_by_length.acuracy\nhint: there are accuracy, " in err


@pytest.mark.parametrize("command", [["sweep", "a.yaml", "--tolerance"], ["generate", "run", "--temperature"]])
def test_an_option_that_is_no_number_is_refused(orpo, command):
    code, out, err = orpo(*command, "nan")
    assert (code, out) == (2, "")
    assert f"Invalid value for '{command[-1]}': Input should be greater than or equal to 0" in err


@pytest.mark.parametrize(
    "threshold", ["accuracy", "accuracy=", "accuracy=much", "=0.5", "accuracy=nan", "accuracy=inf"]
)
def test_eval_refuses_what_is_no_threshold_before_it_scores(orpo, threshold):
    hint = "hint: for instance --fail-under accuracy=0.8\n"
    assert orpo("eval", "run", "--fail-under", threshold) == (
        2,
        "",
        f"error: --fail-under {threshold}: not METRIC=X\n{hint}",
    )


@pytest.mark.parametrize("option", ["--output", "--answers"])
def test_eval_refuses_a_file_that_cannot_be_written_before_it_scores(orpo, tmp_path, option):
    for output in (tmp_path, tmp_path / "absent" / "figures.json"):
        code, out, err = orpo("eval", "run", option, output)
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {option} {output}: no file can be written there\n")


def test_eval_with_all_that_it_can_be_asked_for(orpo, tiny_run, tiny_base, tiny_pairs, tmp_path):
    more = ["--base", tiny_base, "--by", "prompt", "--by", "chosen", "--samples", "2", "--max-new-tokens", "4"]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(tiny_pairs.read_text().splitlines(keepends=True)[:9]))
    code, out, err = orpo("eval", tiny_run, "--data", pairs, *more, "--answers", tmp_path / "answers.json")
    assert code == 0
    figures = json.loads(out)
    assert set(figures) > {"base", "delta", "slices", "samples", "answers"}
    assert len(json.loads((tmp_path / "answers.json").read_text())) == len(figures["samples"]) == 2
    for words in (
        "9 pairs",
        "delta",
        "by prompt",
        "by chosen",
        "answers to 2 prompts",
        "self bleu",
        "prompt  Which is",
    ):
        assert words in err
    assert f"{figures['delta']['loss']:.4g}" in err


@pytest.mark.parametrize("arguments", [["eval"], ["eval", "--data", "x.jsonl"], ["merge"]])
def test_a_target_that_is_not_there(orpo, tmp_path, arguments):
    verb, *options = arguments
    code, out, err = orpo(verb, tmp_path / "absent", *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "\nhint: " in err


def test_generate_answers_prompts_and_lines(orpo, tiny_run, monkeypatch):
    code, out, err = orpo("generate", tiny_run, "--prompt", "a", "--prompt", "b", "--max-new-tokens", 5, "--json")
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["prompt"] for row in rows] == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb\n"))
    assert orpo("generate", tiny_run, "--max-new-tokens", 5, "--json")[1] == out
    code, streamed, err = orpo("generate", tiny_run, "--prompt", "a", "--max-new-tokens", 5)
    assert (code, streamed.strip()) == (0, rows[0]["answer"])
    assert streamed.endswith("\n")
    code, out, err = orpo("generate", "nowhere/at-all", "--prompt", "a")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "typed"),
    [
        (["generate", "ABSENT"], "RUN_OR_MODEL"),
        (["generate", "RUN/adapter", "--base", "ABSENT"], "--base"),
        (["eval", "ABSENT"], "RUN_OR_MODEL"),
        (["eval", "RUN", "--base", "ABSENT"], "--base"),
        (["eval", "RUN", "--judge", "ABSENT"], "--judge"),
        (["merge", "RUN/adapter", "--base", "ABSENT"], "--base"),
    ],
)
def test_a_model_that_is_not_there_is_named_as_it_was_typed(arguments, typed, tiny_run, tmp_path, orpo):
    absent = str(tmp_path / "absent")
    given = [argument.replace("RUN", str(tiny_run)).replace("ABSENT", absent) for argument in arguments]
    hint = f"{typed} names a directory or a hub id"
    assert orpo(*given) == (2, "", f"error: {typed}: there is no directory {absent}\nhint: {hint}\n")


def test_generate_is_a_chat_on_a_terminal(tiny_run):
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "orpo_cli", "generate", str(tiny_run), "--max-new-tokens", "5"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.write(ours, b"one\ntwo\n\x04")
        out, err = process.communicate(timeout=120)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, err
    assert err.count("> ") == 3
    assert out.endswith("\n")
    assert len(out) > 2


def test_merge_says_where_on_stdout(orpo, tiny_run, tmp_path):
    import torch
    from safetensors.torch import load_file

    code, out, _ = orpo("merge", tiny_run / "adapter", "--output", tmp_path / "merged")
    assert (code, out) == (0, f"{tmp_path / 'merged'}\n")
    written, own = (load_file(p / "model.safetensors") for p in (tmp_path / "merged", tiny_run / "merged"))
    assert written.keys() == own.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(written[name], tensor)
    code, out, err = orpo("merge", tiny_run / "adapter", "--output", tmp_path / "merged")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'merged'} is not empty\n")


def test_a_full_fine_tune_has_nothing_to_merge(orpo, tiny_recipe, tmp_path):
    assert orpo("train", tiny_recipe(lora=None, train={"max_steps": 2}))[0] == 0
    code, out, err = orpo("merge", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path / 'run'} has no adapter to merge\n")
    assert f"hint: its weights are whole already, in {tmp_path / 'run' / 'merged'}\n" in err
    code, out, _ = orpo("eval", tmp_path / "run")
    assert code == 0
    figures = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert json.loads(out)["loss"] == pytest.approx(figures["loss"], abs=1e-5)
    # A full run's checkpoint has weights and no configuration: it is for --resume, and that is said.
    code, out, err = orpo("eval", tmp_path / "run" / "checkpoints" / "step-000002")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")


# What is raised deep inside


@pytest.mark.parametrize(
    ("raised", "code", "stderr"),
    [
        (
            RunError("the loss is not finite", "lower the rate"),
            1,
            "error: the loss is not finite\nhint: lower the rate\n",
        ),
        (OrpoError("it broke"), 1, "error: it broke\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 1, "error: /data/x: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 1, "error: /data/x: Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_failures_are_explained(orpo, monkeypatch, raised, code, stderr, tiny_recipe):
    import orpo_cli.train.run

    def fail(*_args):
        raise raised

    monkeypatch.setattr(orpo_cli.train.run, "train", fail)
    found, out, err = orpo("train", tiny_recipe())
    assert (found, out) == (code, "")
    assert err.startswith(stderr)


def test_a_fault_of_the_program_is_not_hidden(orpo, monkeypatch, tiny_recipe):
    import orpo_cli.train.run

    def fail(*_args):
        raise ZeroDivisionError

    monkeypatch.setattr(orpo_cli.train.run, "train", fail)
    with pytest.raises(ZeroDivisionError):
        orpo("train", tiny_recipe())


# As a process


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "tokenizers", "bitsandbytes")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["--version"], ["train"], ["trian"], ["schema"]]
)
def test_what_needs_no_model_loads_no_torch(arguments):
    done = python(
        "-c",
        "import sys\nfrom orpo_cli import cli\n"
        f"sys.argv = ['orpo', *{arguments!r}]\ncode = cli._exit_code()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], code)",
    )
    assert done.stdout.splitlines()[-1] == f"[] {2 if arguments in (['train'], ['trian']) else 0}", done.stderr


def test_help_costs_no_more_than_half_again_the_libraries_it_is_made_of():
    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        assert python(*arguments).returncode == 0
        return time.perf_counter() - start

    # In turns, and the best of each: a machine that is busy slows both.
    turns = [(seconds("-m", "orpo_cli", "--help"), seconds("-c", "import typer, pydantic, yaml")) for _ in range(7)]
    ours, theirs = map(min, zip(*turns, strict=True))
    assert ours <= 1.5 * theirs


def test_a_recipe_is_validated_without_torch(tiny_recipe):
    done = python(
        "-c",
        "import sys\nfrom orpo_cli.recipe import load_recipe\n"
        f"load_recipe({str(tiny_recipe())!r})\nprint([name for name in {HEAVY!r} if name in sys.modules])",
    )
    assert done.stdout == "[]\n", done.stderr


def test_the_module_is_the_command():
    command = shutil.which("orpo", path=Path(sys.executable).parent)
    assert command is not None
    for done in (
        python("-m", "orpo_cli", "--version"),
        subprocess.run([command, "--version"], capture_output=True, text=True),
    ):
        assert (done.returncode, done.stdout, done.stderr) == (0, f"orpo {__version__}\n", "")


def test_a_process_exits_with_the_code_of_its_error(tmp_path):
    done = python("-m", "orpo_cli", "train", str(tmp_path / os.devnull.strip("/")))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
