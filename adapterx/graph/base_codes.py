"""The codes of a float weight: what each method of :mod:`adapterx.graph.base_methods` makes of numbers.

A weight comes as rows ``[n, K]``, the outputs of a layer, so that a large one is worked on some rows at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from adapterx.adapter import Array
from adapterx.base_weight import TABLES
from adapterx.errors import ModelError
from adapterx.graph.base_methods import HQQ, RTN, Blocks, Bnb4, block_in_graph
from adapterx.grid import Grid, around, between

_STEPS = 20
# Badri and Shaji's: the norm, and how hard and how fast the rest is pulled towards it.
_NORM, _PULL, _PULL_GROWS, _ROUNDS = 0.7, 10.0, 1.01, 20
_EPSILON = 1e-8
_INT8 = 127
_FRACTIONAL_BITS = 4


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class BlockCodes:
    """``(code - zero) * scale`` by blocks of a row, the last one padded with the code nearest to zero.

    Args:
        codes: uint8 ``[n, blocks, block]``
        scales: ``[n, blocks]``, in the type in which they are stored
        zeros: ``[n, blocks]``, uint8, or of the scales' type where they have fractions; ``None`` is the middle code
    """

    codes: Array
    scales: Array
    zeros: Array | None

    def values(self, bits: int) -> Array:
        """What the codes of ``bits`` stand for, float32 ``[n, blocks * block]``."""
        zeros = np.float32(1 << (bits - 1)) if self.zeros is None else self.zeros.astype(np.float32)[:, :, None]
        values = (self.codes - zeros) * self.scales.astype(np.float32)[:, :, None]
        return np.asarray(values.reshape(len(self.codes), -1))


def finite(rows: Array, name: str) -> Array:
    """``rows`` in float32, none of them NaN or infinite.

    Raises:
        ModelError: some are, or lie beyond float32.
    """
    with np.errstate(over="ignore"):
        wide = np.ascontiguousarray(rows, dtype=np.float32)
    bad = int((~np.isfinite(wide)).sum())
    if bad:
        raise ModelError(f"{name}: {bad} of {wide.size} weights are NaN or infinite; mend the model first")
    return wide


def block_codes(rows: Array, method: Blocks, *, stored: np.dtype[np.generic]) -> BlockCodes:
    """``rows`` float32 ``[n, K]`` in codes of ``method``, with scales of type ``stored``."""
    width = rows.shape[1]
    group = width if method.block_size == -1 else min(method.block_size, width)
    groups = np.pad(rows, ((0, 0), (0, -width % group))).reshape(len(rows), -1, group, 1)
    grid = _grid(groups, method)
    # The codes are chosen for the scale as it is stored, not as it was computed.
    grid = dataclasses.replace(grid, scale=grid.scale.astype(stored).astype(np.float32))
    if isinstance(method, HQQ) and method.bits == _FRACTIONAL_BITS:
        grid = dataclasses.replace(grid, zero=grid.zero.astype(stored).astype(np.float32))
    codes = grid.codes(groups).reshape(len(rows), -1)[:, :width]
    return _in_blocks(codes, grid, group, method, stored)


def _in_blocks(codes: Array, grid: Grid, group: int, method: Blocks, stored: np.dtype[np.generic]) -> BlockCodes:
    """Codes ``[n, K]`` with a scale a group, written in blocks of the graph: scales are repeated, the end is zero."""
    width = codes.shape[1]
    block = block_in_graph(method.block_size, width)
    first = np.arange(-(-width // block)) * block // group
    scales, zeros = (part[:, :, 0, 0][:, first] for part in (grid.scale, grid.zero))
    blocks = np.repeat(np.rint(zeros).astype(np.uint8)[:, :, None], block, axis=2)
    blocks.reshape(len(codes), -1)[:, :width] = codes
    if isinstance(method, RTN) and method.symmetric:
        return BlockCodes(blocks, scales.astype(stored), None)
    fractional = isinstance(method, HQQ) and method.bits == _FRACTIONAL_BITS
    return BlockCodes(blocks, scales.astype(stored), zeros.astype(stored if fractional else np.uint8))


def _grid(groups: Array, method: Blocks) -> Grid:
    high = (1 << method.bits) - 1
    if isinstance(method, RTN) and method.symmetric:
        zero = np.full((*groups.shape[:2], 1, 1), 1 << (method.bits - 1), np.float32)
        return Grid(around(groups, zero, low=0, high=high, signed_largest=True), zero, 0, high)
    if isinstance(method, RTN):
        return Grid(*between(groups, low=0, high=high, whole=True), 0, high)
    return _hqq(groups, method.bits) if isinstance(method, HQQ) else _k_quant(groups, high)


def _k_quant(groups: Array, high: int) -> Grid:
    """Large weights count more; of 21 first grids, each refined by least squares once, the best by that measure."""
    count = groups.shape[2]

    def total(values: Array) -> Array:
        return np.asarray(values.sum(axis=2, keepdims=True))

    importance = np.sqrt(total(groups**2) / count) + np.abs(groups)
    least = np.minimum(groups.min(axis=2, keepdims=True), 0)
    most = np.maximum(groups.max(axis=2, keepdims=True), 0)
    span = np.where(most > least, most - least, 1).astype(np.float32)
    weight, moment = total(importance), total(importance * groups)
    scale, offset = span / np.float32(high), least
    codes = np.clip(np.rint((groups - offset) / scale), 0, high)
    error = total(importance * (scale * codes + offset - groups) ** 2)
    for step in range(_STEPS):
        # From the best offset so far, as llama.cpp does.
        span = np.where(most > offset, most - offset, 1)
        codes = np.clip(np.rint(np.float32(high - 1 + step / 10) / span * (groups - offset)), 0, high)
        linear, square, cross = (total(importance * codes * one) for one in (1, codes, groups))
        determinant = weight * square - linear**2
        # Zero where a group is one number, whose first grid is exact.
        solvable = determinant > _EPSILON * weight * square
        divisor = np.where(solvable, determinant, 1)
        tried = (weight * cross - moment * linear) / divisor
        low = (square * moment - linear * cross) / divisor
        found = total(importance * (tried * codes + low - groups) ** 2)
        better = solvable & (tried > 0) & (found < error)
        error, scale, offset = (np.where(better, *pair) for pair in ((found, error), (tried, scale), (low, offset)))
    return Grid(scale, np.clip(np.rint(-offset / scale), 0, high), 0, high)


def _hqq(groups: Array, bits: int) -> Grid:
    """Zero points such that ``|w - (q - z) s|`` to the power of 0.7 is small; of the rounds the best, by group.

    Where zero points are whole, scales are fitted in their place: rounding takes a fitted zero point back to the first.
    """
    scale, zero = between(groups, low=0, high=(1 << bits) - 1, whole=True)
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    best = grid = Grid(scale, zero, 0, (1 << bits) - 1)
    least, pull = np.full(scale.shape, np.inf, np.float32), _PULL
    for _ in range(_ROUNDS):
        codes = grid.codes(groups)
        rest = groups - grid.values(codes)
        size = np.abs(rest)
        error = size.mean(axis=2, keepdims=True)
        better = error < least
        scale, zero = np.where(better, grid.scale, best.scale), np.where(better, grid.zero, best.zero)
        least, best = np.where(better, error, least), Grid(scale, zero, 0, grid.high)
        aim = groups - np.sign(rest) * np.maximum(size - (size + _EPSILON) ** (_NORM - 1) / pull, 0)
        if bits == _FRACTIONAL_BITS:
            grid = dataclasses.replace(grid, zero=(codes - aim / grid.scale).mean(axis=2, keepdims=True))
        else:
            levels = codes - grid.zero
            square = (levels**2).sum(axis=2, keepdims=True)
            fitted = (levels * aim).sum(axis=2, keepdims=True) / np.where(square == 0, 1, square)
            grid = dataclasses.replace(grid, scale=np.where(fitted > 0, fitted, grid.scale))
        pull *= _PULL_GROWS
    return best


def flat_codes(rows: Array, method: Bnb4) -> tuple[Array, Array]:
    """Blocks of the flat ``[N, K]``: codes, the first of two in the high half of a byte, and the largest by block.

    Returns:
        uint8 ``[ceil(N * K / 2)]`` and float32 ``[blocks]``.
    """
    flat = rows.reshape(-1)
    blocks = np.pad(flat, (0, -flat.size % method.block_size)).reshape(-1, method.block_size)
    largest = np.abs(blocks).max(axis=1)
    values = np.array(TABLES[method.table], np.float32)
    order = np.argsort(values, kind="stable")
    middles = (values[order][1:] + values[order][:-1]) / 2
    packed = np.empty((blocks.size + 1) // 2, np.uint8)
    for part in _parts(len(blocks)):
        scaled = blocks[part] / np.where(largest[part] == 0, 1, largest[part])[:, None]
        codes = order[np.searchsorted(middles, scaled)].astype(np.uint8).reshape(-1, 2)
        at = part.start * method.block_size // 2
        packed[at : at + len(codes)] = codes[:, 0] << 4 | codes[:, 1]
    return packed[: (flat.size + 1) // 2], largest


def _parts(count: int) -> Iterator[slice]:
    step = 1 << 14
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def column_codes(rows: Array) -> tuple[Array, Array]:
    """int8 ``[n, K]`` and float32 ``[n]``: the largest of a row is 127."""
    scale = np.abs(rows).max(axis=1) / np.float32(_INT8)
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.clip(np.rint(rows / scale[:, None]), -_INT8, _INT8).astype(np.int8), scale
