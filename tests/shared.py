"""Real input that lies beside the checkout, when it does; a test that needs it skips where it is absent."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared/{name} is not on this machine")
    return path
