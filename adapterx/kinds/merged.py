"""A change folded into the weight and bias that it acts on, a block at a time.

    W' = (1 + input_gain) * W * (1 + gain) + a.T @ b        bias' = bias * (1 + gain) + shift

All kinds come down to these two lines; what is absolute in a kind meets the weight first
(:func:`adapterx.kinds.lowered`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from adapterx.adapter import GAIN, INPUT_GAIN, SHIFT, WHOLE_WEIGHT, Array, LowRank
from adapterx.kinds import lowered, needs_weight
from adapterx.kinds.lora import wide

ALL = slice(None)
# OpenBLAS takes one thread for as many multiplications (interface/gemm.c), which at higher ranks are too small tiles.
_ONE_THREAD = 1 << 18
_LOW = 64


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Merger:
    """A change beside one weight ``[d_in, d_out]``, the amount of it multiplied in.

    Args:
        a: ``[r, d_in]``
        b: ``[r, d_out]``
        gain: ``[d_out]``, ``None`` for none; likewise the others
        input_gain: ``[d_in]``
        shift: ``[d_out]``
        whole: ``[d_in, d_out]``, what the weight is replaced with by ``amount``
        amount: how much of ``whole`` the sum has
        undo: take the change out of a weight that it was merged into
    """

    a: Array
    b: Array
    gain: Array | None = None
    input_gain: Array | None = None
    shift: Array | None = None
    whole: Array | None = None
    amount: float = 1.0
    undo: bool = False

    @property
    def changes_weight(self) -> bool:
        """The weight does not stay as it is."""
        return bool(len(self.a)) or any(part is not None for part in (self.gain, self.input_gain, self.whole))

    @property
    def changes_bias(self) -> bool:
        """A bias does not stay as it is, or one is needed."""
        return self.shift is not None or self.gain is not None

    def weight(self, block: Array, rows: slice = ALL, columns: slice = ALL) -> Array:
        """A block of the weight with the change added.

        Args:
            block: ``[rows, columns]`` of the weight, float32
            rows: which of ``d_in``
            columns: which of ``d_out``
        """
        if self.undo:
            return self._before(block, rows, columns)
        total = block
        if self.whole is not None:
            # Not block + amount * (whole - block), which would not be `whole` when amount is 1.
            part = wide(self.whole[rows, columns]) * np.float32(self.amount)
            total = part if self.amount == 1 else part + block * np.float32(1 - self.amount)
        if self.input_gain is not None:
            total = total * (1 + self.input_gain[rows, None])
        if self.gain is not None:
            total = total * (1 + self.gain[columns])
        if len(self.a):
            delta = self._delta(total, rows, columns)
            # In place, in the memory that the product took anyway.
            total = np.add(delta, total, out=delta)
        return total

    def _delta(self, beside: Array, rows: slice, columns: slice) -> Array:
        """``a.T @ b``, in the order of what it is added to: a sum across two orders is several times slower."""
        a, b = self.a[:, rows], self.b[:, columns]
        return _product(a, b) if beside.flags.c_contiguous else _product(b, a).T

    def _before(self, block: Array, rows: slice, columns: slice) -> Array:
        total = block - self._delta(block, rows, columns) if len(self.a) else block
        if self.gain is not None:
            total = total / (1 + self.gain[columns])
        return total if self.input_gain is None else total / (1 + self.input_gain[rows, None])

    def bias(self, bias: Array | None) -> Array | None:
        """The bias ``[d_out]`` with the change in it; ``None`` where there is none, and none is needed."""
        if bias is None:
            return None if self.shift is None else -self.shift if self.undo else self.shift
        total = wide(bias).reshape(-1)
        if self.undo:
            total = total if self.shift is None else total - self.shift
            return total if self.gain is None else total / (1 + self.gain)
        if self.gain is not None:
            total = total * (1 + self.gain)
        return total if self.shift is None else total + self.shift

    def undone(self) -> Merger:
        """What takes the change out again: exactly its inverse, but for rounding.

        Raises:
            ValueError: a gain that made zeros of numbers.
        """
        gains = [part for part in (self.gain, self.input_gain) if part is not None]
        if self.whole is not None or any((part == -1).any() for part in gains):
            raise ValueError("it replaced numbers, which are not in the merged weight any more; keep the base model")
        return dataclasses.replace(self, undo=True)


def merger(
    change: LowRank,
    shape: tuple[int, int],
    *,
    amount: float,
    weight: Callable[[], Array],
    bias: Array | None,
    whole_rows_first: bool = False,
) -> Merger:
    """What merges ``amount`` times ``change`` into one weight.

    A fraction of a change is what a session does with an adapter that has this weight in a row: of DoRA, that fraction
    of the way to it; gains and low-rank terms are scaled one by one.

    Args:
        change: as a reader made it
        shape: ``(d_in, d_out)`` of the weight; a convolution's kernel counts to ``d_in``
        amount: 1 for all of it, -1 to take it out
        weight: reads the weight ``[d_in, d_out]``; only called when the change cannot do without
        bias: ``[d_out]``, ``None`` when the base has none
        whole_rows_first: a weight trained in full lies ``[d_in, d_out]`` (embeddings, ``Conv1D``), not turned

    Raises:
        ValueError: they do not fit; the message says expected against met.
    """
    _check(change, shape, whole_rows_first)
    whole = None
    if WHOLE_WEIGHT in change.parts:
        whole = change.parts[WHOLE_WEIGHT] if whole_rows_first else change.parts[WHOLE_WEIGHT].T
        parts = {name: part for name, part in change.parts.items() if name != WHOLE_WEIGHT}
        change = LowRank(a=change.a, b=change.b, parts=parts)
    if not change.is_relative:
        change = lowered(change, weight().T if needs_weight(change) else None, bias)
    scale = np.float32(amount)
    parts = {name: wide(part).reshape(-1) * scale for name, part in change.parts.items()}
    return Merger(
        a=wide(change.a).reshape(change.rank, shape[0] if change.rank else 0),
        b=wide(change.b) * scale,
        gain=parts.get(GAIN),
        input_gain=_per_input(parts.get(INPUT_GAIN), shape[0]),
        shift=parts.get(SHIFT),
        whole=whole,
        amount=amount,
    )


def _product(left: Array, right: Array) -> Array:
    """``left.T @ right`` in tiles that OpenBLAS computes without waking its other threads.

    Those spin for each other, and on a machine that does other work too a merge takes ten times as long.
    """
    rank, height = left.shape
    width = right.shape[1]
    if not 0 < rank <= _LOW or left.dtype != np.float32:
        return left.T @ right
    out = np.empty((height, width), np.float32)
    across = width >= height
    step = max(1, _ONE_THREAD // (rank * (height if across else width)))
    for first in range(0, width if across else height, step):
        tile = slice(first, first + step)
        if across:
            np.matmul(left.T, right[:, tile], out=out[:, tile])
        else:
            np.matmul(left[:, tile].T, right, out=out[tile])
    return out


def _per_input(gain: Array | None, d_in: int) -> Array | None:
    # A convolution's kernel takes each channel several times.
    return None if gain is None else np.repeat(gain, d_in // gain.size)


def _check(change: LowRank, shape: tuple[int, int], whole_rows_first: bool) -> None:
    d_in, d_out = shape
    faults = []
    expected: dict[str, tuple[int, ...]] = {WHOLE_WEIGHT: shape if whole_rows_first else shape[::-1]}
    if change.rank and (change.a[0].size, change.d_out) != shape:
        faults.append(f"the adapter is {change.a.shape[1:]} -> {change.d_out}, the weight is {d_in} -> {d_out}")
    for name, part in change.parts.items():
        fits = part.shape == expected.get(name, (1, d_out))
        if name == INPUT_GAIN:
            fits = bool(part.size) and d_in % part.size == 0
        if not fits:
            faults.append(f"its {name} is {part.shape}, the weight is {d_in} -> {d_out}")
    if faults:
        raise ValueError("; ".join(faults))
