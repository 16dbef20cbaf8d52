"""LoRA on a convolution of one, two or three dimensions: a convolution to ``r`` channels, and one of width 1 back.

In a PEFT file: ``lora_A.weight`` ``[r, c_in, *kernel]`` with the base's kernel, stride and padding, and
``lora_B.weight`` ``[c_out, r, 1, ...]``. With groups, PEFT groups ``B`` alone, ``[c_out, r / groups, 1, ...]``; it is
spread here over the ranks that each group reads, zero elsewhere.

In a graph: ``Conv(x, A) -> Conv(., B) -> Mul -> Add``. Ports ``lora_A`` ``[r, c_in, *kernel]``, ``lora_B`` ``[r,
c_out]``. A convolution with no channels is not defined alike everywhere, so the port's default is one rank of zeros.

In a mixed batch: the mask weighs the ``r`` channels between the two convolutions, row by row.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adapterx.adapter import SHIFT, Array, LowRank
from adapterx.kinds.lora import Scale, cast, wide


def read(tensors: Mapping[str, Array], scale: Scale) -> LowRank:
    """A convolution's site of a LoRA file; arguments and errors as for :func:`adapterx.kinds.lora.read`."""
    missing = [name for name in ("lora_A.weight", "lora_B.weight") if name not in tensors]
    if missing:
        raise ValueError(f"its {missing[0]} is missing; the file has {', '.join(sorted(tensors))}")
    a, b = tensors["lora_A.weight"], tensors["lora_B.weight"]
    rank, per_group = len(a), b.shape[1] if b.ndim > 1 else 0
    groups = rank // per_group if per_group else 0
    fits = a.ndim == b.ndim and np.prod(b.shape[2:]) == 1
    if not (fits and groups and rank == groups * per_group and len(b) % groups == 0):
        raise ValueError(f"expected [r, c_in, *kernel] and [c_out, r, 1, ...]; got {a.shape} and {b.shape}")
    factor = scale(rank)
    parts = {}
    if "lora_B.bias" in tensors:
        parts[SHIFT] = cast(wide(tensors["lora_B.bias"]).reshape(1, -1) * factor, a.dtype, "lora_B.bias")
    return LowRank(a=a, b=cast(spread(wide(b), rank) * factor, b.dtype, "lora_B"), parts=parts)


def spread(b: Array, rank: int) -> Array:
    """``[r, c_out]``: each group of output channels reads its own ranks."""
    c_out, per_group = b.shape[:2]
    whole = np.zeros((rank, c_out), b.dtype)
    groups = rank // per_group
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        columns = slice(group * c_out // groups, (group + 1) * c_out // groups)
        whole[rows, columns] = b[columns].reshape(-1, per_group).T
    return whole
