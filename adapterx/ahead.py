"""One step ahead: the next result is computed while the caller writes the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map(function, items)`` by one other thread, which is one item ahead of the caller and no more.

    Calls of ``function`` never overlap each other. An error of it is raised where its result would have been.

    Example:
        >>> list(ahead(str.upper, ["a", "b"]))
        ['A', 'B']
    """
    with ThreadPoolExecutor(1) as pool:
        last: Future[Result] | None = None
        for item in items:
            next_one = pool.submit(function, item)
            if last is not None:
                yield last.result()
            last = next_one
        if last is not None:
            yield last.result()
