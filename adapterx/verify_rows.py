"""Rows of batches, compared: what each gets among others, alone, and where all have its adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from adapterx.adapter import Array
from adapterx.errors import AdapterxError, ModelError
from adapterx.runtime.rows import RowAdapter
from adapterx.runtime.session import AdapterSession
from adapterx.verification import largest_error


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Feeds, and the names of those that bring one row of the batch after another on axis 0."""

    feeds: Mapping[str, Array]
    by_row: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many rows there are."""
        return len(self.feeds[self.by_row[0]])

    def taken(self, order: Sequence[int]) -> Batch:
        """These rows, in this order."""
        chosen = {name: self.feeds[name][list(order)] for name in self.by_row}
        return Batch({**self.feeds, **chosen}, self.by_row)


@dataclasses.dataclass(frozen=True, slots=True)
class RowProof:
    """What it takes to compare rows.

    Args:
        session: runs the mixed batches; has the adapters
        reference: runs those with one adapter for all rows; may be the same
        sums: entries with weights, and the loaded adapter that does the same to a whole batch; ``None`` where none can
        axes: by output, the axis on which rows lie; ``None`` where the output is none of rows
        alone: whether a row alone must give what it gives among others
    """

    session: AdapterSession
    reference: AdapterSession
    sums: Sequence[tuple[Mapping[str, float], str | None]]
    axes: tuple[int | None, ...]
    alone: bool

    def errors(self, batch: Batch, entries: Sequence[RowAdapter]) -> dict[str, float]:
        """By what is compared, the largest error of all rows."""
        mixed, errors = self.mixed(batch, entries), dict[str, float]()
        wholes: dict[str, list[Array]] = {}
        for i, entry in enumerate(entries):
            key = repr(entry)
            if key not in wholes:
                wholes[key] = self._reference(batch, entry)
            wanted = {}
            if self.alone:
                wanted["each alone"] = self._row(self._reference(batch.taken([i]), entry), 0, 1)
            wanted["all rows so"] = self._row(wholes[key], i, batch.size)
            got = self._row(mixed, i, batch.size)
            for label, want in wanted.items():
                check = f"{_kind(entry)} = {label}"
                errors[check] = max(errors.get(check, 0.0), largest_error(got, want))
        return errors

    def order_error(self, batch: Batch, entries: Sequence[RowAdapter]) -> float:
        """Between the rows of a batch and the same rows, turned round."""
        order = list(reversed(range(batch.size)))
        straight = self.mixed(batch, entries)
        turned = self.mixed(batch.taken(order), [entries[i] for i in order])
        pairs = ((self._row(turned, at, len(order)), self._row(straight, i, len(order))) for at, i in enumerate(order))
        return max(largest_error(got, want) for got, want in pairs)

    def distance(self, batch: Batch, entries: Iterable[RowAdapter]) -> float:
        """Between those two entries that lie nearest to each other when all rows have them."""
        outputs = [self._told(self._reference(batch, entry)) for entry in entries]
        pairs = [(one, other) for i, one in enumerate(outputs) for other in outputs[:i]]
        return min((largest_error(one, other) for one, other in pairs), default=0.0)

    def mixed(self, batch: Batch, entries: Sequence[RowAdapter]) -> list[Array]:
        """The outputs; none when the graph cannot be run so."""
        try:
            return list(self.session.run(None, batch.feeds, adapters=entries))
        except AdapterxError:
            raise
        except Exception:  # ORT's errors share no other class: shapes do not meet inside the graph
            return []

    def _reference(self, batch: Batch, entry: RowAdapter) -> list[Array]:
        """With one adapter for all rows, where there is one."""
        name = entry
        if isinstance(entry, Mapping):
            name = next(adapter for weights, adapter in self.sums if weights == entry)
            if name is None:
                return self.mixed(batch, [entry] * batch.size)
        assert not isinstance(name, Mapping), "sums were looked up"
        return outputs_of(self.reference, batch, name)

    def _told(self, outputs: Sequence[Array]) -> list[Array]:
        return [output for output, axis in zip(outputs, self.axes, strict=True) if axis is not None]

    def _row(self, outputs: Sequence[Array], i: int, n: int) -> list[Array]:
        """What belongs to row ``i`` of ``n``: one step along the axis, or as many as each row has."""
        rows = []
        for output, axis in zip(outputs, self.axes, strict=False):
            if axis is not None:
                each = output.shape[axis] // n
                rows.append(np.take(output, range(i * each, (i + 1) * each), axis=axis))
        return rows


def outputs_of(session: AdapterSession, batch: Batch, adapter: str | None) -> list[Array]:
    """With one adapter, or none, for all rows.

    Raises:
        ModelError: the model cannot be run so.
    """
    try:
        return list(session.run(None, batch.feeds, adapter=adapter))
    except AdapterxError:
        raise
    except Exception as error:  # as above
        raise ModelError(
            f"the model cannot be run with {batch.size} rows of these feeds (where they were made from its graph, give "
            f"your own): {error}"
        ) from None


def row_axes(outputs: Sequence[Array], alone: Sequence[Array], n: int) -> tuple[int | None, ...]:
    """By output, the only axis that is ``n`` times as long for ``n`` rows as for one; ``None`` where there is none.

    Args:
        outputs: of a batch of ``n`` rows
        alone: of one row
        n: 2 or more

    Example:
        >>> row_axes([np.zeros((6, 5)), np.zeros((5, 12)), np.zeros(6)], [np.zeros((1, 5)), np.zeros((5, 2)), 0], 6)
        (0, 1, None)
    """
    axes: list[int | None] = []
    for output, one in zip(outputs, alone, strict=True):
        found = [i for i, (many, few) in enumerate(zip(output.shape, np.shape(one), strict=False)) if many != few]
        by_row = len(found) == 1 and output.ndim == np.ndim(one) and output.shape[found[0]] == n * one.shape[found[0]]
        axes.append(found[0] if by_row else None)
    return tuple(axes)


def _kind(entry: RowAdapter) -> str:
    if entry is None:
        return "base rows"
    return "rows of an adapter" if isinstance(entry, str) else "rows of a weighted sum"
