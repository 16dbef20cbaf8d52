"""The report's tables, column by column; what is the same in every row is said once, above the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Literal

from rich.filesize import decimal

from adapterx.report.figures import DASH, Ruler, figures
from adapterx.report.strips import Strip
from adapterx.report.survey import Row

_SOURCES = {
    "initializer": "initializer names",
    "folded_from": "names weights were folded from",
    "name_scopes": "module scopes",
    "node_path": "node paths",
    "adapter_values": "values of the adapter",
    "adapter_shapes": "shapes of the adapter",
    "structure": "structure alone",
}
_OWN = frozenset({"site", "module type", "sites", "in", "out", "rank", "size"})


@dataclasses.dataclass(frozen=True, slots=True)
class Bar:
    """A stroke from ``start`` to ``end``, as parts of the longest bar; that of a range has a tick at its median."""

    end: float
    start: float = 0.0
    tick: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column: a text, or a bar, a row.

    Args:
        label: its head
        look: ``number`` (right, figures of one width), ``code`` (a name from a file), ``text`` or ``bar``
        cells: what stands in it
    """

    label: str
    look: Literal["number", "code", "text", "bar"]
    cells: Sequence[str | Bar | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Columns of one length, and label and text of those that are the same everywhere."""

    id: str
    title: str
    columns: tuple[Column, ...]
    everywhere: tuple[tuple[str, str], ...]

    @property
    def rows(self) -> list[tuple[str | Bar | None, ...]]:
        """The cells, row by row."""
        return list(zip(*(column.cells for column in self.columns), strict=True))


def sites_table(rows: Sequence[Row], ruler: Ruler) -> Table:
    """Every site in numbers."""
    columns = [
        Column("site", "code", [row.site.name for row in rows]),
        Column("adapter", "code", [row.site.adapter or "?" for row in rows]),
        Column("kind", "text", [row.site.kind for row in rows]),
        Column("op", "code", [row.site.op for row in rows]),
        Column("in", "number", [str(row.site.d_in) for row in rows]),
        Column("out", "number", [str(row.site.d_out) for row in rows]),
        Column("rank", "number", [str(row.rank or DASH) for row in rows]),
        Column("scale", "number", [f"{row.site.scale:g}" for row in rows]),
        Column("dtype", "code", [row.site.dtype for row in rows]),
        Column("size", "number", [decimal(row.nbytes) for row in rows]),
        Column("named by", "text", [_SOURCES.get(row.site.name_source, row.site.name_source) for row in rows]),
    ]
    return _table("sites", "Every site", columns, [*_norms(rows, ruler), *_parts(rows)])


def _norms(rows: Sequence[Row], ruler: Ruler) -> list[Column]:
    if all(row.norm is None for row in rows):
        return []
    columns = [Column("‖Δ‖", "number", figures([row.norm for row in rows]))]
    shares = [row.relative for row in rows]
    if any(share is not None for share in shares):
        percents = figures([None if share is None else 100 * share for share in shares])
        columns.append(Column("‖Δ‖ / ‖W‖, %", "number", percents))
    lengths = [ruler.length(ruler.value(row)) for row in rows]
    bars = [None if length is None else Bar(length) for length in lengths]
    return [*columns, Column(ruler.label, "bar", bars)]


def _parts(rows: Sequence[Row]) -> list[Column]:
    """Norms of what adapters of other kinds hold beside the two matrices, a column for each."""
    names = dict.fromkeys(name for row in rows for name, _ in row.parts)
    return [Column(f"‖{name}‖", "number", figures([dict(row.parts).get(name) for row in rows])) for name in names]


def types_table(strips: Iterable[Strip], ruler: Ruler) -> Table | None:
    """Sites by module type, over the layers; ``None`` where no type has two."""
    groups = [
        (strip.title, column, [row for module in strip.of_type(column) for row in module.rows])
        for strip in strips
        for column in strip.columns
    ]
    groups = [group for group in groups if group[0] and group[2]]
    if all(len(rows) < 2 for _, _, rows in groups):
        return None
    members = [rows for _, _, rows in groups]
    columns = [
        Column("layers", "code", [layers for layers, _, _ in groups]),
        Column("module type", "code", [column for _, column, _ in groups]),
        Column("sites", "number", [str(len(rows)) for rows in members]),
        Column("in", "number", [span(row.site.d_in for row in rows) for rows in members]),
        Column("out", "number", [span(row.site.d_out for row in rows) for rows in members]),
        Column("rank", "number", [span(row.rank for row in rows) for rows in members]),
        Column("size", "number", [decimal(sum(row.nbytes for row in rows)) for rows in members]),
    ]
    return _table("types", "By module type", columns, _ranges(members, ruler))


def span(sizes: Iterable[int]) -> str:
    """From the least to the largest, or the one that there is; a dash where there is none but zero."""
    found = sorted(set(sizes) - {0})
    return DASH.join(map(str, dict.fromkeys((found[0], found[-1])))) if found else DASH


def _ranges(groups: list[list[Row]], ruler: Ruler) -> list[Column]:
    """Least, median and largest norm of each group, and a bar from end to end."""
    values = [[value for row in rows if (value := ruler.value(row)) is not None] for rows in groups]
    if not ruler.top or not any(values):
        return []
    spans = [(max(found), min(found), median(found)) if found else None for found in values]
    factor, unit = (100, ", %") if ruler.relative else (1, "")
    ends = [end for span in spans for end in (span or (None, None, None))]
    texts = figures([None if end is None else factor * end for end in ends])
    names = ((f"{ruler.label}{unit}: least", 1), ("median", 2), ("largest", 0))
    bars = [None if span is None else Bar(*(end / ruler.top for end in span)) for span in spans]
    return [*(Column(name, "number", texts[i::3]) for name, i in names), Column(ruler.label, "bar", bars)]


def _table(id_: str, title: str, described: list[Column], measured: list[Column]) -> Table:
    """Without those of the ``described`` columns that say the same in every row."""
    once = {
        column.label: str(column.cells[0])
        for column in described
        if len(column.cells) > 1 and len(set(column.cells)) == 1 and column.label not in _OWN
    }
    kept = [column for column in described if column.label not in once]
    return Table(id_, title, (*kept, *measured), tuple(once.items()))
