import random

import pytest

from orpo_cli.data.bitmap import Bitmap


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (100, 37), (100_000, 50), (100_000, 60_000)])
def test_it_is_a_set_of_numbers(rows, count):
    positions = random.Random(0).sample(range(rows), count)
    bitmap, ordered = Bitmap(positions), sorted(positions)
    assert list(bitmap) == ordered
    assert len(bitmap) == count
    assert all((i in bitmap) == (i in set(positions[:50])) for i in positions[:50])
    assert -1 not in bitmap
    assert 10 * rows not in bitmap
    assert Bitmap.from_text(bitmap.to_text()).to_text() == bitmap.to_text()
    for start, stop in [(0, rows), (0, 10**9), (rows // 3, rows // 2), (7, 7), (9, 3)]:
        within = [i for i in ordered if start <= i < stop]
        assert bitmap.count(start, stop) == len(within)
        assert list(bitmap.within(start, min(stop, rows))) == within
        for number in {0, len(within) // 2, len(within) - 1} & set(range(len(within))):
            assert bitmap.nth(number, start) == within[number]
    with pytest.raises(IndexError):
        bitmap.nth(count)
    half = Bitmap(positions[: count // 2])
    bitmap.remove(half)
    assert list(bitmap) == sorted(positions[count // 2 :])


def test_the_empty_set():
    assert list(Bitmap.from_text(Bitmap().to_text())) == []
    assert len(Bitmap()) == Bitmap().count(0, 10) == 0
