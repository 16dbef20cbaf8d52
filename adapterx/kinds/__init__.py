"""Kinds of adapters: one module each, which says what its file holds, what a graph holds, and how it is mixed.

All kinds come down to the few tensors of :class:`adapterx.adapter.LowRank`. Some do so when their file is read. Those
whose arithmetic has the base weight in it (:data:`adapterx.adapter.ABSOLUTE`) do so when they meet a model:
:func:`lowered`.
"""

from __future__ import annotations

import math

from adapterx.adapter import MAGNITUDE, WHOLE_BIAS, WHOLE_WEIGHT, Array, LowRank
from adapterx.kinds import dora, saved, vera

__all__ = ["lowered", "needs_weight", "shaped"]


def needs_weight(change: LowRank) -> bool:
    """Whether :func:`lowered` looks at the base weight, and not only at its bias."""
    return MAGNITUDE in change.parts or WHOLE_WEIGHT in change.parts


def lowered(change: LowRank, weight: Array | None, bias: Array | None) -> LowRank:
    """``change`` with relative parts only, beside one base.

    Args:
        change: as a reader made it
        weight: the base's, ``[d_out, d_in]`` (an embedding's ``[vocabulary, hidden]``, a convolution's with its kernel
            flattened into ``d_in``); ``None`` where :func:`needs_weight` says that it is not needed
        bias: the base's ``[d_out]``; ``None`` when it has none

    Raises:
        ValueError: the two have no common arithmetic (a row of zeros, an overflow).
    """
    if change.is_relative:
        return change
    if MAGNITUDE in change.parts:
        assert weight is not None, "the caller asked needs_weight"
        return dora.lowered(change, weight, bias)
    assert change.parts.keys() & {WHOLE_BIAS, WHOLE_WEIGHT}, "no other part is absolute"
    return saved.lowered(change, weight, bias)


def shaped(change: LowRank, d_in: int, kernel: tuple[int, ...], *, peft_type: str) -> LowRank:
    """``change`` in the shape that only the model knows: VeRA's columns, the kernel that LoHa files flatten.

    A linear layer takes the change of a convolution of width 1, which some versions of a model have in its place.

    Args:
        change: as a reader made it
        d_in: features that the base reads, or channels
        kernel: of the base, empty unless it is a convolution
        peft_type: of the file, ``""`` where it told none
    """
    if not change.rank:
        return change
    if peft_type == "VERA":
        return vera.cut(change, d_in)
    if kernel and not change.kernel and change.d_in == d_in * math.prod(kernel):
        return LowRank(a=change.a.reshape(change.rank, d_in, *kernel), b=change.b, parts=change.parts)
    if not kernel and change.kernel and math.prod(change.kernel) == 1:
        return LowRank(a=change.a.reshape(change.rank, -1), b=change.b, parts=change.parts)
    return change
