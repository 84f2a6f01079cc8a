"""What people are told, on stderr: lines, warnings, errors, and pairs token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orpo_cli import signals
from orpo_cli.redact import redact


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """A run is worth more than its reader: `orpo train ... 2>&1 | tee log` goes on, or saves, when tee is gone."""
        self.quiet = True
        signals.silence()


console = _Console(stderr=True, highlight=False, soft_wrap=True)


_muted = False


def mute(muted: bool) -> None:
    """Say nothing but errors, in all processes but the main one."""
    global _muted
    _muted = muted


def is_live() -> bool:
    """Whether what was said can be drawn over: a terminal listens, and this process speaks."""
    return console.is_terminal and not _muted


def say(text: str | Text | Table = "") -> None:
    """A line for people."""
    if _muted:
        return
    console.print(text if not isinstance(text, str) else Text(harmless(text)))


def warn(text: str) -> None:
    """A line that wants attention and stops nothing."""
    if _muted:
        return
    console.print(Text("warning: ", style="yellow") + Text(harmless(text)))


def print_error(message: str, hint: str | None) -> None:
    """`error:` and `hint:` lines."""
    console.print(Text("error: ", style="bold red") + Text(harmless(message)))
    if hint:
        console.print(Text("hint: ", style="cyan") + Text(harmless(hint)))


def number(value: float | None) -> str:
    """A figure in four digits, a dash for none."""
    return "-" if value is None else f"{value:.4g}"


def size_of_set(pairs: int, rows: int, held_out: int, *, of_training: bool = False) -> str:
    """How many pairs a set has; `of_training`: it is the `held_out` pairs of the training data's rows."""
    if of_training:
        return f"{pairs:,} pairs, of the training data's rows"
    return f"{pairs:,} pairs of {rows:,} rows" + (f", {held_out:,} held out" if held_out else "")


Pieces = Mapping[str, list[tuple[str, bool, bool]]]
"""A pair, token by token: side -> (token, in the NLL, in the odds ratio)."""
_PARTS = {
    (True, True): ("nll+or", "green"),
    (True, False): ("nll", "blue"),
    (False, True): ("or", "magenta"),
    (False, False): ("context", "dim"),
}


def first_pair(pieces: Pieces) -> None:
    """Print both sides of a pair, token by token."""
    say("first pair, as the model sees it (odds ratio + NLL, NLL only, odds ratio only, context only):")
    for line in pair_lines(pieces):
        say(line)


def pair_lines(pieces: Pieces) -> Iterator[Text]:
    """Each side of a pair as a line: runs of tokens bracketed by their part in the loss, and coloured by it."""
    for side, tokens in pieces.items():
        line = Text(f"  {side}: ")
        before = ""
        for token, in_nll, in_odds in tokens:
            part, style = _PARTS[in_nll, in_odds]
            if part != before:
                line.append(f"[{part}]", style="bold")
                before = part
            line.append(visible(token), style=style)
        yield line


def visible(token: str) -> str:
    """A token's text with its white space and control characters made visible; none reaches the terminal."""
    return harmless(token.replace("\n", "⏎").replace("\t", "→").replace("\r", "␍"))


def harmless(text: str) -> str:
    """Text that may come from anyone: line ends stay, escape sequences are shown and not obeyed, secrets are hidden."""
    return "".join(c if c.isprintable() or c in "\n\t\u200d\u00a0" else f"\\x{ord(c):02x}" for c in redact(text))
