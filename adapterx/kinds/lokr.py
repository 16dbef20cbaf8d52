"""LoKr: ``W + s * kron(w1, w2)``, where either factor may itself be a product (Yeh et al., LyCORIS, arXiv 2309.14859).

In a PEFT file: ``lokr_w1`` ``[o1, i1]`` or ``lokr_w1_a @ lokr_w1_b``; ``lokr_w2`` ``[o2, i2]`` (of a convolution with
its kernel) or ``lokr_w2_a @ lokr_w2_b``. The decomposition with ``lokr_t2`` is refused.

In a graph: TorchScript cannot export it; dynamo folds the change into one matrix. It becomes the ports of plain LoRA:
``kron(l1 @ r1, l2 @ r2) = kron(l1, l2) @ kron(r1, r2)`` exactly, where a factor that is no product is one with the
identity.

In a mixed batch: as LoRA, at the product of the two factors' ranks, at most ``min(d_in, d_out)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adapterx.adapter import Array, LowRank
from adapterx.kinds.lora import Scale, cast, of_delta, wide

KEYS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def read(tensors: Mapping[str, Array], scale: Scale) -> LowRank:
    """A site of a LoKr file; arguments and errors as for :func:`adapterx.kinds.lora.read`."""
    if "lokr_t2" in tensors:
        raise ValueError("LoKr with lokr_t2 (use_effective_conv2d) is not known here; train it without, or merge it")
    (left1, right1), (left2, right2) = _factors(tensors, "lokr_w1"), _factors(tensors, "lokr_w2")
    dtype = next(iter(tensors.values())).dtype
    inner = [len(tensors[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors]
    factor = scale(inner[0] if inner else 0)
    # Of a convolution's factor only the right half has a kernel.
    right1 = right1.reshape(*right1.shape, *[1] * (right2.ndim - 2))
    a, b = np.kron(right1, right2), np.kron(left1, left2).T * factor
    if a.ndim == 2 and len(a) > min(a.shape[1], b.shape[1]):
        return of_delta(cast(b.T @ a, dtype, "the change"), dtype)
    return LowRank(a=cast(a, dtype, "lokr"), b=cast(b, dtype, "lokr"))


def _factors(tensors: Mapping[str, Array], name: str) -> tuple[Array, Array]:
    """Left ``[o, k]`` and right ``[k, i, *kernel]`` factor of ``w1`` or ``w2``, ``k`` as small as is exact."""
    whole = tensors.get(name)
    if whole is None:
        left, right = tensors.get(f"{name}_a"), tensors.get(f"{name}_b")
        if left is None or right is None:
            raise ValueError(
                f"its {name} is missing, and so is {name}_a or {name}_b; it has {', '.join(sorted(tensors))}"
            )
        if left.ndim != 2 or left.shape[1] != len(right):
            raise ValueError(f"expected {name}_a [o, r] and {name}_b [r, i]; got {left.shape} and {right.shape}")
        return wide(left), wide(right)
    if whole.ndim < 2:
        raise ValueError(f"{name} must be a matrix; got {whole.shape}")
    matrix = wide(whole)
    if matrix.ndim == 2 and matrix.shape[1] < len(matrix):
        return matrix, np.eye(matrix.shape[1], dtype=matrix.dtype)
    return np.eye(len(matrix), dtype=matrix.dtype), matrix
