"""The page: every section is there, nothing is loaded or run, hostile text stays text; in a real browser too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from orpo_cli.report.charts import Series, chart, histogram, smoothed, thinned, ticks
from orpo_cli.report.page import write_report
from orpo_cli.train.health import LEAST

SECTIONS = ["figures", "health", "curves", "pairs", "samples", "data", "recipe", "versions"]
HOSTILE = """<script>alert(1)</script>"><img src=x onerror=alert(2)>&lt;'</pre></section>"""


class Elements(HTMLParser):
    """The page as a tree that has to close what it opens."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def ids(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.found if tag == "section"]


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of a finished run, with hostile text wherever a user's text is shown."""
    copy = tmp_path / "a <b>run</b>"
    shutil.copytree(tiny_run, copy, ignore=shutil.ignore_patterns("checkpoints", "merged", "adapter"))
    samples = [{"step": step, "prompt": HOSTILE, "answer": f"{step} {HOSTILE}", "ended": False} for step in (0, 2, 4)]
    (copy / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["command"] = HOSTILE
    manifest["data"]["train"]["dropped"] = {HOSTILE: 3}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def test_a_run_brings_its_page(tiny_run):
    page = (tiny_run / "report.html").read_text(encoding="utf-8")
    assert Elements(page).ids() == SECTIONS
    assert page == write_report([tiny_run], tiny_run.parent / "again.html").read_text(encoding="utf-8")


def test_hostile_text_stays_text_and_nothing_is_loaded(run):
    text = write_report([run]).read_text(encoding="utf-8")
    elements = Elements(text)
    assert elements.text.count(HOSTILE) == 5  # a prompt, its first and last answer, a reason, the command
    tags = {tag for tag, _ in elements.found}
    assert not tags & {"script", "img", "b", "link", "iframe", "object", "a"}
    names = {name for _, attributes in elements.found for name in attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "href", "style"}
    assert not re.search(r"url\(|@import|https?:", text)
    assert "cut off" in elements.text


def test_every_picture_says_what_it_is(run):
    text = write_report([run]).read_text(encoding="utf-8")
    pictures = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(pictures) == 8
    for picture in pictures:
        assert re.search(r'role="img"><title>[^<]+</title><desc>[^<]{20,}</desc>', picture)
        assert "nan" not in picture
        assert "no figures" not in picture


def test_the_margins_before_and_after_are_those_of_the_pairs(run):
    for name in ("eval.start.pairs.jsonl", "eval.pairs.jsonl"):
        pairs = [json.loads(line) for line in (run / name).read_text().splitlines()]
        evaluations = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        row = [row for row in evaluations if "eval_loss" in row][0 if "start" in name else -1]
        mean = sum(pair["log_odds_ratio"] for pair in pairs) / len(pairs)
        assert mean == pytest.approx(row["eval_log_odds_ratio"], abs=1e-9)
    picture = re.search(
        r"<figcaption>Margins before and after.*?</figure>", write_report([run]).read_text(), re.DOTALL
    )[0]
    assert picture.count("bar a") > 1 < picture.count("bar b")


def test_an_unfinished_run_has_a_page_too(run, orpo):
    for name in ("eval.json", "eval.pairs.jsonl", "eval.start.pairs.jsonl", "samples.jsonl"):
        (run / name).unlink()
    rows = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(rows[: len(rows) // 2])  # amid a row
    code, out, _ = orpo("report", run)
    assert (code, out) == (0, f"{run / 'report.html'}\n")
    assert Elements((run / "report.html").read_text()).ids() == SECTIONS
    (run / "metrics.jsonl").unlink()
    assert "no figures" in write_report([run]).read_text()


def test_several_runs_are_compared(run, tiny_run, tmp_path, orpo):
    recipe = (run / "recipe.yaml").read_text().replace("beta: 0.1", "beta: 0.25")
    (run / "recipe.yaml").write_text(recipe)
    code, out, _ = orpo("report", run, tiny_run, "-o", tmp_path / "both.html")
    assert (code, out) == (0, f"{tmp_path / 'both.html'}\n")
    elements = Elements((tmp_path / "both.html").read_text())
    assert elements.ids() == ["figures", "health", "curves", "pairs", "recipe", "data", "versions"]
    assert "loss.beta0.250.1" in elements.text
    assert str(run) in elements.text
    assert "loss.nll_tokens" not in elements.text


def test_of_sources_of_data_that_differ_what_was_set_is_shown(run, tiny_run, tmp_path):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    own = recipe["data"]["train"][0]["path"]
    recipe["data"]["train"] += [
        {"path": "b.jsonl", "max_pairs": 7, "columns": {"chosen": "good"}, "filter": [{"column": "n", "ge": 0}]}
    ]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = Elements(write_report([run, tiny_run], tmp_path / "both.html").read_text()).text
    added = 'path: "b.jsonl", columns: {"chosen": "good"}, filter: column: "n", ge: 0, max_pairs: 7'
    assert f'data.trainpath: "{own}"; {added}path: "{own}"' in text


def test_a_run_too_short_to_be_judged_is_not_called_well(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    training = next(row for row in rows if "loss" in row)
    for count, colour in ((LEAST - 1, "note"), (LEAST, "well")):
        lines = [json.dumps({**training, "step": step}) + "\n" for step in range(1, count + 1)]
        (run / "metrics.jsonl").write_text("".join(lines))
        assert f'<p class="{colour}">Nothing amiss' in write_report([run]).read_text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["nowhere"], "holds no run"),
        (["RUN", "RUN"], "several runs have no directory"),
        (["RUN", "-o", "no/such/dir.html"], "no file can be written there"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, error, tiny_run, orpo):
    code, _, err = orpo("report", *(tiny_run if argument == "RUN" else argument for argument in arguments))
    assert code == 2
    assert error in err
    assert "hint:" in err


def test_charts_draw_what_they_are_given():
    line = chart("t", "d", [Series("s", [(0, 0.0), (5, 5.0), (10, 10.0)], "a", "line")], x="x", y="y")
    dots = re.findall(r'class="dot a" cx="([\d.]+)" cy="([\d.]+)"', line)
    xs, ys = ([float(value) for value in values] for values in zip(*dots, strict=True))
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert xs[0] < xs[2]
    assert ys[0] > ys[2]
    bars = histogram("t", "d", [("one", [0.0] * 30 + [1.0] * 10, "b")], x="x", y="y")
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"/>', bars)]
    assert heights[0] / heights[-1] == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("values", [[], [1.0], [0.0] * 30, [float("nan"), float("inf")], [1e-300, 1e300], [-1e9, 5e-8]])
def test_charts_of_odd_figures_are_drawn(values):
    points = list(enumerate(values))
    for picture in (
        chart(
            "t", "d", [Series("s", points, "a", kind) for kind in ("curve", "line", "cloud")], x="x", y="y", zero=True
        ),
        histogram("t", "d", [("s", values, "a")], x="x", y="y"),
    ):
        assert not re.search(r"\b(nan|inf)\b", picture)
        Elements(picture)


def test_ticks_are_few_and_round():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(-0.31, 0.29) == pytest.approx([-0.3, -0.2, -0.1, 0, 0.1, 0.2])
    for low, high in [(0, 1), (3, 3.001), (-1e6, 7e6), (0.47, 1.04)]:
        assert 3 <= len(ticks(low, high)) <= 9


def test_long_curves_are_smoothed_and_thinned():
    points = [(i, float(i % 2)) for i in range(6001)]
    assert len(thinned(points, 400)) <= 401
    assert thinned(points, 400)[-1] == points[-1]
    assert smoothed(points[:50]) == points[:50]
    outlier = [(i, 100.0 if i == 300 else 1.0) for i in range(600)]
    assert {y for _, y in smoothed(outlier)} == {1.0}


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browsed(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page as a browser has it, and what its console says."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--no-first-run"]
    command += ["--disable-background-networking", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium or google-chrome on this machine")
def test_a_browser_shows_every_section_and_has_nothing_to_complain_of(run, tmp_path):
    """The page's own policy makes every request and script a line on the console."""
    page = Path(shutil.copy(write_report([run]), tmp_path / "page.html"))
    shown, complaints = browsed(page, tmp_path / "profile")
    assert Elements(shown).ids() == SECTIONS
    assert complaints == []
    asking = tmp_path / "asking.html"
    asking.write_text(page.read_text().replace("<main>", '<main><img src="x.png"><script>1</script>'))
    _, complaints = browsed(asking, tmp_path / "profile")
    assert len(complaints) == 2
    assert all("Content Security Policy" in line for line in complaints)
