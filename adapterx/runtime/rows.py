"""Rows: which adapters each row of one batch gets, and how much of each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from adapterx.adapter import Array
from adapterx.errors import FeedError, OptionError, UnknownAdapter, nearest
from adapterx.runtime.inference import ort
from adapterx.runtime.resident import Resident

RowAdapter: TypeAlias = str | Mapping[str, float] | None

_SHOWN = 12


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of one call, resolved: no later load or unload changes what they mean.

    Args:
        residents: the distinct adapters of all rows, in order of their first row
        shares: ``[n, K]`` float32, how much of each adapter a row gets; a row of zeros is the base
    """

    residents: tuple[Resident, ...]
    shares: Array

    @classmethod
    def of(cls, adapters: Sequence[RowAdapter], held: Mapping[str, Resident]) -> Rows:
        """Resolve what a caller wrote.

        Args:
            adapters: per row a loaded name, ``None`` for the base, or names with weights
            held: what is loaded

        Raises:
            OptionError: not a list of such, or a weight that is no finite number; names the row.
            UnknownAdapter: a name that is not loaded; names every row that has one.
        """
        if isinstance(adapters, (str, bytes, Mapping)) or not isinstance(adapters, (Sequence, np.ndarray)):
            raise OptionError(
                f"adapters= is a list with one entry a row of the batch; got {adapters!r:.80}; for the whole batch "
                "give adapter="
            )
        weights = [_weights(i, entry) for i, entry in enumerate(adapters)]
        unknown = [(i, name) for i, row in enumerate(weights) for name in row if name not in held]
        if unknown:
            named = "; ".join(f"row {i}: no adapter {name!r} is loaded" for i, name in unknown[:_SHOWN])
            more = f"; and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
            raise UnknownAdapter(f"{named}{more}{nearest(unknown[0][1], held)}; loaded: {shown(held)}")
        columns: dict[str, int] = {}
        for row in weights:
            for name in row:
                columns.setdefault(name, len(columns))
        shares = np.zeros((len(weights), len(columns)), np.float32)
        for i, row in enumerate(weights):
            for name, weight in row.items():
                shares[i, columns[name]] = weight
        return cls(tuple(held[name] for name in columns), shares)

    @property
    def is_uniform(self) -> bool:
        """Whether every row gets all of the same one adapter, or the base."""
        return len(self.residents) < 2 and bool((self.shares == 1).all())

    def check_batch(self, feeds: Mapping[str, Any], batch: Sequence[str]) -> None:
        """Whether there are as many rows as the feeds have.

        Args:
            feeds: what the model is fed, checked
            batch: inputs whose axis 0 counts rows

        Raises:
            FeedError: another number, or none of these inputs is fed.
        """
        sizes = {name: _rows_of(feeds[name]) for name in batch if name in feeds}
        if not sizes:
            raise FeedError(
                f"adapters= needs an input that counts the rows of the batch; the model names {_names(batch)}, "
                f"and the feeds are {_names(feeds)}"
            )
        for name, size in sizes.items():
            if size != len(self.shares):
                raise FeedError(
                    f"adapters= has {len(self.shares)} entries, and the batch has {size} rows ({name!r} has shape "
                    f"{list(_shape(feeds[name]))}); give one entry a row, None for the base"
                )


def shown(names: Mapping[str, Any]) -> str:
    """The first names of many, for messages."""
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return f"{', '.join(listed[:_SHOWN])}{more}" if listed else "none"


def _weights(row: int, entry: RowAdapter) -> dict[str, float]:
    """What a row gets, without what it gets nothing of."""
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {str(entry): 1.0}
    if not isinstance(entry, Mapping):
        raise OptionError(f"row {row}: expected a name, None, or {{name: weight}}; got {type(entry).__name__}")
    weights = {}
    for name, weight in entry.items():
        if not isinstance(name, str):
            raise OptionError(f"row {row}: adapters have names; got {name!r:.40}")
        weights[name] = _weight(row, name, weight)
    return {name: weight for name, weight in weights.items() if weight}


def _weight(row: int, name: str, weight: Any) -> float:
    try:
        with np.errstate(over="ignore"):
            number = float(np.float32(weight))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"row {row}: the weight of {name!r} must be a finite number; got {weight!r:.40}")
    return number


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape() if isinstance(value, ort.OrtValue) else value.shape)


def _rows_of(value: Any) -> int:
    shape = _shape(value)
    return shape[0] if shape else 0


def _names(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names)) or "none"
