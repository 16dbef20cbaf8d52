"""A progress bar on stderr for the few things that take seconds; silent where nobody watches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far ``total`` bytes have come; gives a function to call with the bytes just done.

    Nothing is printed when stderr is not a terminal.

    Example:
        >>> with progress("copying", total=10) as advance:
        ...     advance(10)
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda done: bar.advance(task, done)


@contextlib.contextmanager
def steps(description: str, total: int) -> Iterator[Callable[[int, Callable[[], str]], None]]:
    """Show which of ``total`` steps are done; gives a function to call with the number just done and what says how.

    The latter is a function, too, and is only called where somebody watches: it may take its time.

    Example:
        >>> with steps("quantizing", total=1) as advance:
        ...     advance(1, lambda: "model.layers.0, error 1.2e-03")
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(description, total=total)

        def advance(done: int, outcome: Callable[[], str]) -> None:
            if console.is_terminal:
                bar.update(task, advance=done, description=f"{description} {outcome()}")

        yield advance
