"""Grid: the scales and zero points of an affine quantization, and the codes of values on it.

Everything here works on groups, ``[m, blocks, block, n]``: the elements along axis 2 share one scale and one zero
point, ``[m, blocks, 1, n]``. Blocked, per-axis and per-tensor quantization are that with other numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapterx.adapter import Array

# Elements of one group that are worked on at once: a weight of one group must not be in memory five times.
_AT_ONCE = 1 << 21


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """``value = (code - zero) * scale`` with ``low <= code <= high``, all in float32.

    Args:
        scale: ``[m, blocks, 1, n]``; ONNX Runtime makes negative ones too
        zero: ``[m, blocks, 1, n]``
        low: smallest code
        high: largest code
    """

    scale: Array
    zero: Array
    low: int
    high: int

    def values(self, codes: Array) -> Array:
        """What ``codes`` stand for."""
        values = codes.astype(np.float32)
        values -= self.zero
        values *= self.scale
        return values

    def codes(self, values: Array) -> Array:
        """The nearest codes, as float32. Where the scale is zero, the zero point."""
        with np.errstate(divide="ignore"):
            inverse = np.where(self.scale == 0, np.float32(0), 1 / self.scale)
        codes = values * inverse
        codes += self.zero
        np.rint(codes, out=codes)
        return np.asarray(np.clip(codes, self.low, self.high, out=codes))

    def error(self, values: Array, codes: Array) -> Array:
        """Sum of squared differences by group, ``[m, blocks, 1, n]``."""
        difference = self.values(codes)
        difference -= values
        return np.asarray(np.square(difference, out=difference).sum(axis=2, keepdims=True))


def nearest_codes(values: Array, present: Grid, codes: Array, other: Grid) -> tuple[Array, Array]:
    """The codes of each group on the one of two grids that the numbers fit better.

    Args:
        values: ``[m, blocks, block, n]``
        present: the grid that they lie on now, which is kept when it is no worse
        codes: what they have there; stays where the scale is zero
        other: another grid

    Returns:
        Codes in the type of ``codes``, and for each group, ``[m, blocks, 1, n]``, whether the present grid is kept.
    """
    steps = range(0, values.shape[2], max(1, _AT_ONCE * values.shape[2] // values.size))
    parts = [np.s_[:, :, first : first + steps.step] for first in steps]
    keep = np.asarray(_error(present, values, parts) <= _error(other, values, parts))
    result = np.empty_like(codes)
    for part in parts:
        kept = np.where(present.scale == 0, codes[part], present.codes(values[part]))
        result[part] = np.where(keep, kept, other.codes(values[part]))
    return result, keep


def _error(grid: Grid, values: Array, parts: Sequence[Any]) -> Array:
    total = np.zeros(grid.scale.shape, np.float32)
    for part in parts:
        total += grid.error(values[part], grid.codes(values[part]))
    return total


def around(values: Array, zero: Array, *, low: int, high: int, signed_largest: bool) -> Array:
    """Scales for values whose zero points are given.

    Args:
        values: ``[m, blocks, block, n]``
        zero: ``[m, blocks, 1, n]``
        low: smallest code
        high: largest code
        signed_largest: the element that is largest in magnitude gets the smallest code, whatever its sign, as ONNX
            Runtime's kernels quantize without zero points (``range2scale`` in onnxruntime/core/mlas/lib/q4_dq.cpp);
            else the least scale that clips nothing

    Returns:
        ``[m, blocks, 1, n]``
    """
    least, most = values.min(axis=2, keepdims=True), values.max(axis=2, keepdims=True)
    if signed_largest:
        return np.asarray(np.where(np.abs(most) > np.abs(least), most, least) / (low - zero))
    with np.errstate(divide="ignore", invalid="ignore"):
        upward = np.where(high > zero, np.maximum(most, 0) / (high - zero), 0)
        downward = np.where(zero > low, np.minimum(least, 0) / (low - zero), 0)
    return np.maximum(upward, downward)


def between(values: Array, *, low: int, high: int, whole: bool) -> tuple[Array, Array]:
    """Scales and zero points that spread the codes from the least to the largest value, zero included.

    Args:
        values: ``[m, blocks, block, n]``
        low: smallest code
        high: largest code
        whole: zero points are codes; else any number

    Returns:
        Scale and zero point, ``[m, blocks, 1, n]``.
    """
    least = np.minimum(values.min(axis=2, keepdims=True), 0)
    most = np.maximum(values.max(axis=2, keepdims=True), 0)
    scale = np.asarray((most - least) / np.float32(high - low))
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.where(scale == 0, 0, low - least / scale).astype(np.float32)
    return scale, np.clip(np.rint(zero), low, high) if whole else zero
