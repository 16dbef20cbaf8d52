"""Frobenius norms: of an adapter's change without forming the change, and of weights of any size."""

from __future__ import annotations

import math

import numpy as np

from adapterx.adapter import Array, LowRank

_STEP = 1 << 20


def delta_norm(low_rank: LowRank) -> float:
    """``||b.T @ a||``, as ``sqrt(trace((a a.T) (b b.T)))``: two matrices of ``[r, r]``, never ``[d_out, d_in]``.

    In float64: the sum of terms of both signs loses half of the digits where ``a`` and ``b`` cancel. NaN where a
    weight is not finite.

    Example:
        >>> delta_norm(LowRank(a=np.array([[3.0, 4.0]]), b=np.array([[2.0]])))
        10.0
    """
    if not low_rank.rank:
        return 0.0
    a = low_rank.a.reshape(low_rank.rank, -1).astype(np.float64)
    b = low_rank.b.astype(np.float64)
    squared = float(np.sum((a @ a.T) * (b @ b.T)))
    # The left of two stays where they do not compare: a NaN must not become a zero.
    return math.sqrt(max(squared, 0.0))


def norm(array: Array) -> float:
    """``||array||`` in float64, a megabyte at a time.

    Example:
        >>> norm(np.array([[3, 0], [0, 4]], np.float16))
        5.0
    """
    flat = array.ravel(order="K")
    pieces = (flat[start : start + _STEP].astype(np.float64) for start in range(0, flat.size, _STEP))
    return math.sqrt(sum(float(piece @ piece) for piece in pieces))
