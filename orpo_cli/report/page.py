"""`orpo report`: a run, or several side by side, as one HTML page that needs nothing beside itself.

Whatever comes from a run (prompts, answers, paths, keys) is text, and escaped. There is no script in the page, and its
policy forbids it to load anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from orpo_cli.errors import InputError
from orpo_cli.files import write_file
from orpo_cli.metrics import whole_lines
from orpo_cli.recipe import Recipe, dump_recipe
from orpo_cli.report.charts import Points, Series, chart, histogram
from orpo_cli.report.style import COLOURS, STYLE
from orpo_cli.run_directory import RunDirectory, open_run, read_eval, read_manifest
from orpo_cli.train.health import Health, diagnose

FIGURES = ("accuracy", "log_odds_ratio", "chosen_logps", "rejected_logps", "loss", "nll_loss", "or_loss")
Sections = Iterable[tuple[str, str, str]]
"""(id, heading, inside) of each."""


@dataclass(frozen=True)
class Record:
    """All that the page says of a run, as its files hold it."""

    path: Path
    name: str
    recipe: Recipe
    manifest: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    figures: Mapping[str, Any]
    """Of eval.json; empty where there are none."""
    pairs: Sequence[Mapping[str, Any]]
    """Of eval.pairs.jsonl."""
    pairs_before: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, path: Path) -> Record:
        """What lies in a run's directory. Raises InputError where there is no run."""
        run, recipe = open_run(path)
        return cls(
            path=path,
            name=str(path),
            recipe=recipe,
            manifest=read_manifest(run),
            rows=whole_lines(run.metrics),
            samples=whole_lines(run.samples),
            figures=read_eval(run),
            pairs=whole_lines(run.eval_pairs),
            pairs_before=whole_lines(run.start_pairs),
        )

    @property
    def last_step(self) -> int:
        """Steps made so far."""
        return max((row["step"] for row in self.rows), default=0)

    @property
    def health(self) -> Health:
        """What its rows show."""
        return diagnose(self.rows, beta=self.recipe.loss.beta, total_steps=self.manifest.get("steps") or self.last_step)

    def points(self, key: str) -> Points:
        """A column of `metrics.jsonl` over the steps."""
        return [(row["step"], row[key]) for row in self.rows if isinstance(row.get(key), int | float)]

    def margins(self, *, before: bool = False) -> list[float]:
        """Each held-out pair's log odds ratio."""
        pairs = self.pairs_before if before else self.pairs
        return [pair["log_odds_ratio"] for pair in pairs if pair["log_odds_ratio"] is not None]

    @property
    def before(self) -> Mapping[str, Any]:
        """The evaluation before the first step; empty where there was none."""
        return next((row for row in self.rows if "eval_loss" in row and row["step"] == 0), {})


def write_report(paths: Sequence[Path], output: Path | None = None, *, opening: Sections = ()) -> Path:
    """Write the page of a run into its directory, or of one or several runs to `output`; where it is.

    `opening`: sections to put before those of the runs.

    Raises InputError where a path holds no run, or several have no place for their page.
    """
    records = [Record.of(path) for path in paths]
    if output is None and len(records) > 1:
        raise InputError("several runs have no directory for their page", "name a file with -o")
    target = output or RunDirectory(paths[0]).report
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{target}: no file can be written there", "name a file in a directory that exists")
    write_file(target, page(records, opening))
    return target


def page(records: Sequence[Record], opening: Sections = ()) -> str:
    """The whole page: of one run with all that is known of it, of several with what compares them."""
    one = records[0] if len(records) == 1 else None
    title = f"orpo: {one.name}" if one else f"orpo: {len(records)} runs"
    sections = (*opening, *(of_one(one) if one else of_several(records)))
    body = "".join(f'<section id="{name}"><h2>{heading}</h2>{inside}</section>' for name, heading, inside in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def of_one(run: Record) -> Sections:
    """The sections of a run's own page."""
    yield "figures", "Held-out figures", held_out(run)
    yield "health", "Health", health(run)
    yield "curves", "Curves", grid(curves(run))
    yield "pairs", "Held-out pairs", grid(of_pairs(run))
    yield "samples", "Samples", samples(run)
    yield "data", "Data", data(run)
    recipe = escape(dump_recipe(run.recipe))
    yield "recipe", "Recipe", f"<details open><summary>every key</summary><pre>{recipe}</pre></details>"
    yield "versions", "Versions and machine", versions(run)


def of_several(runs: Sequence[Record]) -> Sections:
    """The sections of a page that compares runs."""
    yield "figures", "Held-out figures", comparison(runs)
    yield "health", "Health", "".join(f"<h3>{escape(run.name)}</h3>{health(run)}" for run in runs)
    yield "curves", "Curves", grid(compared_curves(runs))
    yield "pairs", "Held-out pairs", grid(compared_margins(runs))
    yield "recipe", "What differs in the recipes", recipe_differences(runs)
    rows = [[run.name, counts("train", run), counts("eval", run)] for run in runs]
    yield "data", "Data", table(["run", "training pairs", "held-out pairs"], rows)
    versions = sorted({package for run in runs for package in run.manifest.get("versions", {})})
    rows = [[package, *(run.manifest.get("versions", {}).get(package, "-") for run in runs)] for package in versions]
    yield "versions", "Versions", table(["", *(run.name for run in runs)], rows)


# ---- sections ----


def held_out(run: Record) -> str:
    """The figures before and after, with their intervals."""
    if not run.figures:
        return note("No held-out figures: the recipe names no held-out pairs (data.eval), or the run is not finished.")
    rows = []
    for name in FIGURES:
        low, high = run.figures.get(f"{name}_ci95", (None, None))
        interval = f"{number(low)} to {number(high)}"
        rows.append([words(name), number(run.before.get(f"eval_{name}")), number(run.figures.get(name)), interval])
    return note(f"{run.figures['pairs']:,} pairs, scored before the first step and after the last.") + table(
        ["", "before", "after", "95 % interval"], rows
    )


def health(run: Record) -> str:
    """What was found, with numbers and advice."""
    diagnosis = run.health
    if not diagnosis.found:
        return (
            f'<p class="{"well" if diagnosis.judged else "note"}">{escape(diagnosis.nothing_found.capitalize())}.</p>'
        )
    return "".join(
        f'<div class="finding"><p><strong>{escape(finding.what[0].upper() + finding.what[1:])}</strong> '
        f"({escape(finding.steps)})</p><p>{escape(finding.advice)}</p></div>"
        for finding in diagnosis.findings()
    )


def curves(run: Record) -> Iterator[str]:
    """How training went, step by step; points are the held-out pairs."""

    def both(title: str, about: str, names: Sequence[tuple[str, str]], y: str, *, zero: bool = False) -> str:
        series = []
        for (key, label), colour in zip(names, COLOURS, strict=False):
            series.append(Series(label, run.points(key), colour))
            series.append(Series(f"{label}, held-out", run.points(f"eval_{key}"), colour, "line"))
        return chart(title, about, series, x="step", y=y, zero=zero)

    yield both(
        "Loss",
        "The loss and its two terms over the steps; the odds-ratio term without beta.",
        [("loss", "loss"), ("nll_loss", "NLL"), ("or_loss", "odds-ratio term")],
        "loss",
    )
    yield both(
        "Log-probs of the answers",
        "Mean log-prob of a token of the chosen and of the rejected answers over the steps: they should part.",
        [("chosen_logps", "chosen"), ("rejected_logps", "rejected")],
        "log-prob",
    )
    yield both(
        "Log odds ratio",
        "Mean log odds of chosen against rejected answers over the steps: it should rise above zero.",
        [("log_odds_ratio", "log odds ratio")],
        "log odds ratio",
        zero=True,
    )
    yield both(
        "Accuracy",
        "Share of pairs whose chosen answer is the likelier one, over the steps.",
        [("accuracy", "accuracy")],
        "accuracy",
    )
    yield both("Gradient norm", "Norm of the gradient before clipping.", [("grad_norm", "norm")], "norm")
    yield both("Learning rate", "The learning rate as applied, over the steps.", [("learning_rate", "rate")], "rate")


def of_pairs(run: Record) -> Iterator[str]:
    """The distribution of margins, and margins against lengths."""
    yield histogram(
        "Margins before and after",
        "How many held-out pairs have which log odds ratio, before training and after: it should move to the right.",
        [("before", run.margins(before=True), "b"), ("after", run.margins(), "a")],
        x="log odds ratio of a pair",
        y="pairs",
    )
    clouds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for pair in run.pairs:
        if (margin := pair["log_odds_ratio"]) is not None:
            clouds[margin > 0].append((pair["chosen_tokens"] - pair["rejected_tokens"], margin))
    yield chart(
        "Margins and lengths",
        "Each held-out pair's log odds ratio after training, by how many tokens its chosen answer is longer: a slope "
        "says that length decides.",
        [Series("ranked rightly", clouds[True], "a", "cloud"), Series("wrongly", clouds[False], "b", "cloud")],
        x="tokens that the chosen answer is longer",
        y="log odds ratio",
        zero=True,
    )


def samples(run: Record) -> str:
    """The answers to each sample prompt at the first evaluation and at the last."""
    prompts = list(dict.fromkeys(sample["prompt"] for sample in run.samples))
    if not prompts:
        return note("No samples: the recipe names no train.sample_prompts.")
    parts = []
    for prompt in prompts:
        made = [sample for sample in run.samples if sample["prompt"] == prompt]
        parts.append(f'<div class="sample"><p class="prompt">{escape(prompt)}</p>')
        for sample in made[:1] if len(made) == 1 else (made[0], made[-1]):
            cut = "" if sample["ended"] else " (cut off: it had not ended)"
            parts.append(f"<div><h4>step {sample['step']}{cut}</h4><pre>{escape(sample['answer'])}</pre></div>")
        parts.append("</div>")
    return "".join(parts)


def data(run: Record) -> str:
    """Pairs kept and rows dropped by reason, and where they came from."""
    parts = []
    for split, title in (("train", "training"), ("eval", "held-out")):
        counted = (run.manifest.get("data") or {}).get(split)
        if counted is None:
            continue
        rows = [["pairs used", counts(split, run)], ["rows read", number(counted.get("rows"))]]
        rows += [[f"dropped: {reason}", f"{count:,}"] for reason, count in (counted.get("dropped") or {}).items()]
        rows += [["truncated", number(counted.get("truncated"))]]
        rows += [["source", f"{s.get('path')} (format {s.get('format')})"] for s in counted.get("sources", [])]
        parts.append(f"<h3>{title}</h3>{table(['', ''], rows)}")
    return "".join(parts) or note("The manifest says nothing of the data.")


def versions(run: Record) -> str:
    """Software, machine, base and command of a run."""
    manifest = run.manifest
    base = manifest.get("base", {})
    rows = [[package, version] for package, version in manifest.get("versions", {}).items()]
    rows += [["base", f"{base.get('name_or_path', '-')} {base.get('revision') or ''}"]]
    rows += [[words(key), str(manifest.get(key, "-"))] for key in ("device", "processes", "threads", "seed", "command")]
    return table(["", ""], rows)


def comparison(runs: Sequence[Record]) -> str:
    """The runs' held-out figures, one run a line."""
    rows = []
    for run in runs:
        cells = [run.name, str(run.last_step), number(run.figures.get("pairs"))]
        for figure in FIGURES:
            low, high = run.figures.get(f"{figure}_ci95", (None, None))
            spread = "" if low is None else f" ({number(low)} to {number(high)})"
            cells.append(f"{number(run.figures.get(figure))}{spread}")
        rows.append(cells)
    return table(["run", "steps", "pairs", *map(words, FIGURES)], rows)


def compared_curves(runs: Sequence[Record]) -> Iterator[str]:
    """A chart a figure, a colour a run."""
    for key in ("loss", "log_odds_ratio", "accuracy", "chosen_logps", "rejected_logps", "grad_norm"):
        series = []
        for run, colour in coloured(runs):
            series.append(Series(run.name, run.points(key), colour))
            series.append(Series(f"{run.name}, held-out", run.points(f"eval_{key}"), colour, "line"))
        title = words(key).capitalize()
        yield chart(title, f"{title} of each run over the steps.", series, x="step", y=words(key))


def compared_margins(runs: Sequence[Record]) -> Iterator[str]:
    """The margins of all runs in one chart."""
    yield histogram(
        "Margins after training",
        "How many held-out pairs have which log odds ratio, for each run.",
        [(run.name, run.margins(), colour) for run, colour in coloured(runs)],
        x="log odds ratio of a pair",
        y="pairs",
    )


def recipe_differences(runs: Sequence[Record]) -> str:
    """The keys that are not the same in all runs."""
    flat = [dict(flattened(run.recipe.model_dump(mode="json"))) for run in runs]
    keys = sorted({key for one in flat for key in one if key != "output.dir"})
    differing = [key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in flat}) > 1]
    if not differing:
        return note("Nothing but the output directory.")
    rows = [[key, *(value_set(one.get(key)) for one in flat)] for key in differing]
    return table(["key", *(run.name for run in runs)], rows)


# ---- small things ----


def coloured(runs: Sequence[Record]) -> Iterator[tuple[Record, str]]:
    """Each run with a colour; beyond eight, colours come again."""
    return ((run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs))


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A recipe's keys, dotted, with their values."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def value_set(value: Any) -> str:
    """A key's value; of the sources of data, and other lists of mappings, what was set in each."""
    if not (isinstance(value, list) and value and all(isinstance(item, dict) for item in value)):
        return json.dumps(value, ensure_ascii=False)
    given = [{key: inner for key, inner in item.items() if inner not in (None, [], {})} for item in value]
    texts = (", ".join(f"{key}: {value_set(inner)}" for key, inner in item.items()) for item in given)
    return "; ".join(texts)


def counts(split: str, run: Record) -> str:
    """How many pairs a set has."""
    counted = (run.manifest.get("data") or {}).get(split) or {}
    return number(counted.get("pairs"))


def number(value: Any) -> str:
    """A figure, short."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def words(key: str) -> str:
    """A key as people say it."""
    said = {"or_loss": "odds-ratio term", "nll_loss": "NLL"}.get(key, key)
    return said.replace("logps", "log-probs").replace("_", " ")


def note(text: str) -> str:
    """A quiet line."""
    return f'<p class="note">{escape(text)}</p>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells, the first of each being its heading."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings) if any(headings) else ""
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'


def grid(figures: Iterable[str]) -> str:
    """Figures beside each other, as many as there is room for."""
    return f'<div class="figures">{"".join(figures)}</div>'
