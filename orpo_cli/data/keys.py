"""Hashes of pairs in temporary files: what tells equal ones apart does not grow in memory with their number."""

from __future__ import annotations

import hashlib
import json
import sqlite3

from orpo_cli.data.bitmap import Bitmap
from orpo_cli.data.formats import Pair
from orpo_cli.data.tokenize import TokenizedPair


def pair_key(pair: TokenizedPair) -> bytes:
    """A digest of a pair's tokens, the same for equal pairs."""
    return hashlib.sha256(pair.chosen_ids.tobytes() + b"|" + pair.rejected_ids.tobytes()).digest()[:16]


def prompt_key(pair: Pair) -> bytes:
    """A digest of a pair's prompt, its system turn included."""
    prompt = pair.prompt if isinstance(pair.prompt, str) else [[m.role, m.content] for m in pair.prompt]
    return hashlib.sha256(json.dumps([pair.system, prompt]).encode()).digest()


def temporary_database() -> sqlite3.Connection:
    """A SQLite file that nobody else sees, which is gone when it is closed; 4 MiB of it stay in memory."""
    database = sqlite3.connect("", isolation_level=None)
    for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", "cache_size = -4096"):
        database.execute(f"PRAGMA {setting}")
    return database


class SeenKeys:
    """Which keys have occurred."""

    def __init__(self) -> None:
        self._file = temporary_database()
        self._file.execute("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._file.execute("BEGIN")

    def add(self, key: bytes) -> bool:
        """Put a key in; whether it is the first time."""
        return self._file.execute("INSERT OR IGNORE INTO seen VALUES (?)", (key,)).rowcount == 1


class PromptKeys:
    """The prompt's key of every pair, by which whole prompts are held out."""

    def __init__(self) -> None:
        self._file = temporary_database()
        self._file.execute("CREATE TABLE prompts (key BLOB, position INTEGER)")
        self._file.execute("BEGIN")

    def add(self, key: bytes, position: int) -> None:
        """Note the prompt of the pair at a position. Of a key, the first 16 bytes count."""
        self._file.execute("INSERT INTO prompts VALUES (?, ?)", (key[:16], position))

    def __len__(self) -> int:
        [(count,)] = self._file.execute("SELECT count(DISTINCT key) FROM prompts")
        return count

    def first(self, pairs: int) -> Bitmap:
        """Positions of at most so many pairs: whole prompts in the order of their keys, each if it still fits."""
        self._file.execute("CREATE INDEX IF NOT EXISTS by_key ON prompts (key, position)")
        taken = Bitmap()
        for key, size in self._file.execute("SELECT key, count(*) FROM prompts GROUP BY key ORDER BY key"):
            if size <= pairs:
                for (position,) in self._file.execute("SELECT position FROM prompts WHERE key = ?", (key,)):
                    taken.add(position)
                pairs -= size
            if not pairs:
                break
        return taken
