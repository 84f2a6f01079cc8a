"""The tables of `orpo eval`: every figure where it belongs, and nothing of the texts that a terminal would obey."""

from __future__ import annotations

import numpy as np
import pytest

from orpo_cli.recipe import LossSection
from orpo_cli.report.evaluation import comparison, show
from orpo_cli.scores import Scores, delta, slices, summarise
from orpo_cli.terminal import say
from tests.tiny import random_pairs


@pytest.fixture
def figures():
    rng, pairs, loss = np.random.default_rng(0), random_pairs(20), LossSection()
    own, base = (Scores(-rng.exponential(1, 20), -rng.exponential(1, 20), np.ones(20), np.ones(20)) for _ in range(2))
    return {
        **summarise(own, pairs, loss),
        "base": summarise(base, pairs, loss),
        "delta": delta(own, base, loss),
        "slices": {"kind": slices(own, {"one\x1b[31m": np.arange(7), "two": np.arange(7, 20)}, loss)},
        "samples": [{"prompt": "Why?\x1b[2J", "chosen": "So.", "base": "No.", "model": "Yes."}],
        "judge": {
            "model": "judge",
            "against_base": {
                "win_rate": 0.6125,
                "win_rate_ci95": [0.51, 0.7],
                "wins": 49,
                "ties": 0,
                "losses": 31,
                "p_sign": 0.0567,
            },
        },
    }


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(name))
    return line.removeprefix(name).split()


def test_figures_stand_beside_their_names(figures, capsys):
    show(figures)
    out, err = capsys.readouterr()
    assert out == ""
    assert "\x1b[31m" not in err
    assert "\x1b[2J" not in err
    ends = [f"{end:.4g}" for end in figures["accuracy_ci95"]]
    assert row(err, "accuracy  ")[:4] == [f"{figures['accuracy']:.4g}", ends[0], "to", ends[1]]
    assert f"{figures['base']['accuracy']:.4g}" in row(err, "accuracy  ")
    assert row(err, "accuracy  ")[-1] == f"{figures['delta']['accuracy_p_mcnemar']:.4g}"
    assert row(err, "log odds ratio")[-1] == f"{figures['delta']['log_odds_ratio_p_sign_flip']:.4g}"
    assert row(err, "shorter")[0] == str(figures["accuracy_by_length"]["chosen_shorter"]["pairs"])
    assert row(err, "two")[:2] == ["13", f"{figures['slices']['kind']['two']['accuracy']:.4g}"]
    assert row(err, "against base") == ["0.6125", "0.51", "to", "0.7", "49", "0", "31", "0.0567"]
    assert row(err, "   base") == ["No."]


def test_a_plain_evaluation_has_no_columns_for_a_base(figures, capsys):
    show({key: figures[key] for key in figures if key not in ("base", "delta", "slices", "samples", "judge")})
    err = capsys.readouterr().err
    assert "delta" not in err
    assert "judged" not in err
    assert row(err, "loss")[0] == f"{figures['loss']:.4g}"


def test_of_very_many_groups_the_largest_are_printed_and_the_others_summed_up(figures, capsys):
    rng, loss = np.random.default_rng(1), LossSection()
    scores = Scores(-rng.exponential(1, 90), -rng.exponential(1, 90), np.ones(90), np.ones(90))
    places = np.split(np.arange(90), np.cumsum(np.arange(1, 13)))  # of 1, 2, ... 12 pairs, and what is left
    few = slices(scores, {f"value {len(of)}": of for of in places}, loss)
    show({**figures, "slices": {"few": few}})
    assert "others" not in capsys.readouterr().err

    many = {"largest": np.arange(30)} | {f"single {i}": np.array([30 + i]) for i in range(59, -1, -1)}
    show({**figures, "slices": {"many": slices(scores, many, loss)}})
    lines = capsys.readouterr().err.splitlines()
    table = lines[lines.index("by many: the largest of 61 groups (the JSON has all)") + 2 :][:20]
    assert table[0].startswith("largest  ")
    assert [line.split()[1] for line in table[1:19]] == [f"{i}" for i in range(59, 41, -1)]
    rest = slices(scores, {"rest": np.arange(30, 72)}, loss)["rest"]
    expected = [f"{rest[name]:.4g}" for name in ("accuracy", "log_odds_ratio")]
    assert table[19].split() == ["42", "others", "42", *expected]
    assert "single 0 " not in "\n".join(lines)


@pytest.mark.parametrize("before", [None, {}])
def test_the_comparison_stands_without_a_first_evaluation(before, capsys):
    names = ("accuracy", "log_odds_ratio", "chosen_logps", "rejected_logps", "nll_loss", "or_loss", "loss")
    after = dict.fromkeys(names, 0.5) | {"accuracy_ci95": [0.25, 0.75]}
    say(comparison(before, after))
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["accuracy", "0.5", "0.25", "to", "0.75"] in lines
    say(comparison({f"eval_{name}": 0.125 for name in names}, after))
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["accuracy", "0.125", "0.5", "0.25", "to", "0.75"] in lines
