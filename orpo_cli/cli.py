"""The command `orpo`: parse, call one function, print. Nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer

from orpo_cli import __version__
from orpo_cli.errors import InputError, OrpoError, RunError, Stopped, is_out_of_memory, signal_exit_code
from orpo_cli.help import GroupedVerbs
from orpo_cli.malloc import keep_few_kernels

app = typer.Typer(
    name="orpo",
    cls=GroupedVerbs,
    help="Preference-align a language model in one stage: one YAML recipe, one command, ORPO (arXiv 2403.07691).",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The headings of `orpo --help`.
START, TRAIN, USE, TOOLS = "Start", "Train", "Judge and use", "Around it"

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of the recipe; may be given repeatedly."),
]
OutputDir = Annotated[str | None, typer.Option("--output-dir", metavar="DIR", help="Override output.dir.")]


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Options of the command itself."""
    if version:
        typer.echo(f"orpo {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(InputError.exit_code)


@app.command(rich_help_panel=START)
def init(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A starter recipe; none: list them.")] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="A recipe of axolotl, LLaMA-Factory, TRL or alignment-handbook."),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write.")] = Path(
        "recipe.yaml"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
) -> None:
    """List the starter recipes, or write one to edit: a starter, or another tool's recipe made ours."""
    from orpo_cli import init as recipes

    if name is not None and from_ is not None:
        raise InputError("a starter recipe and --from were both given", "give one of them")
    if from_ is not None:
        for line in recipes.write_converted(from_, output, overwrite=overwrite):
            typer.echo(line, err=True)
        typer.echo(output)
    elif name is not None:
        recipes.write_recipe(recipes.starter(name), output, overwrite=overwrite)
        typer.echo(output)
    else:
        for known, purpose in recipes.starters().items():
            typer.echo(f"{known}\n    {purpose}")


@app.command(rich_help_panel=START)
def demo(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to work.")] = Path("orpo-demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a demo that is there.")] = False,
) -> None:
    """The whole way on a tiny base and data that it makes itself; needs no network."""
    from orpo_cli.demo import demo as run_demo

    run_demo(directory, overwrite=overwrite)


@app.command(rich_help_panel=START)
def data(
    recipe: RecipeFile,
    set_: Set = None,
    output_dir: OutputDir = None,
    pairs: Annotated[int, typer.Option(min=0, metavar="N", help="Show so many pairs, token by token.")] = 2,
    row: Annotated[
        list[int] | None, typer.Option(metavar="INDEX", help="Only the pair at this row; may be given repeatedly.")
    ] = None,
    held_out: Annotated[bool, typer.Option("--held-out", help="Pairs of the held-out set instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: every pair as an object, one a line.")] = False,
    summary: Annotated[
        bool, typer.Option("--summary", help="No pairs; with --json, the figures as an object.")
    ] = False,
) -> None:
    """Inspect the preference data: what is kept, what is dropped and why, how long it is, what may be wrong with it."""
    from orpo_cli.recipe import load_recipe

    resolved = load_recipe(recipe, _overrides(set_, output_dir))
    from orpo_cli import inspect, terminal
    from orpo_cli.files import to_json, to_json_lines
    from orpo_cli.report import findings

    opened = inspect.open_data(resolved)
    chosen = opened.held_out if held_out else opened.training
    if chosen is None:
        raise InputError("--held-out: the recipe has no held-out data", "set data.eval")
    shown = (inspect.pair_at(chosen, index) for index in row) if row else inspect.kept_pairs(chosen)
    if as_json and not summary:
        for pair in shown:
            typer.echo(to_json_lines([inspect.pair_object(pair)]), nl=False)
        return
    if not row:
        figures = inspect.summarise(opened)
        if as_json:
            typer.echo(to_json(figures), nl=False)
        else:
            findings.show(figures)
        for warning in figures["warnings"]:
            terminal.warn(terminal.visible(warning))
    if not summary:
        for pair in islice(shown, None if row else pairs):
            findings.show_pair(
                chosen.reader.where(pair.index), inspect.pair_pieces(pair, opened.text, resolved.loss.nll_tokens)
            )


@app.command(rich_help_panel=TRAIN)
def check(
    recipe: RecipeFile,
    set_: Set = None,
    output_dir: OutputDir = None,
    probe: Annotated[bool, typer.Option("--probe", help="Load the model too, and time a few steps.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """What a recipe comes to, with no weights loaded: every key, data, steps, memory by part, disk."""
    from orpo_cli.recipe import dump_recipe, load_recipe

    resolved = load_recipe(recipe, _overrides(set_, output_dir))
    if not as_json:
        typer.echo(dump_recipe(resolved), nl=False)
    from orpo_cli import plan
    from orpo_cli.files import to_json

    figures = plan.check(resolved, probe=probe)
    if as_json:
        typer.echo(to_json({"recipe": resolved.model_dump(mode="json"), **figures}), nl=False)
    else:  # as comments, so that what is printed is a recipe still
        for line in plan.lines(resolved, figures):
            typer.echo(f"# {line}")
    plan.require_fit(figures)


@app.command(rich_help_panel=TRAIN)
def train(
    recipe: RecipeFile,
    set_: Set = None,
    output_dir: OutputDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest sound checkpoint, if any.")] = False,
    resume_from: Annotated[Path | None, typer.Option(metavar="PATH", help="Go on from this checkpoint.")] = None,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Go on although something differs that may change the result.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that the directory holds.")] = False,
) -> None:
    """Train, save adapters and merged weights, evaluate on the held-out set."""
    if overwrite and (resume or resume_from):
        raise InputError("--overwrite and --resume contradict each other", "give one of them")
    from orpo_cli.recipe import load_recipe

    resolved = load_recipe(recipe, _overrides(set_, output_dir))
    from orpo_cli.train import run

    run.train(
        resolved,
        run.Start(
            resume=resume,
            resume_from=resume_from,
            allow_changes=allow_changes,
            overwrite=overwrite,
            command=tuple(sys.argv),
        ),
    )


@app.command(rich_help_panel=TRAIN)
def sweep(
    recipe: RecipeFile,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="SECTION.KEY=V1,V2,...", help="Values to try, or one to keep; may be given repeatedly."
        ),
    ] = None,
    output_dir: OutputDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep that the directory holds.")] = False,
    metric: Annotated[
        Literal["accuracy", "log_odds_ratio", "chosen_perplexity"], typer.Option(help="What the best has most of.")
    ] = "accuracy",
    tolerance: Annotated[
        float,
        typer.Option(min=0, metavar="SHARE", help="How far above the lowest the best's chosen perplexity may be."),
    ] = 0.1,
    samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="Held-out prompts to answer, to see whether answers end.")
    ] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="The longest answer.")] = 256,
) -> None:
    """A run for each point of a grid, judged on the held-out set: a table on stderr, JSON on stdout."""
    from orpo_cli import sweep as grid
    from orpo_cli.files import to_json
    from orpo_cli.report.sweep import show

    judging = grid.Judging(metric, samples, max_new_tokens, tolerance)
    summary = grid.sweep(recipe, set_ or [], output_dir=output_dir, resume=resume, judging=judging)
    typer.echo(to_json(summary), nl=False)
    show(summary)
    if failed := [run["run"] for run in summary["runs"] if run["state"] == "failed"]:
        raise RunError(f"of {len(summary['runs'])} runs failed: {', '.join(failed)}", "--resume tries them again")


@app.command("eval", rich_help_panel=USE)
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter, or a model.")],
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Hub id, file, glob or directory; else the run's held-out set.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="RECIPE", help="How to read, render and score; a run knows its own.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write figures to FILE, each pair's beside it.")
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC=X", help="Exit with 1 if a figure is below X; may be given repeatedly."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare with another run, adapter or model, pair by pair.")
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN", help="Figures for each value of a column too; may be given repeatedly."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Answer N of the prompts, and show them side by side.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="A reward model that judges the answers (to all prompts without --samples)."
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the answers as AlpacaEval reads them (all without --samples)."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="The longest answer.")] = 256,
) -> None:
    """Held-out metrics of a run, an adapter or any model: JSON on stdout, a table on stderr."""
    from orpo_cli.files import to_json

    thresholds = [_threshold(text) for text in fail_under or []]
    for option, file in (("--output", output), ("--answers", answers)):
        if file is not None and (file.is_dir() or not file.parent.is_dir()):
            raise InputError(f"{option} {file}: no file can be written there", "name a file in a directory that exists")
    from orpo_cli.evaluate import Extras, evaluate_target, figure_names
    from orpo_cli.report import evaluation

    extras = Extras(base, tuple(by or ()), samples, judge, answers, max_new_tokens)
    names = figure_names(extras) if thresholds else set()
    for metric, _ in thresholds:
        if metric.split(".")[0] not in names:
            raise _no_figure(metric, names)
    figures = evaluate_target(target, data=data, recipe_file=recipe, output=output, extras=extras)
    typer.echo(to_json(figures), nl=False)
    evaluation.show(figures)
    for metric, least in thresholds:
        value = _figure(figures, metric)
        if not isinstance(value, int | float):
            raise _no_figure(metric, figures)
        if not value >= least:
            raise RunError(f"{metric} is {value:.4g}, below {least:g}")


@app.command(rich_help_panel=USE)
def merge(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run, or an adapter's directory.")],
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to write; else `merged` beside it.")] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base, if not the one the adapter names.")
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help="Of the weights that are written.")
    ] = "auto",
) -> None:
    """Merge adapters into full weights that stock transformers loads."""
    from orpo_cli.merge import merge_target

    typer.echo(merge_target(target, output=output, base=base, dtype=dtype))


@app.command(rich_help_panel=USE)
def generate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter, or a model.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A prompt; may be given repeatedly. Else each line of stdin is one."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base, if not the one the adapter names.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="The longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, metavar="T", help="Above 0: draw tokens; 0: the likeliest.")] = 0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of what is drawn.")] = 42,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object an answer, for programs.")] = False,
) -> None:
    """Answers, rendered as in training; a chat on a terminal."""
    from orpo_cli.files import to_json_lines
    from orpo_cli.generate import Sampling, load_speaker, typed_lines, written_lines

    speaker = load_speaker(target, base=base, sampling=Sampling(max_new_tokens, temperature), seed=seed)

    def show(piece: str) -> None:
        typer.echo(piece, nl=False)

    if prompt is None and sys.stdin.isatty():
        for _ in speaker.chat(typed_lines(), show):
            typer.echo()
        return
    for text in prompt or written_lines(sys.stdin):
        answer, ended = speaker.answer(text, None if as_json else show)
        typer.echo(
            to_json_lines([{"prompt": text, "answer": answer, "ended": ended}]) if as_json else "", nl=not as_json
        )


@app.command(rich_help_panel=USE)
def runs(
    directories: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="Where to look, at any depth; else runs/.")
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(metavar="FIGURE", help="Best first: accuracy, log_odds_ratio, loss, ...; else by path."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
) -> None:
    """The runs below a directory: what became of each, and its held-out figures."""
    from orpo_cli import runs as overview
    from orpo_cli.files import to_json

    found = overview.list_runs(directories or [Path("runs")], sort)
    if as_json:
        typer.echo(to_json(found), nl=False)
    elif found:
        typer.echo(overview.table(found))
    else:
        typer.echo("no runs", err=True)


@app.command(rich_help_panel=USE)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run, or several to compare.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Where to write; else report.html in the run."),
    ] = None,
) -> None:
    """One self-contained HTML page a run, or a comparison of several."""
    from orpo_cli.report.page import write_report

    typer.echo(write_report(runs, output))


@app.command(rich_help_panel=TOOLS)
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="A page for people instead, docs/recipe.md.")] = False,
) -> None:
    """JSON Schema of the recipe, for editors."""
    from orpo_cli.recipe import reference

    typer.echo(reference.markdown() if markdown else json.dumps(reference.json_schema(), indent=2), nl=not markdown)


@app.command(rich_help_panel=TOOLS)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """What this machine has for training, tried out, and how to get what is missing."""
    from orpo_cli import doctor as examination
    from orpo_cli.files import to_json

    findings = list(examination.examine())
    typer.echo(to_json(examination.as_json(findings)) if as_json else examination.report(findings), nl=not as_json)
    if examination.fails(findings):
        raise typer.Exit(RunError.exit_code)


def main() -> None:
    """Run the command line; exit codes: 0 done, 1 failed, 2 wrong input, 130 or 143 stopped by a signal."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    keep_few_kernels()
    sys.exit(_exit_code())


# What the machine refuses, not the program: full or read-only disks, missing rights.
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def _exit_code() -> int:
    try:
        return app(standalone_mode=False, prog_name="orpo") or 0
    except Stopped as stopped:
        from orpo_cli.terminal import say

        say(stopped.message)
        return stopped.exit_code
    except OrpoError as error:
        _print_error(error.message, error.hint)
        return error.exit_code
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "orpo"
        _print_error(error.format_message().replace(": Value error, ", ": "), f"{command} --help says what it takes")
        return InputError.exit_code
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return RunError.exit_code
    except OSError as error:
        hint = "a run goes on with --resume once it is mended" if error.errno in _REFUSALS else None
        _print_error(f"{error.filename or 'input or output'}: {error.strerror or error}", hint)
        return RunError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _print_error(
            "out of memory",
            "lower train.max_tokens_per_microbatch where the recipe names a number, lower data.max_length, or set "
            "model.load_in_4bit: true",
        )
        return RunError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _print_error("interrupted", None)
        return signal_exit_code(signal.SIGINT)


def _print_error(message: str, hint: str | None) -> None:
    from orpo_cli.terminal import print_error

    print_error(message, hint)


def _threshold(text: str) -> tuple[str, float]:
    metric, equals, least = text.partition("=")
    try:
        number = float(least if metric and equals else "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"--fail-under {text}: not METRIC=X", "for instance --fail-under accuracy=0.8")
    return metric, number


def _no_figure(metric: str, known: Iterable[str]) -> InputError:
    return InputError(f"--fail-under: there is no figure {metric}", f"there are {', '.join(sorted(known))}")


def _figure(figures: object, name: str) -> object:
    """The figure of a name, a dot reaching into nested ones; None where there is none."""
    for key in name.split("."):
        figures = figures.get(key) if isinstance(figures, dict) else None
    return figures


def _overrides(set_: list[str] | None, output_dir: str | None) -> list[str]:
    return [*(set_ or []), *([f"output.dir={json.dumps(output_dir)}"] if output_dir is not None else [])]
