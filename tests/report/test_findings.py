"""What `orpo data` prints: nothing that moves the terminal's cursor, colours only where they are wanted."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from orpo_cli.report import findings

PIECES = {
    "chosen": [("User: hi", False, False), ("\n", True, False), ("Yes", True, True)],
    "rejected": [("No\x1b[2J", False, True)],
}


@pytest.fixture
def printed(monkeypatch):
    """Print on a terminal, with `NO_COLOR` set or not."""

    def on_a_terminal(*, no_color: bool) -> str:
        monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
        file = io.StringIO()
        console = Console(file=file, force_terminal=True, color_system="standard", highlight=False, soft_wrap=True)
        monkeypatch.setattr(findings, "console", console)
        findings.show_pair("file.jsonl, row 3\x1b[2J", PIECES)
        return file.getvalue()

    return on_a_terminal


def test_the_parts_of_the_loss_are_coloured_on_a_terminal(printed):
    text = printed(no_color=False)
    assert "\x1b[34m⏎\x1b[0m" in text  # blue, in the NLL alone
    assert "\x1b[32mYes\x1b[0m" in text  # green, in both
    assert "\x1b[35mNo\\x1b[2J\x1b[0m" in text  # magenta, in the odds ratio alone; the text's own code is shown
    assert "row 3\\x1b[2J" in text
    assert "\x1b[2J" not in text


def test_no_color_is_honoured(printed):
    text = printed(no_color=True)
    assert not any(f"\x1b[{code}m" in text for code in (31, 32, 33, 34, 35, 36))
    assert "nll+or" in text
    assert "\x1b[2J" not in text
