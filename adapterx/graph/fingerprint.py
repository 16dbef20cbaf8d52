"""The fingerprint of a base: a hash by which two exports of one checkpoint know each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from adapterx.graph.quantized_linear import any_linear
from adapterx.graph.view import Constant
from adapterx.graph.weights import read_diagonal

_SAMPLES = 8


def fingerprint_of(bases: Iterable[tuple[str, ir.Node | None]]) -> str:
    """SHA-256 (hex) over the sites' names and the signs of a few weights on each base matrix's diagonal.

    Signs on the diagonal survive transposition and casts, so two exports of one checkpoint agree. ``""``, which
    compares with nothing, when no base weight can be read, or when one is quantized: rounding to 4 bits makes one
    number in ten zero, whatever its sign was, so that no hash of a quantized base is that of the float one.

    Args:
        bases: names of the sites of linear layers, with their base operations
    """
    rows = []
    for name, op in bases:
        matrix = None if op is None else any_linear(op)
        if matrix is None:
            continue
        if not isinstance(matrix.weight, Constant):
            return ""
        rows.append(f"{name}\0{_signs(matrix.weight.tensor)}")
    return hashlib.sha256("\n".join(sorted(set(rows))).encode()).hexdigest() if rows else ""


def _signs(matrix: ir.TensorProtocol) -> str:
    size = min(int(dim) for dim in matrix.shape.numpy())
    picks = np.linspace(0, size - 1, num=min(_SAMPLES, size), dtype=np.int64)
    return "".join("-" if element < 0 else "+" for element in read_diagonal(matrix, picks))
