"""The weights of a branch as an adapter's: rank first, scale folded in."""

from __future__ import annotations

import numpy as np

from adapterx.adapter import SHIFT, Array, LowRank
from adapterx.errors import ModelError
from adapterx.graph.branches import Branch
from adapterx.graph.view import constant

_WIDEST = 4


def low_rank_of(branch: Branch) -> LowRank:
    """The weights of a branch, scale folded into ``b``; folded in float32, then rounded to the graph's dtype.

    Raises:
        ModelError: the scaled ``b`` does not fit the dtype.
    """
    return folded(branch, branch.a.matrix().T, branch.b.matrix())


def folded(branch: Branch, a: Array, b: Array) -> LowRank:
    """``a`` ``[r, ...]`` and ``b`` ``[r, d_out]`` of ``branch`` with its scale, and its bias as a shift.

    Raises:
        ModelError: the scaled ``b`` does not fit the dtype.
    """
    dtype = branch.a.weight.dtype.numpy()
    if dtype.itemsize > _WIDEST:
        raise ModelError(
            f"{branch.place}: adapter weights are {dtype.name}; adapters are float32 at most, export in float32"
        )
    wide = b.astype(np.float32) * np.float32(branch.scale)
    with np.errstate(over="ignore"):
        scaled = wide.astype(dtype)
    if np.isfinite(wide).all() and not np.isfinite(scaled.astype(np.float32)).all():
        raise ModelError(f"node {branch.b.node.name!r}: B times its scale {branch.scale:g} overflows {dtype.name}")
    parts = {}
    if branch.bias is not None:
        bias = constant(branch.bias)
        if bias is None:
            raise ModelError(
                f"{branch.place}: the adapter's own bias is stored as codes; quantize the export without it"
            )
        parts[SHIFT] = (bias.numpy().astype(np.float32) * np.float32(branch.bias_scale)).astype(dtype).reshape(1, -1)
    return LowRank(a=np.ascontiguousarray(a.astype(dtype)), b=np.ascontiguousarray(scaled), parts=parts)
