"""Merge: what merging an adapter into a model wrote, site by site."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True, slots=True)
class MergeRow:
    """One site.

    Args:
        site: the adapter's name for it
        weight: the tensor that was changed, ``""`` where only a bias was
        storage: its element type, or how it is quantized (``int4 in blocks of 32``)
        change: root mean square of what the adapter changes; ``None`` for a float weight, where nothing is lost
        rms_error: root mean square of the difference to the merge in float, which requantizing costs
        max_error: the largest such difference
    """

    site: str
    weight: str
    storage: str
    change: float | None = None
    rms_error: float | None = None
    max_error: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Merge:
    """What was written; prints as a table.

    Args:
        path: the merged model file, or the folder of a checkpoint
        rows: one a site, in the order of the adapter
    """

    path: Path
    rows: tuple[MergeRow, ...]

    @property
    def quantized(self) -> bool:
        """Some weight had to be quantized again."""
        return any(row.rms_error is not None for row in self.rows)

    def table(self) -> Table:
        """The rows as a rich table; errors only where there are any."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        numbers = ("change", "rms error", "max error") if self.quantized else ()
        for column in ("site", "storage"):
            table.add_column(column, no_wrap=True)
        for column in numbers:
            table.add_column(column, justify="right")
        for row in self.rows:
            errors = (row.change, row.rms_error, row.max_error) if self.quantized else ()
            table.add_row(row.site, row.storage, *("" if error is None else f"{error:.3g}" for error in errors))
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=200).print(self.table())
        return f"{self.path}\n{text.getvalue()}"
