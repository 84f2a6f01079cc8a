"""Real input that lies beside the checkout, when it does; a test that needs it skips where it is absent."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared/{name} is not on this machine")
    return path


def hh_dialogues() -> Iterator[list[list[tuple[str, str]]]]:
    """The chosen and the rejected side of each row of a part of hh-rlhf, as (who, what was said) a turn."""
    with gzip.open(shared("data/hh-rlhf-harmless-test.jsonl.gz"), "rt", encoding="utf-8") as file:
        for line in file:
            texts = (re.split(r"\n\n(Human|Assistant):", json.loads(line)[side]) for side in ("chosen", "rejected"))
            yield [[(who, said.strip()) for who, said in zip(t[1::2], t[2::2], strict=True)] for t in texts]
