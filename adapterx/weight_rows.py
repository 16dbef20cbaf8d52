"""Rows of a stored weight that can be read and written apart from the others, so that none is ever needed whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from adapterx.base_weight import WEIGHT, BaseWeight

BLOCK_BYTES = 1 << 20
"""As much of a weight, as float32, as is worked on at a time. It stays in the cache, and the allocator keeps memory of
this size: with 8 MB a merge takes twice as long, with 32 MB three times, most of it in page faults."""


def row_blocks(ref: BaseWeight, nbytes: Mapping[str, int], *, block_bytes: int = BLOCK_BYTES) -> list[slice]:
    """Rows of axis 0 of the weight's shape, in order; all at once where scales or packed bytes belong to several.

    Args:
        ref: how the weight is stored
        nbytes: role -> size of its tensor in bytes
        block_bytes: of float32, as much as a block takes at most, where a block can be so small

    Example:
        >>> row_blocks(BaseWeight("in_out", (5, 2), {"weight": "w"}), {"weight": 40}, block_bytes=16)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    rows = ref.shape[0]
    apart = ref.storage == "float" or (ref.storage == "affine" and (ref.axis == 0 or ref.block_size > 0))
    if not (apart and all(not size % _rows(ref, role) for role, size in nbytes.items())):
        return [slice(0, rows)]
    step = ref.block_size if ref.axis == 0 and ref.block_size else 1
    row_bytes = 4 * ref.d_in * ref.d_out // rows
    count = max(1, block_bytes // max(1, row_bytes * step)) * step
    return [slice(first, min(first + count, rows)) for first in range(0, rows, count)]


def row_span(ref: BaseWeight, role: str, nbytes: int, rows: slice) -> slice:
    """The bytes of a tensor that belong to some of :func:`row_blocks`.

    Example:
        >>> row_span(BaseWeight("out_in", (8, 3), {"weight": "w"}), "weight", 96, slice(2, 4))
        slice(24, 48, None)
    """
    count = _rows(ref, role)
    by_block = count != ref.shape[0]
    first, last = (-(-at // ref.block_size) if by_block else at for at in (rows.start, rows.stop))
    return slice(first * nbytes // count, last * nbytes // count)


def part_of(ref: BaseWeight, rows: slice) -> BaseWeight:
    """Some of :func:`row_blocks` as a weight of its own, whose tensors are the bytes of :func:`row_span`."""
    return dataclasses.replace(ref, shape=(rows.stop - rows.start, *ref.shape[1:]))


def place_of(ref: BaseWeight, rows: slice) -> tuple[slice, slice]:
    """Where rows of the shape lie in ``[d_in, d_out]``."""
    return (rows, slice(None)) if ref.rows_first else (slice(None), rows)


def _rows(ref: BaseWeight, role: str) -> int:
    """How many rows a tensor has: of scales, one for each block where blocks lie along axis 0."""
    blocked = role != WEIGHT and ref.axis == 0 and ref.block_size
    return -(-ref.shape[0] // ref.block_size) if blocked else ref.shape[0]
