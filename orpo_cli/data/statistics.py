"""What is in a set of preference pairs, counted while it goes by.

Of a pair nothing stays in memory. Lengths go into counters and findings into numbers with their first examples; what
tells equal pairs apart, three hashes of 64 bits, goes to a temporary file, some 90 bytes a pair.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from orpo_cli.data.formats import Drop, Pair, already_templated
from orpo_cli.data.keys import prompt_key, temporary_database
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.statistics import wilson

PERCENTILES = (50, 90, 95, 99)
ALIKE = 0.9
"""From this similarity on, the answers of a pair hardly differ."""
REPEATED_CHARACTERS = 16
"""A prompt of fewer is not repeated by an answer that begins with it: "Hello" may well be answered by "Hello!"."""
_EXAMPLES = 3
# Different ones that are counted by name; a file of hostile rows could hold millions.
_NAMES = 100

ODD_UNICODE = {
    "control characters": "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f",
    # U+200C and U+200D are not among them: Persian, Indic scripts and emoji need them.
    "invisible characters": "\u00ad\u180e\u200b\u2060-\u2064\ufeff",
    "direction marks": "\u200e\u200f\u202a-\u202e\u2066-\u2069",
    "line separators": "\u0085\u2028\u2029",
    "private use": "\ue000-\uf8ff\U000f0000-\U0010fffd",
    "replacement characters": "\ufffd",
}
"""Characters that a text rarely means to have: name -> what stands between the brackets of a regular expression."""
# UTF-8 that was read as Latin-1 or Windows-1252 on its way: an e with an acute accent has become A~ and (c).
_MISREAD = r"Ã[\u0080-\u00bf]|Â[\u00a0-\u00bf]|â€"
_KINDS = {**{name: f"[{characters}]" for name, characters in ODD_UNICODE.items()}, "UTF-8 misread": _MISREAD}
_ODD = re.compile("|".join(f"({pattern})" for pattern in _KINDS.values()))


class SetStatistics:
    """The statistics of one set, training or held-out.

    `keys` takes the pairs' hashes. `where` says of a position where that row stands. `controls` matches tokens that
    are control tokens, or look it, in the content of a message.
    """

    def __init__(
        self, keys: KeyFile, where: Callable[[int], str], controls: re.Pattern[str], *, held_out: bool
    ) -> None:
        self._keys = keys
        self._held_out = held_out
        self._where = where
        self._controls = controls
        self.rows = self.pairs = self.truncated = 0
        self.dropped: Counter[str] = Counter()
        self._first_dropped: dict[str, str] = {}
        self._tokens: dict[str, Counter[int]] = {name: Counter() for name in ("prompt", "chosen", "rejected", "pair")}
        self._policies: dict[str, Counter[str]] = {}
        self._longer: Counter[str] = Counter()
        self._alike, self._templated, self._repeating = Finding(), Finding(), Finding()
        self._literal, self._odd = Finding(), Finding()

    def drop(self, position: int, drop: Drop) -> None:
        """Count a row that cannot be used."""
        self.rows += 1
        self.dropped[drop.reason] += 1
        if drop.reason not in self._first_dropped:
            self._first_dropped[drop.reason] = f"{self._where(position)}: {drop.detail}"

    def measure(self, whole: TokenizedPair, outcomes: Mapping[str, TokenizedPair | Drop]) -> None:
        """Count the lengths of a pair before any is cut, and what each length policy makes of it."""
        chosen, rejected = whole.response_tokens
        self._tokens["prompt"][whole.chosen_start] += 1
        self._tokens["chosen"][chosen] += 1
        self._tokens["rejected"][rejected] += 1
        self._tokens["pair"][max(len(whole.chosen_ids), len(whole.rejected_ids))] += 1
        for policy, result in outcomes.items():
            kind = "dropped" if isinstance(result, Drop) else "truncated" if result.truncated else "whole"
            self._policies.setdefault(policy, Counter())[kind] += 1

    def keep(self, position: int, pair: Pair, whole: TokenizedPair, used: TokenizedPair) -> None:
        """Count a pair that is used, as `used`; `whole` are its tokens before any was cut."""
        self.rows += 1
        self.pairs += 1
        self.truncated += used.truncated
        chosen, rejected = whole.response_tokens
        self._longer["chosen" if chosen > rejected else "rejected" if chosen < rejected else "equal"] += 1
        self._keys.add(self._held_out, position, pair)

        def here() -> str:
            return self._where(position)

        alike = similarity(used.chosen_ids[used.chosen_start :], used.rejected_ids[used.rejected_start :])
        if alike >= ALIKE:
            self._alike.add(here, lambda: _difference(pair.chosen, pair.rejected))
        if repeating := repeats_prompt(pair):
            self._repeating.add(here, lambda: " and ".join(repeating))
        texts = list(_texts(pair))
        if marker := next(filter(None, map(already_templated, texts)), None):
            self._templated.add(here, lambda: marker)
        if literal := {token for text in texts for token in self._controls.findall(text)}:
            self._literal.add(here, lambda: " ".join(sorted(literal)), literal)
        if odd := {kind for text in texts for kind in odd_unicode(text)}:
            self._odd.add(here, lambda: ", ".join(sorted(odd)), odd)

    def summary(self) -> dict[str, Any]:
        """All of it, as JSON holds it; shares and intervals in 0..1, lengths in tokens."""
        unequal = self._longer["chosen"] + self._longer["rejected"]
        return {
            "rows": self.rows,
            "pairs": self.pairs,
            "truncated": self.truncated,
            "dropped": dict(sorted(self.dropped.items())),
            "dropped_examples": dict(sorted(self._first_dropped.items())),
            "tokens": {name: percentiles(counts) for name, counts in self._tokens.items()},
            "overlong": {
                policy: {kind: counts[kind] for kind in ("whole", "truncated", "dropped")}
                for policy, counts in self._policies.items()
            },
            "length_bias": {
                "chosen_longer": self._longer["chosen"],
                "rejected_longer": self._longer["rejected"],
                "equal": self._longer["equal"],
                "share": self._longer["chosen"] / unequal if unequal else None,
                "share_ci95": list(wilson(self._longer["chosen"], unequal)) if unequal else None,
            },
            "alike": self._alike.summary(),
            "templated": self._templated.summary(),
            "repeats_prompt": self._repeating.summary(),
            "special_tokens": self._literal.summary(),
            "odd_unicode": self._odd.summary(),
            "duplicates": self._keys.duplicates(self._held_out, self._where),
        }


class Finding:
    """How many pairs have something, the first of them, and by name how many have what."""

    def __init__(self) -> None:
        self.pairs = 0
        self._examples: list[dict[str, str]] = []
        self._names: Counter[str] = Counter()

    def add(self, where: Callable[[], str], what: Callable[[], str], names: set[str] | None = None) -> None:
        """Count a pair; `where` and `what` are asked for the first ones only."""
        self.pairs += 1
        if len(self._examples) < _EXAMPLES:
            self._examples.append({"row": where(), "what": what()})
        for name in sorted(names or ()):
            if name in self._names or len(self._names) < _NAMES:
                self._names[name] += 1

    def summary(self) -> dict[str, Any]:
        """Number, examples, and names if there are any, the most frequent first."""
        counted = {"names": dict(self._names.most_common())} if self._names else {}
        return {"pairs": self.pairs, "examples": self._examples, **counted}


class KeyFile:
    """Hashes of all pairs, in a temporary file: memory does not grow with their number, and counts are exact.

    Exact but for two different texts with the same 64 bits: among a million pairs, one chance in some 10 million.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[bool, int, int, int, int]] = []
        self._file = temporary_database()
        self._file.execute("CREATE TABLE pairs (held_out, position, prompt, pair, swapped)")

    def add(self, held_out: bool, position: int, pair: Pair) -> None:
        """Take a pair's hashes: of its prompt, of all of it, and of it with its answers swapped."""
        prompt = prompt_key(pair)
        chosen, rejected = (hashlib.sha256(answer.encode()).digest() for answer in (pair.chosen, pair.rejected))
        whole, swapped = prompt + chosen + rejected, prompt + rejected + chosen
        self._rows.append((held_out, position, _number(prompt), _number(whole), _number(swapped)))
        if len(self._rows) >= 4096:
            self._write()

    def query(self, question: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows that answer a question in SQL."""
        self._write()
        for column in ("prompt", "pair"):
            self._file.execute(f"CREATE INDEX IF NOT EXISTS by_{column} ON pairs (held_out, {column}, position)")
        return self._file.execute(question, values).fetchall()

    def duplicates(self, held_out: bool, where: Callable[[int], str]) -> dict[str, Any]:
        """How many pairs, and how many prompts, occurred before; how many pairs have one that says the opposite."""
        [(pairs, prompts)] = self.query(
            "SELECT count(*) - count(DISTINCT pair), count(*) - count(DISTINCT prompt) FROM pairs WHERE held_out = ?",
            held_out,
        )
        repeated = self.query(
            "SELECT min(position) AS first, max(position) FROM pairs WHERE held_out = ? GROUP BY pair "
            f"HAVING count(*) > 1 ORDER BY first LIMIT {_EXAMPLES}",
            held_out,
        )
        opposite = (
            "FROM (SELECT a.position AS one, (SELECT min(b.position) FROM pairs AS b WHERE b.held_out = a.held_out "
            "AND b.pair = a.swapped) AS other FROM pairs AS a WHERE a.held_out = ?) WHERE other IS NOT NULL"
        )
        [(contradicting,)] = self.query(f"SELECT count(*) {opposite}", held_out)
        contradictions = self.query(
            f"SELECT one, other {opposite} AND one < other ORDER BY one LIMIT {_EXAMPLES}", held_out
        )

        def examples(found: list[tuple[Any, ...]]) -> list[dict[str, str]]:
            return [{"row": where(one), "what": where(other)} for one, other in found]

        return {
            "pairs": pairs,
            "examples": examples(repeated),
            "prompts": prompts,
            "swapped": contradicting,
            "swapped_examples": examples(contradictions),
        }

    def overlap(self, where: Callable[[int], str], where_held_out: Callable[[int], str]) -> dict[str, Any]:
        """How many held-out pairs are in the training set too, or their prompts are; with examples."""

        def found(column: str, what: str, rest: str = "") -> list[tuple[Any, ...]]:
            return self.query(
                f"SELECT {what} FROM (SELECT a.position AS held, (SELECT min(b.position) FROM pairs AS b "
                f"WHERE b.held_out = 0 AND b.{column} = a.{column}) AS trained FROM pairs AS a WHERE a.held_out = 1) "
                f"WHERE trained IS NOT NULL {rest}"
            )

        examples = found("prompt", "held, trained", f"ORDER BY held LIMIT {_EXAMPLES}")
        return {
            "prompts": found("prompt", "count(*)")[0][0],
            "pairs": found("pair", "count(*)")[0][0],
            "examples": [{"row": where_held_out(held), "what": where(trained)} for held, trained in examples],
        }

    def _write(self) -> None:
        if self._rows:
            self._file.execute("BEGIN")
            self._file.executemany("INSERT INTO pairs VALUES (?, ?, ?, ?, ?)", self._rows)
            self._file.execute("COMMIT")
            self._rows.clear()


def percentiles(counts: Counter[int]) -> dict[str, float | int | None]:
    """Mean, percentiles and maximum of values with their counts.

    `p90` is the least value that at least 90 % of the values do not exceed (nearest rank).
    """
    total = sum(counts.values())
    if not total:
        return {"mean": None, **{f"p{share}": None for share in PERCENTILES}, "max": None}
    values = np.array(sorted(counts))
    reached = np.cumsum([counts[value] for value in values.tolist()])
    ranks = {f"p{share}": -(-share * total // 100) for share in PERCENTILES}
    return {
        "mean": float(sum(value * count for value, count in counts.items()) / total),
        **{name: int(values[np.searchsorted(reached, rank)]) for name, rank in ranks.items()},
        "max": int(values[-1]),
    }


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """How much two responses, ids (L1,) and (L2,), are alike: Dice's coefficient of their neighbouring tokens.

    1 for the same pairs of neighbours in whatever order, 0 for none in common. A change of one token in n changes two
    pairs of neighbours, which takes 2 / n off. Where it must be below `ALIKE` by the lengths alone, it is 0.
    """
    shorter, longer = sorted((len(first) - 1, len(second) - 1))
    if shorter < 1 or 2 * shorter < ALIKE * (shorter + longer):
        return 0.0
    neighbours = [(ids[:-1].astype(np.int64) << 32) | ids[1:] for ids in (first, second)]
    (values, counts), (others, other_counts) = (np.unique(codes, return_counts=True) for codes in neighbours)
    _, here, there = np.intersect1d(values, others, assume_unique=True, return_indices=True)
    return float(2 * np.minimum(counts[here], other_counts[there]).sum() / (shorter + longer))


def repeats_prompt(pair: Pair) -> list[str]:
    """Which sides begin with the prompt, or with its last turn: of `chosen` and `rejected`."""
    question = (pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1].content).strip()
    if len(question) < REPEATED_CHARACTERS:
        return []
    sides = {"chosen": pair.chosen, "rejected": pair.rejected}
    return [name for name, answer in sides.items() if answer.lstrip().startswith(question)]


def odd_unicode(text: str) -> set[str]:
    """Which kinds of odd characters are in a text (`ODD_UNICODE`), or signs of UTF-8 that was misread."""
    return {list(_KINDS)[(match.lastindex or 0) - 1] for match in _ODD.finditer(text)}


def _texts(pair: Pair) -> Iterator[str]:
    if isinstance(pair.prompt, str):
        yield from (pair.system or "", pair.prompt)
    else:
        yield from (message.content for message in pair.prompt)
    yield from (pair.chosen, pair.rejected)


def _difference(chosen: str, rejected: str, width: int = 40) -> str:
    """The two answers from where they begin to differ, cut to `width` characters."""
    start = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    start = min(len(chosen), len(rejected)) if start is None else start
    around = max(0, start - width // 4)
    return " / ".join(repr(answer[around : around + width]) for answer in (chosen, rejected))


def _number(key: bytes) -> int:
    """A signed number of 64 bits, which SQLite holds, that stands for the key."""
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big", signed=True)
