"""Which row comes when: a pure function of (seed, epoch, position).

Rows are shuffled in blocks of BLOCK_ROWS, each by a permutation of its own derived from (seed, epoch, block), so that
a stream needs to hold one block and a run's place in its data is two integers. Positions count the rows of a single
source, also those that will be dropped.

Several sources are mixed. An epoch has as many pairs as they have together; each source gives its quota of them, by its
weight, from passes over its own pairs that follow one another without end: what an epoch leaves of a pass, the next
one goes on with. Every block takes from each source what is its turn, and positions count pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Position:
    """The next row to read (of several sources: the next pair): `offset` in epoch `epoch`'s order, both from 0."""

    epoch: int = 0
    offset: int = 0


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) over uint64: a bijection that scatters near keys."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(length: int, *key: int) -> np.ndarray:
    """A permutation (length,) of range(length) that depends on nothing but the integers of `key`.

    Sorting rows by a hash rather than asking a library's generator keeps the order the same under every version.
    """
    with np.errstate(over="ignore"):
        state = np.zeros(1, np.uint64)
        for part in key:
            state = _mix(state + np.uint64(part % 2**64) + np.uint64(0x9E3779B97F4A7C15))
        keys = _mix(state + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(keys, kind="stable")


def block_order(length: int, *, seed: int, epoch: int, block: int, shuffle: bool) -> np.ndarray:
    """The order (length,) in which the rows of one block come in one epoch."""
    return permutation(length, seed, epoch, block) if shuffle else np.arange(length)


def quotas(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """Pairs that each source gives to an epoch, sum(sizes) in all; without weights each its own size.

    The quotas' integer parts first; what is then missing goes to the largest remainders, the first source first
    (Hamilton's method), in exact arithmetic.
    """
    if weights is None:
        return list(sizes)
    shares = [sum(sizes) * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    numbers = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: numbers[source] - shares[source])
    for source in by_remainder[: sum(sizes) - sum(numbers)]:
        numbers[source] += 1
    return numbers


def turns(quota: int, *, epoch: int, block: int, blocks: int) -> range:
    """Which pairs of a source's endless sequence come in a block, when an epoch of `blocks` takes `quota` of them."""
    return range(epoch * quota + block * quota // blocks, epoch * quota + (block + 1) * quota // blocks)
