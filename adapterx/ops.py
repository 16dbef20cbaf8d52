"""LowRankAdd: the one formula of adapterx, as numpy and as an ONNX function, side by side; and RowVector beside it.

    y = base + ((x @ a.T) * mask) @ b          v = mask @ vectors

``docs/ops.md`` explains shapes and masks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

DOMAIN = "ai.adapterx"
VERSION = 1
LOW_RANK_ADD = "LowRankAdd"
ROW_VECTOR = "RowVector"

Array = NDArray[Any]


def low_rank_add(base: Array, x: Array, a: Array, b: Array, mask: Array | None = None) -> Array:
    """``base + ((x @ a.T) * mask) @ b``, the reference that every other form is tested against.

    Args:
        base: ``[..., d_out]``, what the base operation gives for ``x``
        x: ``[..., d_in]``
        a: ``[R, d_in]``
        b: ``[R, d_out]``, scale folded in
        mask: broadcasts against ``x @ a.T``: ``[n, R]`` for ``x`` ``[n, d_in]``, ``[n, 1, R]`` for ``[n, t, d_in]``.
            ``None`` is a mask of ones.

    Returns:
        ``[..., d_out]``, in the dtype of ``base``.

    Example:
        >>> import numpy as np
        >>> x = np.ones((1, 2, 4)); a = np.ones((3, 4)); b = np.ones((3, 5)); base = np.zeros((1, 2, 5))
        >>> low_rank_add(base, x, a, b, np.array([[[1.0, 0.5, 0.0]]]))[0, 0]
        array([6., 6., 6., 6., 6.])
    """
    low = x @ a.T
    total: Array = base + ((low if mask is None else low * mask) @ b)
    return total


def low_rank_add_function(opset: int) -> ir.Function:
    """The same line as an ONNX function over standard operators.

    Every execution provider can run it as it is; where a kernel of the same domain and name is registered,
    ONNX Runtime calls that instead. Rank 0 (``R = 0``) adds exactly zero.

    Args:
        opset: version of the standard operators in the model that will carry the function
    """
    base, x, a, b, mask = (ir.Value(name=name) for name in ("base", "x", "a", "b", "mask"))
    turned = ir.node("Transpose", [a], attributes={"perm": [1, 0]})
    low = ir.node("MatMul", [x, turned.outputs[0]])
    masked = ir.node("Mul", [low.outputs[0], mask])
    delta = ir.node("MatMul", [masked.outputs[0], b])
    total = ir.node("Add", [base, delta.outputs[0]])
    nodes = [turned, low, masked, delta, total]
    for node, name in zip(nodes, ("a_turned", "low", "masked", "delta", "y"), strict=True):
        node.outputs[0].name = name
    graph = ir.Graph([base, x, a, b, mask], total.outputs, nodes=nodes, opset_imports={"": opset}, name=LOW_RANK_ADD)
    return ir.Function(DOMAIN, LOW_RANK_ADD, graph=graph, attributes=())


def row_vector(vectors: Array, mask: Array) -> Array:
    """``mask @ vectors``: what each row of a batch picks of the adapters' vectors (gains, shifts).

    Args:
        vectors: ``[K, d]``, one row an adapter; ``K = 0`` is no adapter
        mask: ``[n, K]`` for rows ``[n, d]``, ``[n, 1, K]`` for ``[n, t, d]``; a last dimension of 1 stands for ``K``
            times the same

    Returns:
        ``[n, d]`` or ``[n, 1, d]``; zeros when ``K = 0``.

    Example:
        >>> import numpy as np
        >>> row_vector(np.zeros((0, 2)), np.ones((1, 1)))
        array([[0., 0.]])
    """
    spread: Array = np.broadcast_to(mask, (*mask.shape[:-1], len(vectors)))
    picked: Array = spread @ vectors
    return picked


def row_vector_function(opset: int) -> ir.Function:
    """:func:`row_vector` as an ONNX function over standard operators.

    Args:
        opset: version of the standard operators in the model that will carry the function
    """
    vectors, mask = (ir.Value(name=name) for name in ("vectors", "mask"))
    first = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([0], np.int64))})
    shape = ir.node("Shape", [vectors])
    count = ir.node("Gather", [shape.outputs[0], first.outputs[0]])
    spread = ir.node("Expand", [mask, count.outputs[0]])
    picked = ir.node("MatMul", [spread.outputs[0], vectors])
    nodes = [first, shape, count, spread, picked]
    for node, name in zip(nodes, ("first", "shape", "count", "spread", "v"), strict=True):
        node.outputs[0].name = name
    graph = ir.Graph([vectors, mask], picked.outputs, nodes=nodes, opset_imports={"": opset}, name=ROW_VECTOR)
    return ir.Function(DOMAIN, ROW_VECTOR, graph=graph, attributes=())
