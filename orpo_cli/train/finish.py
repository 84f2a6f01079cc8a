"""What is written after the last step, and what came of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from orpo_cli.data.dataset import PairSet
from orpo_cli.errors import RunError
from orpo_cli.evaluate import pair_lines, skipped, summarise
from orpo_cli.files import require_space, to_json, to_json_lines, write_directory, write_file
from orpo_cli.merge import MEASURED_PAIRS, merge_trained, merged_bytes, save_model
from orpo_cli.metrics import read_metrics
from orpo_cli.model.build import Built, TextSide, set_stop_tokens
from orpo_cli.model.load import base_revision
from orpo_cli.model.lora import save_adapter
from orpo_cli.recipe import Recipe
from orpo_cli.report.evaluation import comparison
from orpo_cli.report.page import write_report
from orpo_cli.run import RunDirectory
from orpo_cli.terminal import say
from orpo_cli.train.checkpoint import checkpoint_of, delete_surplus, fault, load_weights
from orpo_cli.train.display import diagnosis
from orpo_cli.train.resume import put_weights
from orpo_cli.train.state import Run


def load_best(run: RunDirectory, loop: Run, built: Built) -> int:
    """Put the best checkpoint's weights in place of the last ones, where the recipe asks for that and they differ.

    Returns the step that the model's weights are of. Raises RunError if that checkpoint is not there whole.
    """
    section, last, best = loop.recipe.train, loop.progress.step, loop.progress.best_step
    if not section.load_best_model_at_end or best is None or best == last:
        return last
    checkpoint = checkpoint_of(run.checkpoints, best)
    if (why := fault(checkpoint)) is not None:
        raise RunError(
            f"the best checkpoint, {checkpoint}, cannot be used: {why}",
            "put a copy of it back and --resume; or end with the last weights: --resume --allow-changes "
            "--set train.load_best_model_at_end=false",
        )
    put_weights(load_weights(checkpoint), built, checkpoint)
    loop.last_scores = None
    say(f"the weights are those of step {best}, the best by {section.metric_for_best_model}")
    return best


def finish(
    run: RunDirectory, loop: Run, text: TextSide, built: Built, held_out: PairSet | None, record: dict[str, Any]
) -> dict[str, Any]:
    """Adapter, held-out figures, merged weights, what the manifest can say only now, verdict; the held-out figures."""
    recipe, progress = loop.recipe, loop.progress
    # The last checkpoint has done so already, unless a kill came in between.
    delete_surplus(run.checkpoints, progress.step, keep=recipe.train.save_total_limit, protect=progress.best_step)
    assert loop.metrics is not None
    loop.metrics.sync()
    if isinstance(built.model, PeftModel):
        write_directory(run.adapter, lambda directory: write_adapter(directory, built, text, recipe))
        say(f"adapter: {run.adapter}")
    figures: dict[str, Any] = {}
    if held_out is not None:
        scores = loop.last_scores
        assert scores is not None
        figures = {**summarise(scores, loop.held_out, recipe.loss), "skipped": skipped(held_out)}
        write_file(run.eval_pairs, to_json_lines(pair_lines(scores, loop.held_out)))
        write_file(run.eval, to_json(figures))
    if recipe.lora is None or recipe.output.merge:
        require_space(run.merged, merged_bytes(built.base), "the merged model")
    if recipe.lora is None:
        write_directory(run.merged, lambda directory: save_model(built.base, text, recipe.model, directory))
    elif recipe.output.merge:
        pairs = loop.held_out[:MEASURED_PAIRS] or [loop.train_set.first()]
        gaps: list[dict[str, Any]] = []
        write_directory(
            run.merged,
            lambda directory: gaps.append(
                merge_trained(built, text, recipe.model, run.adapter, directory, pairs, loop.max_tokens)
            ),
        )
        if gaps[0]:
            record["merge"] = gaps[0]
    record["steps"] = loop.total_steps  # fewer where it stopped early
    record["data"]["train"] = loop.train_set.summary()  # a stream is counted while it is read
    write_file(run.manifest, to_json(record))
    write_report([run.path])
    verdict(run, loop, figures)
    return figures


def write_adapter(directory: Path, built: Built, text: TextSide, recipe: Recipe) -> None:
    """The adapter with all that is needed to use it: tokenizer, template, and the ids that stop generation."""
    assert isinstance(built.model, PeftModel)
    revision = base_revision(recipe.model) or recipe.model.revision
    save_adapter(built.model, directory, base=recipe.model.name_or_path, revision=revision)
    text.tokenizer.save_pretrained(directory)
    set_stop_tokens(built.base, text)
    built.base.generation_config.save_pretrained(directory)


def verdict(run: RunDirectory, loop: Run, figures: dict[str, Any]) -> None:
    """Held-out figures before and after, and how to use what was made."""
    if figures:
        rows = [row for row in read_metrics(run.metrics) if "eval_loss" in row]
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
    for line in diagnosis(loop.health):
        say(line)
    say(f"report: {run.report}")
    say()
    if run.merged.exists():
        say("use it:")
        say(f'  transformers  AutoModelForCausalLM.from_pretrained("{run.merged}")')
        say(f"  vLLM          vllm serve {run.merged}")
        say(
            f"  llama.cpp     python convert_hf_to_gguf.py {run.merged} --outfile model.gguf && llama-cli -m model.gguf"
        )
    elif run.adapter.exists():
        say(f"use it:  orpo merge {run.path}  writes full weights for transformers, vLLM and llama.cpp")
