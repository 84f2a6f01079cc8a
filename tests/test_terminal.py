"""What people are told, on a pipe as in these tests: plain lines, all of them on stderr."""

from __future__ import annotations

from orpo_cli import terminal


def test_errors_hints_and_warnings_are_plain_lines_on_stderr(capsys):
    terminal.print_error("data.train: [bold]no[/bold] such file", "look :smile: there")
    terminal.print_error("alone", None)
    terminal.warn("a " + "long " * 60 + "line")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        "error: data.train: [bold]no[/bold] such file\nhint: look :smile: there\nerror: alone\n"
        "warning: a " + "long " * 60 + "line\n"
    )


def test_a_pair_shows_which_tokens_count_for_what(capsys):
    context, nll, both, odds = (False, False), (True, False), (True, True), (False, True)
    chosen = [("User:", *context), (" hi", *context), ("\n", *nll), ("Yes", *both), (".", *both)]
    terminal.first_pair({"chosen": chosen, "rejected": [("No\t", *odds)]})
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["  chosen: [context]User: hi[nll]⏎[nll+or]Yes.", "  rejected: [or]No→"]
