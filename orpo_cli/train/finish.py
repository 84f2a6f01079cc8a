"""What is written after the last step, and what came of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from orpo_cli.data.dataset import PairSet
from orpo_cli.errors import RunError
from orpo_cli.files import require_space, to_json, to_json_lines, write_directory, write_file
from orpo_cli.merge import MEASURED_PAIRS, merge_trained, merged_bytes, save_model
from orpo_cli.metrics import read_metrics
from orpo_cli.model.build import set_stop_tokens
from orpo_cli.model.load import base_revision
from orpo_cli.model.lora import save_adapter
from orpo_cli.report.evaluation import comparison
from orpo_cli.report.page import write_report
from orpo_cli.scores import pair_lines, skipped, summarise
from orpo_cli.terminal import say
from orpo_cli.train.checkpoint import checkpoint_of, delete_surplus, fault, load_weights
from orpo_cli.train.display import diagnosis
from orpo_cli.train.resume import put_weights
from orpo_cli.train.state import Run


def load_best(run: Run) -> int:
    """Put the best checkpoint's weights in place of the last ones, where the recipe asks for that and they differ.

    Returns the step that the model's weights are of. Raises RunError if that checkpoint is not there whole.
    """
    section, last, best = run.recipe.train, run.progress.step, run.progress.best_step
    if not section.load_best_model_at_end or best is None or best == last:
        return last
    checkpoint = checkpoint_of(run.directory.checkpoints, best)
    if (why := fault(checkpoint)) is not None:
        raise RunError(
            f"the best checkpoint, {checkpoint}, cannot be used: {why}",
            "put a copy of it back and --resume; or end with the last weights: --resume --allow-changes "
            "--set train.load_best_model_at_end=false",
        )
    put_weights(load_weights(checkpoint), run.built, checkpoint)
    run.last_scores = None
    say(f"the weights are those of step {best}, the best by {section.metric_for_best_model}")
    return best


def finish(run: Run, record: dict[str, Any]) -> dict[str, Any]:
    """Adapter, held-out figures, merged weights, what the manifest can say only now, verdict; the held-out figures."""
    recipe, directory, progress = run.recipe, run.directory, run.progress
    # The last checkpoint has done so already, unless a kill came in between.
    delete_surplus(directory.checkpoints, progress.step, keep=recipe.train.save_total_limit, protect=progress.best_step)
    assert run.metrics is not None
    run.metrics.sync()
    if recipe.lora is not None:
        write_directory(directory.adapter, lambda unfinished: fill_adapter(unfinished, run))
        say(f"adapter: {directory.adapter}")
    figures = {} if run.held_out_set is None else write_figures(run, run.held_out_set)
    if recipe.lora is None or recipe.output.merge:
        record |= write_merged(run)
    record["steps"] = run.total_steps  # fewer where it stopped early
    record["data"]["train"] = run.train_set.summary()  # a stream is counted while it is read
    write_file(directory.manifest, to_json(record))
    write_report([directory.path])
    verdict(run, figures)
    return figures


def fill_adapter(unfinished: Path, run: Run) -> None:
    """The adapter with all that is needed to use it: tokenizer, template, and the ids that stop generation."""
    base, model = run.recipe.model, run.built.model
    assert isinstance(model, PeftModel)
    save_adapter(model, unfinished, base=base.name_or_path, revision=base_revision(base) or base.revision)
    run.text.tokenizer.save_pretrained(unfinished)
    set_stop_tokens(run.built.base, run.text)
    run.built.base.generation_config.save_pretrained(unfinished)


def write_figures(run: Run, held_out: PairSet) -> dict[str, Any]:
    """The held-out figures, each pair's before those of all: where `eval.json` is, they are too."""
    scores = run.last_scores
    assert scores is not None
    figures = {**summarise(scores, run.held_out, run.recipe.loss), "skipped": skipped(held_out)}
    write_file(run.directory.eval_pairs, to_json_lines(pair_lines(scores, run.held_out)))
    write_file(run.directory.eval, to_json(figures))
    return figures


def write_merged(run: Run) -> dict[str, Any]:
    """The full weights; what the manifest says of a merge onto another base than was trained on."""
    built, text, section, directory = run.built, run.text, run.recipe.model, run.directory
    require_space(directory.merged, merged_bytes(built.base), "the merged model")
    gap: dict[str, Any] = {}

    def fill(unfinished: Path) -> None:
        if run.recipe.lora is None:
            save_model(built.base, text, section, unfinished)
        else:
            pairs = run.held_out[:MEASURED_PAIRS] or [run.train_set.first()]
            gap.update(merge_trained(built, text, section, directory.adapter, unfinished, pairs, run.max_tokens))

    write_directory(directory.merged, fill)
    return {"merge": gap} if gap else {}


def verdict(run: Run, figures: dict[str, Any]) -> None:
    """Held-out figures before and after, and how to use what was made."""
    directory = run.directory
    if figures:
        rows = [row for row in read_metrics(directory.metrics) if "eval_loss" in row]
        before = next((row for row in rows if row["step"] == 0), None)
        say()
        say(comparison(before, figures))
        if before is not None:
            gained = figures["accuracy"] - before["eval_accuracy"]
            low, high = figures["accuracy_ci95"]
            clear = low > before["eval_accuracy"] or high < before["eval_accuracy"]
            say(
                f"verdict: {gained:+.1%} accuracy on {figures['pairs']:,} held-out pairs, "
                f"{'beyond' if clear else 'within'} what chance would explain"
            )
    for line in diagnosis(run.health):
        say(line)
    say(f"report: {directory.report}")
    say()
    if directory.merged.exists():
        say("use it:")
        say(f'  transformers  AutoModelForCausalLM.from_pretrained("{directory.merged}")')
        say(f"  vLLM          vllm serve {directory.merged}")
        say(
            f"  llama.cpp     python convert_hf_to_gguf.py {directory.merged} --outfile model.gguf "
            "&& llama-cli -m model.gguf"
        )
    elif directory.adapter.exists():
        say(f"use it:  orpo merge {directory.path}  writes full weights for transformers, vLLM and llama.cpp")
