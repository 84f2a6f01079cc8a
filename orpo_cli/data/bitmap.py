"""A set of row positions in one bit a row, so that a set over many millions of rows stays small."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Iterator

_CHUNK_BYTES = 4096


class Bitmap:
    """Positions from 0 on, in ascending order."""

    def __init__(self, positions: Iterable[int] = ()) -> None:
        self._bits = bytearray()
        for position in positions:
            self.add(position)

    def add(self, position: int) -> None:
        """Put a position in."""
        byte, bit = divmod(position, 8)
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits)))
        self._bits[byte] |= 1 << bit

    def remove(self, other: Bitmap) -> None:
        """Take out all positions of another set."""
        for byte, bits in enumerate(other._bits[: len(self._bits)]):
            self._bits[byte] &= ~bits

    def __contains__(self, position: int) -> bool:
        byte, bit = divmod(position, 8)
        return 0 <= byte < len(self._bits) and bool(self._bits[byte] >> bit & 1)

    def __iter__(self) -> Iterator[int]:
        for byte, bits in enumerate(self._bits):
            if bits:
                yield from (8 * byte + bit for bit in range(8) if bits >> bit & 1)

    def __len__(self) -> int:
        return int.from_bytes(self._bits, "little").bit_count()

    def count(self, start: int, stop: int) -> int:
        """How many positions lie in start..stop - 1."""
        within = int.from_bytes(self._bits[start // 8 : -(-stop // 8)], "little") >> start % 8
        return (within & ((1 << max(0, stop - start)) - 1)).bit_count()

    def within(self, start: int, stop: int) -> Iterator[int]:
        """The positions in start..stop - 1."""
        return (position for position in range(start, stop) if position in self)

    def nth(self, number: int, start: int = 0) -> int:
        """The position that has `number` others of the set between `start` and itself. Raises IndexError."""
        number += self.count(0, start)
        for first in range(0, len(self._bits), _CHUNK_BYTES):
            chunk = int.from_bytes(self._bits[first : first + _CHUNK_BYTES], "little")
            found = chunk.bit_count()
            if number < found:
                places = (place for place in range(8 * _CHUNK_BYTES) if chunk >> place & 1)
                return 8 * first + next(place for i, place in enumerate(places) if i == number)
            number -= found
        raise IndexError("the set has not so many positions")

    def to_text(self) -> str:
        """The set as ASCII, for a JSON file."""
        return base64.b64encode(zlib.compress(bytes(self._bits))).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> Bitmap:
        """The set that `to_text` wrote. Raises ValueError or zlib.error for anything else."""
        bitmap = cls()
        bitmap._bits = bytearray(zlib.decompress(base64.b64decode(text, validate=True)))
        return bitmap
