"""`orpo sweep`: one run for each point of a grid, all judged on the same held-out pairs, and the best of them named.

The rule, three steps of which none leaves nothing over:

1. Of the runs, those whose answers end: the share that ends by itself is at most a tenth below the highest.
2. Of these, those that still write what was chosen: a chosen perplexity at most a tenth (`tolerance`) above the lowest.
3. Of these, the one with the best figure. Runs whose paired difference from it is within chance (its bootstrap 95 %
   interval holds 0) tie with it, and of those that tie the one with the lowest chosen perplexity is the best.

Accuracy alone would not do: it rises with beta until the model collapses. Shapes: N held-out pairs.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orpo_cli.errors import InputError, Stopped
from orpo_cli.files import make_directory, to_json, write_file
from orpo_cli.metrics import read_metrics
from orpo_cli.recipe import Recipe, dump_recipe, load_recipe, strict_yaml
from orpo_cli.report.page import write_report
from orpo_cli.report.sweep import PAGE, section
from orpo_cli.report.trackers import check_trackers
from orpo_cli.run_directory import LOCK, RunDirectory, day_of, held, read_eval, read_manifest
from orpo_cli.runs import describe, is_running
from orpo_cli.signals import last_words, passed_on
from orpo_cli.statistics import interval, resampled_means, wilson
from orpo_cli.terminal import say, warn

METRICS = {"accuracy": True, "log_odds_ratio": True, "chosen_perplexity": False}
"""The figures that runs may be chosen by: whether higher is better."""
ENDED_TOLERANCE = 0.1
MAX_RUNS = 1000
_POLL = 0.5
_GO_ON = "--resume goes on with the sweep"

# A value of `--set`: quoted text and what stands in brackets keep their commas.
_TOKEN = re.compile(r"""(?<![^\s,\[{:])(?:'(?:[^']|'')*'|"(?:[^"\\]|\\.)*")|.""", re.DOTALL)


@dataclass(frozen=True)
class Judging:
    """How the runs are compared."""

    metric: str = "accuracy"
    prompts: int = 20
    """How many held-out prompts each run answers."""
    max_new_tokens: int = 256
    tolerance: float = 0.1
    """How much higher than the lowest a chosen perplexity may be, as a share of it."""


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    name: str
    """Of its directory, made of the keys that vary."""
    values: dict[str, Any]
    """The keys that vary, with its values."""
    recipe: Recipe
    """Without the sweep's own directory and savings."""

    def for_run(self, directory: Path) -> Recipe:
        """Its recipe within the sweep: nothing is merged, since most of it would be thrown away."""
        merge = self.recipe.output.merge and self.recipe.lora is None
        return _written_to(self.recipe, directory / self.name, merge=merge)


def _written_to(recipe: Recipe, directory: Path, *, merge: bool) -> Recipe:
    output = recipe.output.model_copy(update={"dir": str(directory), "merge": merge})
    return recipe.model_copy(update={"output": output})


# ---- the grid ----


def split_values(text: str) -> list[str]:
    """`0.1,0.2` -> both; commas within brackets, braces or quotes part nothing: `[q_proj, v_proj],all-linear` are two.

    Each is YAML. Text with commas is put in quotes.
    """
    parts, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth = max(0, depth + (token in "[{") - (token in "]}"))
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def grid(recipe_file: Path, settings: Sequence[str]) -> list[Point]:
    """A point for each combination of the values of `section.key=value,value,...`, the last key varying fastest.

    All of them are validated. Raises RecipeError as `load_recipe` does, InputError for a grid that is none.
    """
    choices = [(key, split_values(text)) for key, _, text in (setting.partition("=") for setting in settings)]
    axes = {key.strip(): values for key, values in choices if len(values) > 1}
    for key, values in axes.items():
        if key.startswith("output."):
            raise InputError(f"--set {key}: it cannot vary, since it changes no result", "name one value")
        if sum(other.strip() == key for other, _ in choices) > 1:
            raise InputError(f"--set {key} is given twice", "name all its values in one --set, parted by commas")
        if "" in values:
            raise InputError(f"--set {key}: there is no value beside one of the commas", "write null if it is meant")
    if not axes:
        raise InputError("nothing varies", "give a key several values, for instance --set loss.beta=0.01,0.1,0.2,0.5")
    if (count := math.prod(map(len, axes.values()))) > MAX_RUNS:
        raise InputError(f"the grid has {count:,} runs", f"vary less: it may have {MAX_RUNS:,}")
    points: dict[str, Point] = {}
    for chosen in itertools.product(*(values for _, values in choices)):
        pairs = list(zip((key.strip() for key, _ in choices), chosen, strict=True))
        overrides = [f"{key}={value}" if "=" in s else s for (key, value), s in zip(pairs, settings, strict=True)]
        recipe = load_recipe(recipe_file, overrides)
        varied = {key: strict_yaml.parse(value).value for key, value in pairs if key in axes}
        point = Point(run_name(varied), varied, recipe)
        if point.name in points:
            raise InputError(f"the run {point.name} is in the grid twice", "name each value once")
        if recipe.data.eval is None:
            raise InputError(
                "the recipe has no held-out pairs to judge the runs by",
                "set data.eval: {holdout: 0.02} in it, or add --set 'data.eval={holdout: 0.02}'",
            )
        points[point.name] = point
    return list(points.values())


def run_name(values: Mapping[str, Any]) -> str:
    """`{"loss.beta": 0.1, "lora.r": 16}` -> `beta-0.1_r-16`; where a file name should not hold that, with a hash."""
    last = [key.rpartition(".")[2] for key in values]
    keys = [key if last.count(short) > 1 else short for key, short in zip(values, last, strict=True)]
    texts = [value if isinstance(value, str) else json.dumps(value) for value in values.values()]
    text = "_".join(f"{key}-{value}" for key, value in zip(keys, texts, strict=True))
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.")
    return safe if safe == text and len(safe) <= 100 else f"{safe[:90]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# ---- the runs ----


def sweep(
    recipe_file: Path,
    settings: Sequence[str],
    *,
    output_dir: str | None = None,
    resume: bool = False,
    judging: Judging | None = None,
) -> dict[str, Any]:
    """Train and judge every point of the grid, one after the other, each in processes of its own; `sweep.json`'s value.

    A run that fails does not end the sweep. Raises InputError kinds for what is the user's to mend, Stopped after a
    signal.
    """
    judging = judging or Judging()
    points = grid(recipe_file, settings)
    check_trackers(points[0].recipe.output.trackers)  # those of all
    places = {point.recipe.output.dir for point in points} if output_dir is None else {output_dir}
    if len(places) > 1:
        raise InputError("each run of the grid would go to another directory", "name one with --output-dir")
    directory = Path(*places)
    summary_file = directory / "sweep.json"
    if RunDirectory(directory).holds_run():
        raise InputError(f"{directory} already holds a run", "name another directory with --output-dir")
    with held(directory / LOCK, directory), last_words(_GO_ON):
        if not resume and any(path.exists() for path in (summary_file, *(directory / p.name for p in points))):
            raise InputError(
                f"{directory} already holds a sweep", "--resume goes on with it, --output-dir names another directory"
            )
        before = _read_runs(summary_file, judging)
        runs: dict[str, dict[str, Any]] = {point.name: {"state": "waiting"} for point in points}
        for number, point in enumerate(points, 1):
            say(f"run {number} of {len(points)}: {point.name}")
            runs[point.name] = _run(directory, point, judging, before.get(point.name, {}))
            _check_same_pairs(directory, [name for name, run in runs.items() if run["state"] == "finished"])
            write_file(summary_file, to_json(_summary(directory, runs, judging)))
        summary = _summary(directory, runs, judging) | conclude(directory, runs, judging)
        if summary["best"] is not None:
            [best] = [point for point in points if point.name == summary["best"]["run"]]
            own = _written_to(best.recipe, directory / "best", merge=best.recipe.output.merge)
            write_file(directory / "best.yaml", dump_recipe(own.on_day(_day_begun(directory))))
        write_file(summary_file, to_json(summary))
        if finished := [directory / run["run"] for run in summary["runs"] if run["state"] == "finished"]:
            write_report(finished, directory / PAGE, opening=[section(summary)])
    return summary


def _run(directory: Path, point: Point, judging: Judging, known: Mapping[str, Any]) -> dict[str, Any]:
    """What is in `sweep.json` of a run, trained and judged if it is not yet; `known` is what an earlier sweep wrote."""
    run, recipe = RunDirectory(directory / point.name), point.for_run(directory).on_day(_day_begun(directory))
    entry: dict[str, Any] = {"set": point.values, "state": "failed"}
    if is_running(run):
        say(f"{run.path} is still written to: waiting for that to end")  # by the run of a sweep that was killed
        while is_running(run):
            time.sleep(_POLL)
    finished = _is_finished(run, recipe)
    if not finished:
        make_directory(directory)
        pinned = directory / f"{point.name}.yaml"  # the recipe may be edited while others run
        write_file(pinned, dump_recipe(recipe))
        code, _, _ = _orpo("train", str(pinned), "--resume")
        if code == InputError.exit_code:
            raise InputError(f"the run {point.name} was refused", f"mend what is said above; then {_GO_ON}")
        if code or not _is_finished(run, recipe):
            warn(f"the run {point.name} failed (exit code {code})")
            return entry
    if not (finished and {"prompts", "ended"} <= known.keys()):
        asked = ("--samples", str(judging.prompts), "--max-new-tokens", str(judging.max_new_tokens))
        code, out, said = _orpo("eval", str(run.path), *asked, read=True)
        if code:
            warn(f"the answers of {point.name} could not be had (exit code {code}):\n{said}")
            return entry
        answers = json.loads(out)["answers"]
        known = {"prompts": answers["prompts"], "ended": answers["model"]["ended"]}
    figures = read_eval(run)
    for name in METRICS:
        entry |= {name: figures[name], f"{name}_ci95": figures[f"{name}_ci95"]}
    prompts, ended = known["prompts"], known["ended"]
    interval_of_ended = list(wilson(round(ended * prompts), prompts))
    return entry | {"state": "finished", "prompts": prompts, "ended": ended, "ended_ci95": interval_of_ended}


def _day_begun(directory: Path) -> str | None:
    """The day that all runs' templates are told it is: the first run's, if it has begun and its template asks."""
    days = (day_of(RunDirectory(recipe.parent)) for recipe in sorted(directory.glob("*/recipe.yaml")))
    return next(filter(None, days), None)


def _is_finished(run: RunDirectory, recipe: Recipe) -> bool:
    """Whether the run is there with all that this recipe asks for, and was made by it."""
    if not run.holds_run() or describe(run)["state"] != "finished":
        return False
    own = load_recipe(run.recipe)  # the directory may be called by another name meanwhile
    asked = recipe.on_day(day_of(run))
    return _written_to(own, run.path, merge=own.output.merge) == _written_to(asked, run.path, merge=asked.output.merge)


def _orpo(*arguments: str, read: bool = False) -> tuple[int, str, str]:
    """Run a verb in a process of its own: exit code, and if they are to be read its stdout and stderr.

    It is a process group of its own, so that what a terminal sends comes once, by us. Raises Stopped where a signal
    came, once the process has saved its work and ended.
    """
    child: subprocess.Popen[str] | None = None
    waiting: list[int] = []

    def send(number: int) -> None:
        if child is None:
            waiting.append(number)
        else:
            child.send_signal(number)

    with passed_on(send) as stop:
        child = subprocess.Popen(
            [sys.executable, "-m", "orpo_cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if read else 2,  # ours is for the result
            stderr=subprocess.PIPE if read else None,
            text=True,
            encoding="utf-8",
            process_group=0,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
        for number in waiting:
            child.send_signal(number)
        out, said = child.communicate()
    if stop.number:
        raise Stopped(stop.number, f"stopped by {signal.Signals(stop.number).name}; {_GO_ON}")
    return child.returncode, out or "", said or ""


def _end_with_parent() -> None:
    """Linux: have SIGTERM sent to this process when the one that started it is killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


# ---- the choice ----


def conclude(directory: Path, runs: Mapping[str, Mapping[str, Any]], judging: Judging) -> dict[str, Any]:
    """What the runs together come to: whether they saw the same order of pairs, each one's verdict, and the best."""
    paths = {name: directory / name for name, run in runs.items() if run["state"] == "finished"}
    same_order = _same_order([read_metrics(RunDirectory(path).metrics) for path in paths.values()])
    if not same_order:
        warn("the runs did not see the training pairs in the same order: what varies has changed it")
    columns = {name: _columns(RunDirectory(path)) for name, path in paths.items()}
    verdicts, best = choose({name: runs[name] for name in paths}, columns, judging)
    told = [{"run": name, **run, "verdict": verdicts.get(name, run["state"])} for name, run in runs.items()]
    return {"runs": told, "same_data_order": same_order, "best": best and _of_best(best, runs, columns, judging)}


def choose(
    runs: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Mapping[str, np.ndarray]], judging: Judging
) -> tuple[dict[str, str], str | None]:
    """Each run's verdict, and the name of the best by the rule above; None if no run has figures.

    `columns`: of each run and metric the figures of the pairs (N,), higher is better. Verdicts: `best`, `tied`,
    `lower` (a worse figure), `perplexity`, `answers` (out for these), `no figures`.
    """
    left = [name for name, run in runs.items() if all(run[metric] is not None for metric in METRICS)]
    verdicts = {name: "no figures" for name in runs if name not in left}
    if not left:
        return verdicts, None
    most = max(runs[name]["ended"] for name in left)
    left = _keep(left, verdicts, "answers", lambda name: runs[name]["ended"] >= most - ENDED_TOLERANCE - 1e-9)
    lowest = min(runs[name]["chosen_perplexity"] for name in left)
    highest = lowest * (1 + judging.tolerance)
    left = _keep(left, verdicts, "perplexity", lambda name: runs[name]["chosen_perplexity"] <= highest)
    sign = 1 if METRICS[judging.metric] else -1
    top = max(left, key=lambda name: sign * runs[name][judging.metric])
    first = columns[top][judging.metric]
    left = _keep(left, verdicts, "lower", lambda name: _ties(first, columns[name][judging.metric]))
    best = min(left, key=lambda name: (runs[name]["chosen_perplexity"], -sign * runs[name][judging.metric]))
    return verdicts | dict.fromkeys(left, "tied") | {best: "best"}, best


def _keep(names: Sequence[str], verdicts: dict[str, str], verdict: str, passes: Any) -> list[str]:
    """The names that pass; the others get the verdict."""
    kept = [name for name in names if passes(name)]
    verdicts |= dict.fromkeys((name for name in names if name not in kept), verdict)
    return kept


def _ties(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the mean difference of two columns (N,) of the same pairs is within chance."""
    [low], [high] = interval(resampled_means((one - other)[None]), len(one))
    return bool(low <= 0 <= high)


def _of_best(
    best: str, runs: Mapping[str, Mapping[str, Any]], columns: Mapping[str, Mapping[str, np.ndarray]], judging: Judging
) -> dict[str, Any]:
    """The best run's figures, and its chosen perplexity as a share above the lowest of all, with its interval."""
    lowest = min(columns, key=lambda name: runs[name]["chosen_perplexity"] or math.inf)
    # The ratio of two perplexities is exp of the difference of mean log-probs.
    resampled = resampled_means((columns[lowest]["chosen_perplexity"] - columns[best]["chosen_perplexity"])[None])
    [low], [high] = interval(np.expm1(resampled), len(columns[best]["chosen_perplexity"]))
    figures = {key: value for key, value in runs[best].items() if key not in ("state", "prompts")}
    return figures | {
        "run": best,
        "lowest_perplexity_run": lowest,
        "perplexity_cost": runs[best]["chosen_perplexity"] / runs[lowest]["chosen_perplexity"] - 1,
        "perplexity_cost_ci95": [float(low), float(high)],
    }


def _pairs(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.eval_pairs.read_text(encoding="utf-8").splitlines()]


def _columns(run: RunDirectory) -> dict[str, np.ndarray]:
    """Of each metric the figures of the held-out pairs (N,), higher is better; NaN where the model has gone bad."""
    pairs = _pairs(run)
    ratios, chosen = (np.array([p[key] for p in pairs], np.float64) for key in ("log_odds_ratio", "chosen_logps"))
    return {"accuracy": (ratios > 0).astype(np.float64), "log_odds_ratio": ratios, "chosen_perplexity": chosen}


def _check_same_pairs(directory: Path, names: Sequence[str]) -> None:
    """Raise InputError where runs were judged on other pairs, or on other tokens of them, than the first."""
    first: Any = None
    for name in names:
        run = RunDirectory(directory / name)
        content = [source["fingerprint"] for source in read_manifest(run)["data"]["eval"]["sources"]]
        found = content, [(p["index"], p["chosen_tokens"], p["rejected_tokens"]) for p in _pairs(run)]
        first = first or found
        if found != first:
            raise InputError(
                f"the held-out pairs of {name} are not those of {names[0]}: their figures cannot be compared",
                "vary only what leaves data, template and tokenizer alone, or give data.eval pairs that fit every run",
            )


def _same_order(metrics: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
    """Whether all runs had the same pairs in each step that several of them logged."""
    seen: dict[int, str] = {}
    rows = (row for run in metrics for row in run if "pairs_digest" in row)
    return all(seen.setdefault(row["step"], row["pairs_digest"]) == row["pairs_digest"] for row in rows)


# ---- its file ----


def _asked(judging: Judging) -> dict[str, int]:
    return {"prompts": judging.prompts, "max_new_tokens": judging.max_new_tokens}


def _summary(directory: Path, runs: Mapping[str, Mapping[str, Any]], judging: Judging) -> dict[str, Any]:
    """`sweep.json`, as far as the runs are known, in the order of the grid."""
    return {
        "directory": str(directory),
        "metric": judging.metric,
        "perplexity_tolerance": judging.tolerance,
        "ended_tolerance": ENDED_TOLERANCE,
        "answers": _asked(judging),
        "runs": [{"run": name, **run} for name, run in runs.items()],
        "best": None,
    }


def _read_runs(path: Path, judging: Judging) -> dict[str, dict[str, Any]]:
    """What an earlier sweep wrote of its runs, if it asked as much of them; nothing where someone has spoilt it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {run["run"]: run for run in found["runs"]} if found["answers"] == _asked(judging) else {}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return {}  # all of it can be had anew
