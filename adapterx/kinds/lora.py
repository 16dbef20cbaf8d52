"""LoRA on a linear layer: ``W + s * B @ A`` (Hu et al., arXiv 2106.09685); with a bias of its own, ``lora_bias``.

In a PEFT file: ``lora_A.weight`` ``[r, d_in]``, ``lora_B.weight`` ``[d_out, r]``, with ``lora_bias`` ``lora_B.bias``
``[d_out]``; the scale (alpha / r, or alpha / sqrt(r)) stands in the config. AdaLoRA (Zhang et al., arXiv 2303.10512)
adds ``lora_E`` ``[r, 1]``, which multiplies the rows of ``A``, and scales by alpha / (r + 1e-5).

In a graph: two products beside the base's, and an addition. Ports ``lora_A`` and ``lora_B``; ``shift`` for the bias.

In a mixed batch: the mask picks each row's range of a bank; ``shift`` by the row mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from adapterx.adapter import SHIFT, Array, LowRank

KEYS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_A", "lora_B", "lora_E")

# AdaLoRA divides by the number of ranks that are left, and this.
_ADALORA_EPSILON = 1e-5

Scale = Callable[[int], float]


def read(tensors: Mapping[str, Array], scale: Scale) -> LowRank:
    """A site of a LoRA or AdaLoRA file.

    Args:
        tensors: those of one module, by the end of their names
        scale: the config's factor for a rank

    Raises:
        ValueError: a tensor is missing or misshapen, or a value overflows when it is scaled.
    """
    a, b = paired(tensors, "lora_A.weight" if "lora_A.weight" in tensors else "lora_A")
    factor = scale(len(a))
    if "lora_E" in tensors:
        a = cast(wide(a) * wide(tensors["lora_E"]).reshape(-1, 1), a.dtype, "lora_E * lora_A")
        factor = factor * len(a) / (len(a) + _ADALORA_EPSILON)
    parts = {}
    if "lora_B.bias" in tensors:
        parts[SHIFT] = cast(wide(tensors["lora_B.bias"]).reshape(1, -1) * factor, a.dtype, "lora_B.bias")
    return LowRank(a=a, b=cast(wide(b).T * factor, b.dtype, "lora_B"), parts=parts)


def paired(tensors: Mapping[str, Array], first: str) -> tuple[Array, Array]:
    """``A`` ``[r, ...]`` and ``B`` ``[d_out, r]`` as they lie in the file.

    Raises:
        ValueError: one is missing, or they do not share a rank or a dtype.
    """
    second = first.replace("_A", "_B")
    missing = [name for name in (first, second) if name not in tensors]
    if missing:
        raise ValueError(f"its {missing[0]} is missing; the file has {', '.join(sorted(tensors))}")
    a, b = tensors[first], tensors[second]
    if a.ndim < 2 or b.ndim < 2 or len(a) != b.shape[1]:
        raise ValueError(f"expected [r, d_in] and [d_out, r] of one rank; {first} is {a.shape}, {second} is {b.shape}")
    if a.dtype != b.dtype:
        raise ValueError(f"{first} is {a.dtype}, {second} is {b.dtype}")
    return a, b


def wide(array: Array) -> Array:
    """As float32 (float64 stays): half types would lose bits on the way."""
    return array if array.dtype == np.float64 else array.astype(np.float32)


def cast(array: Array, dtype: np.dtype[np.generic], what: str) -> Array:
    """``array`` in ``dtype``.

    Raises:
        ValueError: finite values become infinite.
    """
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if not np.isfinite(narrow.astype(np.float32)).all() and np.isfinite(array).all():
        raise ValueError(f"{what} overflows {dtype} when it is scaled")
    return narrow


def of_delta(delta: Array, dtype: np.dtype[np.generic]) -> LowRank:
    """A whole matrix ``[d_out, d_in]`` as a change of full rank, exactly: one factor is the identity.

    Example:
        >>> of_delta(np.ones((2, 3)), np.dtype("float32")).rank
        2
    """
    d_out, d_in = delta.shape
    if d_out <= d_in:
        return LowRank(a=delta.astype(dtype), b=np.eye(d_out, dtype=dtype))
    return LowRank(a=np.eye(d_in, dtype=dtype), b=delta.T.astype(dtype))
