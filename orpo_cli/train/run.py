"""`orpo train`: prepare data and model, run the loop, save, evaluate, merge, say what came of it."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from orpo_cli import __version__
from orpo_cli.data.dataset import PairSet, load_pairs
from orpo_cli.data.order import Position
from orpo_cli.errors import InputError, ModelError, RunError, is_out_of_memory
from orpo_cli.evaluate import pair_lines, skipped, summarise
from orpo_cli.files import require_space, to_json, to_json_lines, write_directory, write_file
from orpo_cli.generate import answers
from orpo_cli.inspect import pair_pieces
from orpo_cli.malloc import keep_freed_memory
from orpo_cli.merge import MEASURED_PAIRS, merge_trained, merged_bytes, save_model
from orpo_cli.model.build import (
    Built,
    TextSide,
    build_for_training,
    check_max_length,
    load_text_side,
    pair_tokenizer,
    set_stop_tokens,
)
from orpo_cli.model.load import base_content, base_revision
from orpo_cli.model.lora import save_adapter
from orpo_cli.model.memory import Needs, Plan, checkpoint_layers, choose_plan, device_memory, process_memory
from orpo_cli.recipe import Recipe, dump_recipe
from orpo_cli.redact import redact
from orpo_cli.report.health import Health
from orpo_cli.report.metrics import MetricsFile, read_metrics, whole_rows
from orpo_cli.report.page import write_report
from orpo_cli.report.terminal import comparison, diagnosis, first_pair, mute, say, warn
from orpo_cli.run import RunDirectory, check_unchanged, read_manifest
from orpo_cli.signals import Noted, last_words
from orpo_cli.train.checkpoint import (
    check_sound,
    checkpoint_of,
    delete_surplus,
    fault,
    load_checkpoint,
    load_weights,
    newest_sound,
    read_state,
    recover_checkpoints,
    save_checkpoint,
)
from orpo_cli.train.distributed import Processes, seed_everything
from orpo_cli.train.evaluation import patience_is_over, score_together
from orpo_cli.train.loop import train_steps
from orpo_cli.train.optimizer import Optimizer, check_optimizer
from orpo_cli.train.rehearsal import longest_pairs, rehearse
from orpo_cli.train.state import Progress, Run


@dataclass(frozen=True)
class Start:
    """How a run is to be started, as the command line says."""

    resume: bool = False
    resume_from: Path | None = None
    allow_changes: bool = False
    """Go on although something differs that may change the result."""
    overwrite: bool = False
    command: tuple[str, ...] = ()


def train(recipe: Recipe, start: Start | None = None) -> dict[str, Any]:
    """Train as the recipe says and write the run directory; the held-out figures, empty without a held-out set.

    Raises InputError kinds for what is the user's to mend, RunError for a run gone bad, Stopped after a signal.
    """
    start = start or Start()
    processes = Processes()
    mute(not processes.is_main)
    run = RunDirectory(Path(recipe.output.dir))
    check_optimizer(recipe.train, processes.device)
    resumes = start.resume or start.resume_from is not None
    if start.allow_changes and not resumes:
        raise InputError("--allow-changes says how to go on with a run", "give --resume or --resume-from too")
    with run.claimed(resume=resumes, overwrite=start.overwrite) if processes.is_main else nullcontext():
        if processes.is_main:
            recover_checkpoints(run.checkpoints)
        processes.wait()
        return train_in(run, recipe, start, processes)


def train_in(run: RunDirectory, recipe: Recipe, start: Start, processes: Processes) -> dict[str, Any]:
    """Train in a directory that is this run's alone; as `train`."""
    make_deterministic(processes.device)
    if processes.device.type == "cpu":
        keep_freed_memory()

    text = load_text_side(recipe)
    check_max_length(recipe.model, recipe.data.max_length)
    train_set, held_out = load_pairs(recipe.data, pair_tokenizer(recipe, text), recipe.train, say)
    describe_data(train_set, held_out, text, recipe)
    record = facts(recipe, start, processes, text, train_set, held_out)
    checkpoint = find_checkpoint(run, start.resume_from) if start.resume or start.resume_from else None
    if checkpoint is not None:
        record["resumed"] = resumptions(run, recipe, checkpoint, record, allow=start.allow_changes)

    seed_everything(recipe.train.seed)
    beside = process_memory(processes.device)
    built = build_for_training(recipe, text, processes.device)
    optimizer = Optimizer(built.model.named_parameters(), recipe.train)
    progress, total_steps = Progress(), train_set.total_steps(recipe.train)
    if checkpoint is not None:
        progress = restore(checkpoint, built, optimizer)
        if progress.step > total_steps:
            raise InputError(
                f"{checkpoint} lies behind the recipe's {total_steps:,} steps",
                "raise train.max_steps or num_train_epochs, or name an earlier one with --resume-from",
            )
        if patience_is_over(progress, recipe):  # it had stopped early
            total_steps = progress.step
    available = -processes.largest(-device_memory(processes.device))  # the smallest of all processes' devices
    needs = needs_of(recipe, built, train_set)
    plan = dataclasses.replace(plan_memory(recipe, needs, progress, processes.device, available), process=beside)
    progress.max_tokens, progress.checkpointed_layers = plan.max_tokens, plan.checkpointed_layers
    checkpoint_layers(built.base, plan.checkpointed_layers)
    record |= of_model(record, built, plan) | {"steps": total_steps}
    if processes.is_main:
        if start.overwrite:
            run.clear()
        parts = [checkpoint_bytes(recipe, built, optimizer), final_bytes(recipe, built)]
        needed = sum(parts) if checkpoint is None else max(parts)  # the next checkpoint takes the place of an old one
        require_space(run.path, needed, "the run")
        write_file(run.manifest, to_json(record))  # first: it says if the recipe is another than before
        write_file(run.recipe, dump_recipe(recipe))

    scaler = torch.amp.GradScaler(processes.device.type, enabled=built.base.dtype == torch.float16)
    if progress.loss_scale:
        scaler.load_state_dict(progress.loss_scale)
    loop = Run(
        recipe=recipe,
        processes=processes,
        logprobs=built.logprobs,
        optimizer=optimizer,
        scaler=scaler,
        train_set=train_set,
        held_out=held_out.in_source_order() if held_out else [],
        total_steps=total_steps,
        max_tokens=plan.max_tokens,
        progress=progress,
        metrics=MetricsFile(run.metrics, progress.metrics_length) if processes.is_main else None,
        samples=MetricsFile(run.samples, progress.samples_length)
        if processes.is_main and recipe.train.sample_prompts
        else None,
        answer=lambda prompts: answers(built.base, text, prompts, system=recipe.data.system),
        without_adapter=built.model.disable_adapter if isinstance(built.model, PeftModel) else None,
        save=lambda: save(run, recipe, built, optimizer, progress) if processes.is_main else None,
        health=Health(recipe.loss.beta, total_steps),
    )
    if loop.metrics is not None:  # on the disk the file is as long now as it was at the checkpoint
        for row in read_metrics(run.metrics):
            loop.health.see(row)
    describe_run(loop, built, plan)
    words = "--resume goes on from the newest checkpoint, if there is one"
    with out_of_memory_explained(loop), files_closed(loop), last_words(words):
        rehearse(loop)
        train_steps(loop)
        record["weights_of_step"] = load_best(run, loop, built)
        if loop.held_out and loop.last_scores is None:  # resumed after its last step, or with other weights than those
            loop.last_scores = score_together(loop, Noted())
        figures = finish(run, loop, text, built, held_out, record) if processes.is_main else {}
    processes.close()
    return figures


@contextmanager
def files_closed(run: Run) -> Iterator[None]:
    """Close what the loop appends to, however it ends."""
    try:
        yield
    finally:
        for file in (run.metrics, run.samples):
            if file is not None:
                file.close()


@contextmanager
def out_of_memory_explained(run: Run) -> Iterator[None]:
    """Say what to change when memory runs out in the loop."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory with {run.max_tokens:,} tokens at once; the last checkpoint is sound",
            "these change nothing but rounding, so that --resume goes on: a lower train.max_tokens_per_microbatch "
            "(down to the longest pair), model.gradient_checkpointing: true",
        ) from error


def needs_of(recipe: Recipe, built: Built, train_set: PairSet) -> Needs:
    """What training takes with pairs as long as the set's longest."""
    longest = longest_pairs(built.logprobs, train_set, recipe.data.max_length)[0]
    side = max(len(longest.chosen_ids), len(longest.rejected_ids))
    return Needs.of(built.logprobs, side, recipe.train.optimizer, longest_pair=built.logprobs.tokens(longest))


def plan_memory(recipe: Recipe, needs: Needs, progress: Progress, device: torch.device, available: int) -> Plan:
    """How the run uses its device: as the recipe says; for `auto` as the run has gone so far, else as it fits."""
    budget, checkpointing = recipe.train.max_tokens_per_microbatch, recipe.model.gradient_checkpointing
    layers = progress.checkpointed_layers if checkpointing == "auto" else needs.layers if checkpointing else 0
    if checkpointing is True and not needs.layers:
        raise ModelError(
            f"{recipe.model.name_or_path} has no layers that could be checkpointed",
            "set model.gradient_checkpointing: auto",
        )
    return choose_plan(
        needs,
        device,
        available,
        longest_pair=needs.longest_pair,
        pairs=recipe.train.batch_size,
        # Forward and backward take the same time, the weights' gradients as much again.
        recomputed=1 / 3 if recipe.lora is None else 1 / 2,
        max_tokens=progress.max_tokens if budget == "auto" else budget,
        checkpointed_layers=layers,
    )


def make_deterministic(device: torch.device) -> None:
    """On a CPU, the same recipe gives the same bytes; on a GPU some kernels add in an order of their own."""
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        # A debugging aid that comes along and costs a seventh of the time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


# ---- what is said before the first step ----


def describe_data(train_set: PairSet, held_out: PairSet | None, text: TextSide, recipe: Recipe) -> None:
    """Say which pairs are used, which are not and why, and show the first one token by token."""
    for name, pairs in (("training", train_set), ("held-out", held_out)):
        if pairs is None:
            continue
        size = "a stream, not counted" if pairs.pairs is None else f"{pairs.pairs:,} pairs of {pairs.rows:,} rows"
        formats = ", ".join(dict.fromkeys(f"{s.format.name} ({s.format.why})" for s in pairs.reader.sources))
        say(f"{name} data: {size}; format {formats}")
        if pairs.truncated:
            say(f"  truncated {pairs.truncated:,} of them to fit (data.overlong: {recipe.data.overlong})")
        for line in pairs.drop_lines():
            say(f"  dropped {line}")
        if pairs.dropped_share > recipe.data.max_dropped / 10:
            warn(f"{pairs.dropped_share:.0%} of the rows were dropped; above {recipe.data.max_dropped:.0%} is an error")
    template = text.template
    say(f"template: {template.name}, a turn ends with {template.end_of_turn}")
    if text.added_tokens:
        say(f"  tokens added to the vocabulary: {' '.join(text.added_tokens)}")
    first_pair(pair_pieces(train_set.first(), text, recipe.loss.nll_tokens))


def describe_run(run: Run, built: Built, plan: Plan) -> None:
    """Say what is trained, how, and in how many steps."""
    recipe, section = run.recipe, run.recipe.train
    trained = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
    total = built.base.num_parameters()  # a 4-bit weight counts as what it stands for
    how = "full fine-tune" if recipe.lora is None else "LoRA"
    bits = "4-bit" if recipe.model.load_in_4bit else "8-bit" if recipe.model.load_in_8bit else str(built.base.dtype)[6:]
    say(
        f"model: {recipe.model.name_or_path}, {bits}, on {run.processes.device}; {how}, "
        f"{trained:,} of {total:,} parameters trained"
    )
    if built.trained_rows:
        say(f"  {len(built.trained_rows)} embedding rows are trained too; new or untrained ones start at the mean")
    if built.fitness.remark:
        say(f"  {built.fitness.remark}")
    say(
        f"training: {run.total_steps:,} steps of {section.batch_size} pairs, peak learning rate "
        f"{recipe.peak_learning_rate:.3g} ({section.lr_scheduler_type}), beta {recipe.loss.beta}, "
        f"NLL over {recipe.loss.nll_tokens} tokens, mean by {recipe.loss.nll_reduction}"
    )
    say(f"memory: {plan}")
    if not plan.fits:
        warn(f"this is more than the device has, by estimate; what would help: {in_words(savings(recipe))}")
    if run.progress.step:
        say(f"going on after step {run.progress.step}")


def savings(recipe: Recipe) -> dict[str, Any]:
    """Keys and values that need less memory than the recipe's, the cheapest first."""
    found: dict[str, Any] = {}
    if recipe.train.max_tokens_per_microbatch != "auto":
        found["train.max_tokens_per_microbatch"] = "auto"
    if recipe.model.gradient_checkpointing is False:
        found["model.gradient_checkpointing"] = "auto"
    if recipe.lora is None:
        if recipe.train.optimizer == "adamw":
            found["train.optimizer"] = "adamw_8bit"
        found["lora"] = {}
    if not (recipe.model.load_in_4bit or recipe.model.load_in_8bit):
        found["model.load_in_4bit"] = True
    return found | {"data.max_length": recipe.data.max_length // 2}


def in_words(changes: dict[str, Any]) -> str:
    """Changes as a person would write them into a recipe."""
    return ", ".join(
        "an adapter instead of all weights (without lora: null)" if key == "lora" else f"{key}: {json.dumps(value)}"
        for key, value in changes.items()
    ).replace('"', "")


def facts(
    recipe: Recipe, start: Start, processes: Processes, text: TextSide, train_set: PairSet, held_out: PairSet | None
) -> dict[str, Any]:
    """What the manifest says before the model is loaded: versions, device, command line, seed, base, data."""
    device = processes.device
    packages = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "tokenizers")
    return {
        "command": redact(shlex.join(start.command)),
        "versions": {"orpo": __version__, "python": platform.python_version()} | {p: version(p) for p in packages},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() or device.type,
        "device_type": device.type,
        "processes": processes.count,
        "threads": torch.get_num_threads(),
        "seed": recipe.train.seed,
        "base": {
            "name_or_path": recipe.model.name_or_path,
            "revision": base_revision(recipe.model),
            "content": base_content(recipe.model),
        },
        "fingerprints": text.fingerprints(),
        "template": {
            "name": text.template.name,
            "end_of_turn": text.template.end_of_turn,
            "added_tokens": text.added_tokens,
        },
        "learning_rate": recipe.peak_learning_rate,
        "data": {"train": train_set.summary(), "eval": held_out.summary() if held_out else None},
        "resumed": [],
    }


def of_model(record: dict[str, Any], built: Built, plan: Plan) -> dict[str, Any]:
    """What the manifest says besides when the model is loaded."""
    return {
        "base": record["base"] | {"dtype": str(built.base.dtype).removeprefix("torch.")},
        "template": record["template"] | {"trained_rows": built.trained_rows},
        "shared_prefix": built.fitness.not_shared is None,
        "max_tokens_per_microbatch": plan.max_tokens,
        "memory": plan.summary(),
    }


# ---- checkpoints ----


def find_checkpoint(run: RunDirectory, named: Path | None) -> Path | None:
    """The checkpoint to go on from: the named one, else the newest sound one, None if there is none."""
    if named is not None:
        if not named.is_dir() or named.resolve().parent != run.checkpoints.resolve():
            raise InputError(f"{named} is no checkpoint of this run", f"they lie in {run.checkpoints}")
        check_sound(named)
        return named
    newest, damaged = newest_sound(run.checkpoints)
    if newest is None and damaged:
        raise InputError(
            f"no checkpoint of {run.path} is sound:\n" + "\n".join(f"  {line}" for line in damaged),
            "--overwrite begins anew in this directory, --output-dir in another; or put a copy of one back",
        )
    if newest is None and (run.adapter.exists() or run.merged.exists()):
        raise InputError(
            f"{run.path} holds a trained model and no checkpoint to go on from",
            "--overwrite begins anew in this directory, --output-dir in another",
        )
    for line in damaged:
        warn(f"passed over a damaged checkpoint: {line}")
    return newest


def resumptions(
    run: RunDirectory, recipe: Recipe, checkpoint: Path, record: dict[str, Any], *, allow: bool
) -> list[dict[str, Any]]:
    """What the manifest says of each time the run was gone on with, this one included: the step, and what differed.

    Raises InputError where something differs that may change the result, unless that is allowed.
    """
    state, lost = read_state(checkpoint), {}
    for path, length in ((run.metrics, state["metrics_length"]), (run.samples, state["samples_length"])):
        if (kept := whole_rows(path, length)) < length:
            lost[path.name] = {"before": f"{length:,} bytes", "now": f"{kept:,} of them"}
    entry = {"step": state["step"], **check_unchanged(run, recipe, record, lost, allow=allow)}
    return [*read_manifest(run).get("resumed", []), entry]


def checkpoint_bytes(recipe: Recipe, built: Built, optimizer: Optimizer) -> int:
    """What a checkpoint takes at least."""
    parameters = [p for p in built.model.parameters() if p.requires_grad or recipe.lora is None]
    state = sum(tensor.nbytes for tensor in optimizer.tensors().values())
    # Before the first step there are no moments yet: two for each number, of four bytes or of one.
    moments = sum(p.numel() for p in parameters if p.requires_grad) * (8 if recipe.train.optimizer == "adamw" else 2)
    return sum(p.nbytes for p in parameters) + max(state, moments)


def final_bytes(recipe: Recipe, built: Built) -> int:
    """What is written after the last step takes at least."""
    adapter = 0 if recipe.lora is None else sum(p.nbytes for p in built.model.parameters() if p.requires_grad)
    return adapter + (merged_bytes(built.base) if recipe.lora is None or recipe.output.merge else 0)


def save(run: RunDirectory, recipe: Recipe, built: Built, optimizer: Optimizer, progress: Progress) -> None:
    """Write the checkpoint of this step."""

    def write_weights(directory: Path) -> None:
        if isinstance(built.model, PeftModel):
            save_adapter(built.model, directory, base=recipe.model.name_or_path, revision=recipe.model.revision)
        else:
            save_file({n: p.detach() for n, p in built.model.named_parameters()}, directory / "model.safetensors")

    require_space(
        run.checkpoints, checkpoint_bytes(recipe, built, optimizer), f"the checkpoint of step {progress.step}"
    )
    save_checkpoint(
        run.checkpoints,
        progress.step,
        write_weights=write_weights,
        optimizer=optimizer.tensors(),
        state=dataclasses.asdict(progress),
        keep=recipe.train.save_total_limit,
        protect=progress.best_step,
    )


def restore(checkpoint: Path, built: Built, optimizer: Optimizer) -> Progress:
    """Load weights and optimizer from a checkpoint. Raises InputError if it is damaged or of another model."""
    weights, optimizer_tensors, state = load_checkpoint(checkpoint)
    put_weights(weights, built, checkpoint)
    try:
        optimizer.load_tensors(optimizer_tensors)
    except (KeyError, RuntimeError, AttributeError) as error:
        raise InputError(
            f"{checkpoint} holds the state of another optimizer", "train.optimizer must be that of the run"
        ) from error
    return Progress(**{**state, "position": Position(**state["position"])})


def put_weights(weights: dict[str, torch.Tensor], built: Built, checkpoint: Path) -> None:
    """Give the model the weights of a checkpoint. Raises InputError if they are those of another model."""
    adapted = isinstance(built.model, PeftModel)
    own = (
        get_peft_model_state_dict(built.model, save_embedding_layers=False)
        if adapted
        else dict(built.model.named_parameters())
    )
    if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in own.items()}:
        raise InputError(
            f"{checkpoint} holds other weights than are to be trained",
            "the recipe's base, lora section and template must be those of the run",
        )
    if adapted:
        set_peft_model_state_dict(built.model, weights)
    else:
        with torch.no_grad():
            for name, parameter in built.model.named_parameters():
                parameter.copy_(weights[name])


# ---- what is written after the last step ----


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
            f"the best checkpoint, {checkpoint}, is damaged: {why}",
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
