"""The shape of a row -> `Pair`: what the data says, before any template or tokenizer sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """One preference: a prompt, the answer that was preferred and the one that was not.

    `prompt` is a string only where the row holds strings (rendered as one user turn, or taken raw under the
    template `none`). `chosen` and `rejected` are the text of the last assistant turn as in the data. `system`
    is a string row's own system text; a dialogue holds its system turn as its first message.
    """

    prompt: tuple[Message, ...] | str
    chosen: str
    rejected: str
    system: str | None = None


class Drop(Exception):  # noqa: N818 - it drops a row, which is no error
    """A row that cannot be used; the run counts it under `reason` and goes on.

    Reasons: empty, identical, diverged, overlong, malformed, filtered, duplicate.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
