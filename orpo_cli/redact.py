"""Secrets are neither printed nor saved: hub tokens, and names and passwords within URLs."""

from __future__ import annotations

import os
import re

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}")
_PASSWORD = re.compile(r"(?<=://)[^\s/@'\"]+:[^\s/@'\"]*(?=@)")
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Where the hub's library takes this for a token, so may be any word that people write.
_SHORTEST = 8


def redact(text: str) -> str:
    """The text with `***` in the place of each secret."""
    for value in filter(None, map(os.environ.get, _VARIABLES)):
        if len(value) >= _SHORTEST:
            text = text.replace(value, "***")
    return _PASSWORD.sub("***", _TOKEN.sub("***", text))
