"""What can go wrong, and the exit code of each: the one place that knows them.

Exit codes: 2 the user's input is wrong, 1 a run failed, 128 + signal number when a signal stopped the run.
"""

from __future__ import annotations

import signal


class OrpoError(Exception):
    """A failure that is explained to the user instead of shown as a traceback.

    `message` says what is wrong, in the user's terms; `hint` says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(OrpoError, ValueError):
    """The user's input is wrong: usage, recipe, data, or a model that is missing."""

    exit_code = 2


class RecipeError(InputError):
    """The recipe is wrong; the message lists every fault with its `file:line`."""


class DataError(InputError):
    """The preference data cannot be used."""


class ModelError(InputError):
    """The model, its tokenizer or an adapter is missing, gated or does not fit the recipe."""


class RunError(OrpoError, RuntimeError):
    """A run that was started rightly and failed: numbers gone bad, a full disk, memory run out."""

    exit_code = 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a device's, or the CPU allocator's."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    # torch has a class of its own for what CUDA's allocator says, and none for the CPU's, MPS's and CUDA's libraries.
    said = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or any(words in str(error) for words in said)


class Stopped(OrpoError):  # noqa: N818 - to be stopped is no error
    """A signal stopped the run after everything was saved."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = signal_exit_code(signal_number)


def signal_exit_code(number: int) -> int:
    """The exit code of a program that a signal stopped."""
    # A hang-up asks for the same as a termination, and scripts need to know one code only.
    return 128 + (signal.SIGTERM if number == signal.SIGHUP else number)
