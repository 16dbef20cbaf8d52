"""Verification: what a proof found, check by check, and how far two results lie apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from rich.table import Table

from adapterx.adapter import Array

TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest error allowed, relative to the largest output (or to 1), by dtype of the adapter's sites."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One check: ``max_error`` is relative to the largest output, or to 1 where outputs are smaller."""

    check: str
    max_error: float
    tolerance: float
    passed: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """The outcome, row by row; prints as a table. ``notes`` say what could not be proven, and why."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(row.passed for row in self.rows)

    def table(self) -> Table:
        """The rows as a rich table."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column, side in (("check", "left"), ("max error", "right"), ("allowed", "right"), ("", "left")):
            table.add_column(column, justify="right" if side == "right" else "left")
        for row in self.rows:
            verdict = "[green]pass[/]" if row.passed else "[red]FAIL[/]"
            table.add_row(row.check, f"{row.max_error:.1e}", f"{row.tolerance:.1e}", verdict)
        return table


def largest_error(got: Sequence[Array], want: Sequence[Array]) -> float:
    """Of all outputs of a run, relative to the largest value of each, or to 1; infinite where they cannot be compared.

    Args:
        got: one array an output
        want: the same; what is not finite there must not be finite in ``got``
    """
    if len(got) != len(want):
        return float("inf")
    worst = 0.0
    for one, other in zip(got, want, strict=True):
        left, right = one.astype(np.float64), other.astype(np.float64)
        if left.shape != right.shape or not np.array_equal(np.isfinite(left), np.isfinite(right)):
            return float("inf")
        finite = np.isfinite(left)
        size = max(1.0, float(np.abs(right[finite]).max(initial=0.0)))
        worst = max(worst, float(np.abs(left[finite] - right[finite]).max(initial=0.0)) / size)
    return worst
