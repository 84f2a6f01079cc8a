"""What SIGINT, SIGTERM and SIGHUP do: they end the program at once, or while a run trains, ask it to save first.

Only the standard library's lightest parts are imported, so that this can be the first thing that a process does. A
signal that is ignored when the process begins (nohup, a script's background job) stays ignored.
"""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from orpo_cli.errors import signal_exit_code

# Seconds that leaving at once may take: some library may catch what it must not, or wait for a thread that hangs.
_PATIENCE = 5.0

Handler = Callable[[int, FrameType | None], object] | int | None

_last_words = "nothing had to be saved"


class Leave(SystemExit):
    """Raised where the program is when a signal ends it at once; `code` is the exit code."""

    code: int


class Noted:
    """The first signal that asked a run to stop; `number` 0: none."""

    number: int = 0


def leave_at_once() -> None:
    """From here on a signal unwinds the program by `Leave`, after a line on stderr; a second one, or time, ends it."""

    def leave(number: int, frame: FrameType | None) -> None:
        code = signal_exit_code(number)
        _install(lambda *_: os._exit(code))
        signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE)
        _tell(f"stopped by {signal.Signals(number).name}; {_last_words}")
        raise Leave(code)

    _install(leave)


def settled() -> None:
    """The program has done what it had to: what still ends, the interpreter, ends with the same code or a signal's."""
    _install(lambda number, frame: os._exit(signal_exit_code(number)))
    # Python gives signals back their deadly meaning before it takes its modules apart.
    atexit.register(lambda: _install(signal.SIG_IGN))


@contextmanager
def last_words(words: str) -> Iterator[None]:
    """Within it, what to say of the work if a signal ends the program at once."""
    global _last_words
    before, _last_words = _last_words, words
    try:
        yield
    finally:
        _last_words = before


@contextmanager
def noted(announcement: str | None = None) -> Iterator[Noted]:
    """Within it, signals are noted instead, for whoever looks; a second SIGINT has the effect it had before.

    So has, at the end, one that came and that no exception has answered. `announcement` is a line on stderr.
    """
    found = Noted()

    def note(number: int, frame: FrameType | None) -> None:
        if found.number and number == signal.SIGINT:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        found.number = found.number or number
        if announcement:
            _tell(announcement)

    with _handled_by(note) as before:
        yield found
    if found.number:
        signal.raise_signal(found.number)


@contextmanager
def passed_on(send: Callable[[int], object]) -> Iterator[Noted]:
    """Within it, every signal is handed to `send`, which passes it on to a process that has the work to save.

    The first one is noted, for whoever has to answer it once that process has ended.
    """
    found = Noted()

    def pass_on(number: int, frame: FrameType | None) -> None:
        found.number = found.number or number
        send(number)

    with _handled_by(pass_on):
        yield found


def silence() -> None:
    """Nobody reads stderr any more (a terminal hung up, a pipe's reader gone): what is said from now on is lost."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


@contextmanager
def _handled_by(handler: Handler) -> Iterator[dict[int, Handler]]:
    """Within it, this is the handler of the signals that are not ignored; given are those before."""
    before = _install(handler)
    try:
        yield before
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _install(handler: Handler) -> dict[int, Handler]:
    """Make this the handler of the signals that are not ignored; the handlers before."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    return {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) not in (signal.SIG_IGN, None)}


def _tell(line: str) -> None:
    """A line on stderr, past the console: the signal may have come in the middle of one of its own writes."""
    try:
        os.write(2, f"\n{line}\n".encode())
    except OSError:
        silence()
