"""What a run says of its steps: plain lines on a pipe, small curves on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from orpo_cli import terminal
from orpo_cli.train.display import StepDisplay, sparkline


def test_steps_are_lines(capsys):
    row = {"step": 3, "loss": 1.23456, "nll_loss": 1.0, "log_odds_ratio": None, "accuracy": 0.75}
    row |= {"tokens_per_second": 12345.6, "learning_rate": 8e-6}
    with StepDisplay(10) as display:
        display.step(row)
    assert capsys.readouterr().err == (
        "step 3/10  loss 1.235  nll 1  log odds ratio -  accuracy 0.75  12,346 tok/s  lr 8.00e-06\n"
    )


def test_a_small_curve_goes_from_the_lowest_to_the_highest():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, float("nan"), 1.0]) == "█ ▁"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([float("inf")]) == " "
    assert sparkline([]) == ""


def test_a_terminal_shows_small_curves(monkeypatch):
    shown = Console(file=io.StringIO(), force_terminal=True, width=200)
    monkeypatch.setattr(terminal, "console", shown)
    row = {"nll_loss": 1.0, "log_odds_ratio": 0.5, "accuracy": 0.75, "tokens_per_second": 1.0, "learning_rate": 1.0}
    with StepDisplay(10) as display:
        for step, loss in enumerate([3.0, 2.0, 1.0], start=1):
            display.step(row | {"step": step, "loss": loss})
    assert "loss █▅▁ 1 " in shown.file.getvalue()
    assert "log odds ratio ▁▁▁ 0.5 " in shown.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100])
def test_how_far_it_is_can_be_seen_on_a_narrow_terminal(monkeypatch, width):
    shown = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(terminal, "console", shown)
    row = {"nll_loss": 1.0, "log_odds_ratio": 0.5, "accuracy": 0.75, "tokens_per_second": 1.0, "learning_rate": 1.0}
    with StepDisplay(1250) as display:
        for step, loss in enumerate([3.0, 2.0, 1.0], start=1):
            display.step(row | {"step": step, "loss": loss})
    last = [line for line in re.split(r"[\r\n]", shown.file.getvalue()) if "loss" in line][-1]
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last)
    assert re.match(r"step +3/1250 [━╸ ]+ [-\d:]+ loss █▅▁ 1 ", last), last
    assert len(last) <= width


def test_an_evaluation_is_a_line(capsys):
    row = {"step": 0, "eval_loss": 2.0, "eval_accuracy": 0.5, "eval_log_odds_ratio": -0.1}
    with StepDisplay(10) as display:
        display.evaluated(row | {"eval_chosen_logps": -1.5, "eval_rejected_logps": -1.25})
    assert capsys.readouterr().err == (
        "held-out at step 0: loss 2  accuracy 0.5  log odds ratio -0.1  log-probs chosen -1.5, rejected -1.25\n"
    )
