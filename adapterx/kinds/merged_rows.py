"""Some rows of a stored weight with a change folded in, and what storing them cost."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from adapterx.adapter import Array
from adapterx.base_weight import BaseWeight, Tensors, read_weight, written
from adapterx.kinds.merged import Merger
from adapterx.weight_rows import part_of, place_of


@dataclasses.dataclass(slots=True)
class Loss:
    """Differences between a merge in float and what was stored, summed up over the rows of a weight."""

    count: int = 0
    squares: float = 0.0
    change_squares: float = 0.0
    largest: float = 0.0

    @property
    def rms(self) -> float:
        """Root mean square of the differences."""
        return math.sqrt(self.squares / max(1, self.count))

    @property
    def change(self) -> float:
        """Root mean square of what the adapter changes."""
        return math.sqrt(self.change_squares / max(1, self.count))

    def add(self, before: Array, wanted: Array, stored: Array) -> None:
        """Count some more numbers; ``before`` and ``stored`` are overwritten."""
        stored -= wanted
        before -= wanted
        self.count += wanted.size
        self.squares += _squares(stored)
        self.change_squares += _squares(before)
        self.largest = max(self.largest, float(stored.max(initial=0)), -float(stored.min(initial=0)))


def _squares(array: Array) -> float:
    # In the order of memory: flattening a turned weight by rows would copy it.
    flat = array.ravel(order="K")
    return float(np.dot(flat, flat))


def merged_rows(
    ref: BaseWeight, rows: slice, done: Merger, tensor: Tensors, *, keep_grid: bool = False, loss: Loss | None = None
) -> dict[str, Array]:
    """The tensors of some rows, merged.

    Args:
        ref: how the whole weight is stored
        rows: one of its :func:`adapterx.weight_rows.row_blocks`
        done: the change beside the whole weight
        tensor: reads those rows of a tensor
        keep_grid: as for :func:`adapterx.base_weight.written`
        loss: where to count what requantizing costs

    Raises:
        ValueError: finite numbers become infinite in a half type.
    """
    part = part_of(ref, rows)
    before = read_weight(part, tensor)
    wanted = done.weight(before, *place_of(ref, rows))
    result = written(part, wanted, tensor, keep_grid=keep_grid)
    if loss is not None:
        loss.add(before, wanted, read_weight(part, result.__getitem__))
    for array in result.values():
        if array.dtype == np.float16 and not np.isfinite(array).all() and np.isfinite(wanted).all():
            raise ValueError("merged numbers are beyond float16; merge into a float32 or bfloat16 model")
    return result
