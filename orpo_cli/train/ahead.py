"""Work done ahead of its use: what an iterator yields is made in a thread while the main one computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

# Seconds between two looks at whether an item that has not come is still wanted.
_GLANCE = 0.2
# Seconds that a thread is given to end. One that hangs in a read from the network is left behind: it is a daemon, and
# does not keep the process alive.
_PATIENCE = 5.0


class Ahead(Generic[T]):
    """Iterates over `items`, which a thread makes up to `count` ahead; use as a context manager, so that it ends.

    Items come in their order, and what their iterator raises is raised here, by itself, when its turn has come. There
    are no more of them once one would have to be waited for and `given_up` says that nobody wants to.
    """

    def __init__(self, items: Iterator[T], count: int, given_up: Callable[[], bool] = lambda: False) -> None:
        self._items = items
        self._given_up = given_up
        self._made: queue.SimpleQueue[tuple[T] | BaseException] = queue.SimpleQueue()
        self._places = threading.Semaphore(count)
        self._ended = False
        self._thread = threading.Thread(target=self._make, name="orpo-ahead", daemon=True)

    def _make(self) -> None:
        try:
            while True:
                self._places.acquire()
                if self._ended:
                    return
                self._made.put((next(self._items),))
        except BaseException as error:  # StopIteration as well: whatever ends the items ends them for the reader
            self._made.put(error)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        while True:
            try:
                made = self._made.get(timeout=_GLANCE)
                break
            except queue.Empty:
                if self._given_up():
                    raise StopIteration from None
        if isinstance(made, BaseException):
            self._made.put(made)  # for whoever asks again
            raise made
        self._places.release()
        return made[0]

    def __enter__(self) -> Ahead[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended = True
        self._places.release()
        self._thread.join(_PATIENCE)
