"""A thread makes items ahead; the reader sees what it would have seen without one."""

import threading
import time
from collections.abc import Iterator

import pytest

from orpo_cli.errors import DataError
from orpo_cli.train.ahead import Ahead


def threads() -> int:
    return sum(thread.name == "orpo-ahead" for thread in threading.enumerate())


def wait_until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to be")


def test_items_come_in_order_and_end():
    with Ahead(iter(range(100)), 3) as items:
        assert list(items) == list(range(100))
        with pytest.raises(StopIteration):
            next(items)
    assert threads() == 0


def test_no_more_is_made_than_was_allowed():
    made = []

    def count() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with Ahead(count(), 2) as items:
        for wanted in range(5):
            wait_until(lambda wanted=wanted: len(made) == wanted + 2)
            time.sleep(0.02)
            assert len(made) == wanted + 2
            assert next(items) == wanted
    assert threads() == 0
    assert len(made) <= 8


def test_an_error_comes_as_itself_in_its_turn_and_again():
    error = DataError("row 7 is malformed", "correct it")

    def failing() -> Iterator[int]:
        yield from range(3)
        raise error

    with Ahead(failing(), 5) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(DataError) as caught:
                next(items)
            assert caught.value is error
    assert threads() == 0


def test_a_reader_that_fails_leaves_no_thread():
    def fail(items: Iterator[int]) -> None:
        with Ahead(items, 2) as numbers:
            raise KeyError(next(numbers))

    with pytest.raises(KeyError):
        fail(iter(range(100)))
    assert threads() == 0


def test_items_that_never_come_hold_nobody_up(monkeypatch):
    monkeypatch.setattr("orpo_cli.train.ahead._PATIENCE", 0.05)
    hangs = threading.Event()

    def hanging() -> Iterator[int]:
        yield 1
        hangs.wait()

    with Ahead(hanging(), 2) as items:
        assert next(items) == 1
    [left] = [thread for thread in threading.enumerate() if thread.name == "orpo-ahead"]
    assert left.daemon
    hangs.set()
    left.join()
