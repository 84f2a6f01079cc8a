"""`Pair` -> token ids: rendering, BOS and end of turn, which token belongs to the response, the length policy.

The whole text (prompt + response) is tokenised at once; a token belongs to the response if its last character does.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from orpo_cli.data.formats import Drop, Message, Pair
from orpo_cli.data.templates import (
    SENTINEL,
    ChatTemplate,
    adds_bos,
    control_pattern,
    render,
    require_offsets,
    special_tokens,
)
from orpo_cli.errors import DataError, ModelError


@dataclass(frozen=True)
class TokenizedPair:
    """One pair as token ids; each side is its prompt and response, BOS and end of turn included.

    index: position of the row in its data, 0-based over all sources concatenated.
    chosen_ids, rejected_ids: int32 (Lc,) and (Lr,).
    chosen_start, rejected_start: first token of the response in them, 1 <= start < L.
    assistant_mask: bool (Lc,), the tokens of every assistant turn in `chosen_ids`; None unless asked for.
    """

    index: int
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_start: int
    rejected_start: int
    assistant_mask: np.ndarray | None
