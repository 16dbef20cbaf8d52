"""Numbers for people: one number of decimals a column, and lengths of bars on one scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from adapterx.report.survey import Row

DASH = "\N{EN DASH}"
_MOST_DECIMALS = 6


def figures(values: Sequence[float | None]) -> tuple[str, ...]:
    """Numbers of one column with the same decimals, as many as give the largest three digits; a dash for ``None``.

    Example:
        >>> figures([1.2345, 0.5, 0.0001, 0.0, float("nan")])
        ('1.23', '0.50', '<0.01', '0', 'not finite')
    """
    top = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    decimals = min(_MOST_DECIMALS, max(0, 2 - math.floor(math.log10(top)))) if top else 0
    return tuple(_figure(value, decimals) for value in values)


def _figure(value: float | None, decimals: int) -> str:
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:.{decimals}f}"
    if value and not float(text):
        return f"<{10**-decimals:.{decimals}f}"
    return text if value else "0"


@dataclasses.dataclass(frozen=True, slots=True)
class Ruler:
    """What bars show, the same all over a report: norms as parts of the base's, where every base could be read.

    Args:
        relative: bars show ``||delta|| / ||base||``; else ``||delta||``
        top: what the longest bar stands for, 0 where there is nothing to draw
    """

    relative: bool
    top: float

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Ruler:
        """The one that fits ``rows``."""
        measured = [row for row in rows if row.norm is not None]
        relative = bool(measured) and all(row.relative is not None for row in measured)
        values = [row.relative if relative else row.norm for row in measured]
        return cls(relative, max((v for v in values if v is not None and math.isfinite(v)), default=0.0))

    @property
    def label(self) -> str:
        """What it measures, in signs."""
        return "‖Δ‖ / ‖W‖" if self.relative else "‖Δ‖"

    def value(self, row: Row) -> float | None:
        """What the bar of ``row`` shows; ``None`` where there is no finite number."""
        value = row.relative if self.relative else row.norm
        return value if value is not None and math.isfinite(value) else None

    def length(self, value: float | None) -> float | None:
        """As a part of the longest bar."""
        return None if value is None or not self.top else value / self.top
