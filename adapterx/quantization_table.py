"""Quantization: what quantizing the base of a model wrote, module by module, and what stayed float."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizedRow:
    """One stored weight.

    Args:
        module: the module's path, or the node's name where nothing tells it
        op: the operator that reads it now
        shape: ``(d_in, d_out)``
        storage: how it is written (``uint4 in blocks of 32``)
        bytes_before: as it was
        bytes_after: codes, scales and zero points
        error: root mean square of the difference, over that of the weight; ``None`` where it was not measured
    """

    module: str
    op: str
    shape: tuple[int, int]
    storage: str
    bytes_before: int
    bytes_after: int
    error: float | None = None

    @property
    def bits(self) -> float:
        """Bits a weight, scales and zero points included."""
        return 8 * self.bytes_after / max(1, self.shape[0] * self.shape[1])


@dataclasses.dataclass(frozen=True, slots=True)
class FloatRow:
    """One base operation that stayed as it was.

    Args:
        module: the module's path, or the node's name
        op: its operator
        reason: why
    """

    module: str
    op: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Quantization:
    """What was written; prints as a table.

    Args:
        path: the quantized model file
        rows: a row for each weight, in the order of the graph
        floats: base operations that stayed float
        adapters: how many sites of adapters the model has, inside or as ports; none of them was touched
        notes: what else a user has to know, in words
    """

    path: Path
    rows: tuple[QuantizedRow, ...]
    floats: tuple[FloatRow, ...] = ()
    adapters: int = 0
    notes: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        """Bits a quantized weight, scales and zero points included."""
        return 8 * sum(row.bytes_after for row in self.rows) / sum(row.shape[0] * row.shape[1] for row in self.rows)

    def table(self) -> Table:
        """The rows as a rich table."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("module", "op", "in -> out", "storage"):
            table.add_column(column, no_wrap=True)
        for column in ("bits", "bytes before", "bytes after", "error"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            numbers = (f"{row.bits:.2f}", str(row.bytes_before), str(row.bytes_after))
            error = "" if row.error is None else f"{row.error:.3g}"
            table.add_row(row.module, row.op, f"{row.shape[0]} -> {row.shape[1]}", row.storage, *numbers, error)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=200, markup=False, emoji=False, highlight=False).print(self.table())
        floats = [f"float: {row.module} ({row.op}): {row.reason}" for row in self.floats]
        return "\n".join([str(self.path), text.getvalue().rstrip(), *floats, *self.notes])
