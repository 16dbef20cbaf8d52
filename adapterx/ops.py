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


def low_rank_add(
    base: Array, x: Array, a: Array, b: Array, mask: Array | None = None, scale: Array | None = None
) -> Array:
    """``base + ((x @ a.T) * mask) @ b``, the reference that every other form is tested against.

    It sums in float32, of double in double, and rounds once, at the end.

    Args:
        base: ``[..., d_out]``, what the base operation gives for ``x``
        x: ``[..., d_in]``
        a: ``[R, d_in]``, of any float type, or int8 codes
        b: ``[R, d_out]``, scale folded in; of the type of ``a``
        mask: broadcasts against ``x @ a.T``: ``[n, R]`` for ``x`` ``[n, d_in]``, ``[n, 1, R]`` for ``[n, t, d_in]``.
            ``None`` is a mask of ones.
        scale: ``[R, 2]``, what the codes of each row of ``a``, and of ``b``, are multiplied with; ``None`` of floats

    Returns:
        ``[..., d_out]``, in the dtype of ``base``.

    Example:
        >>> import numpy as np
        >>> x = np.ones((1, 2, 4)); a = np.ones((3, 4)); b = np.ones((3, 5)); base = np.zeros((1, 2, 5))
        >>> low_rank_add(base, x, a, b, np.array([[[1.0, 0.5, 0.0]]]))[0, 0]
        array([6., 6., 6., 6., 6.])
    """
    wide = np.float64 if base.dtype == np.float64 else np.float32
    a, b = a.astype(wide), b.astype(wide)
    if scale is not None:
        a, b = a * scale[:, :1].astype(wide), b * scale[:, 1:].astype(wide)
    low = x.astype(wide) @ a.T
    delta: Array = (low if mask is None else low * mask.astype(wide)) @ b
    total: Array = (base.astype(wide) + delta).astype(base.dtype)
    return total


def low_rank_add_function(opset: int, *, activations: ir.DataType | None = None, codes: bool = False) -> ir.Function:
    """The same line as an ONNX function over standard operators.

    Every execution provider can run it as it is; where a kernel of the same domain and name is registered,
    ONNX Runtime calls that instead. Rank 0 (``R = 0``) adds exactly zero.

    A model has one, for all of its sites: where ``a`` and ``b`` are of another type than ``x``, it casts them first.

    Args:
        opset: version of the standard operators in the model that will carry the function
        activations: the type that ``a`` and ``b`` are cast to; ``None`` where they have it, and
            ``DataType.UNDEFINED`` for that of ``x``, where it is not the same at all sites (from opset 15 on)
        codes: ``a`` and ``b`` are int8, and there is ``scale``
    """
    base, x, a, b, mask, scale = (ir.Value(name=name) for name in ("base", "x", "a", "b", "mask", "scale"))
    nodes: list[ir.Node] = []
    ready = []
    for column, factor in enumerate((a, b)):
        nodes += _decoded(factor, scale, column) if codes else []
        value = nodes[-1].outputs[0] if codes else factor
        # Codes times their scale are float32 already.
        if activations is not None and (activations != ir.DataType.FLOAT or not codes):
            nodes.append(_cast(value, x, activations, name=f"{factor.name}_cast"))
            value = nodes[-1].outputs[0]
        ready.append(value)
    turned = _node("a_turned", "Transpose", [ready[0]], perm=[1, 0])
    low = _node("low", "MatMul", [x, turned.outputs[0]])
    masked = _node("masked", "Mul", [low.outputs[0], mask])
    delta = _node("delta", "MatMul", [masked.outputs[0], ready[1]])
    total = _node("y", "Add", [base, delta.outputs[0]])
    inputs = [base, x, a, b, mask, *([scale] if codes else [])]
    nodes += [turned, low, masked, delta, total]
    graph = ir.Graph(inputs, total.outputs, nodes=nodes, opset_imports={"": opset}, name=LOW_RANK_ADD)
    return ir.Function(DOMAIN, LOW_RANK_ADD, graph=graph, attributes=())


def _node(output: str, op_type: str, inputs: list[ir.Value], **attributes: Any) -> ir.Node:
    node = ir.node(op_type, inputs, attributes=attributes)
    node.outputs[0].name = output
    return node


def _decoded(codes: ir.Value, scale: ir.Value, column: int) -> list[ir.Node]:
    """Codes times the scale of their row."""
    which = _node(f"{codes.name}_column", "Constant", [], value=ir.tensor(np.array([column], np.int64)))
    scales = _node(f"{codes.name}_scale", "Gather", [scale, which.outputs[0]], axis=1)
    floats = _cast(codes, codes, ir.DataType.FLOAT, name=f"{codes.name}_codes")
    return [which, scales, floats, _node(f"{codes.name}_values", "Mul", [floats.outputs[0], scales.outputs[0]])]


def _cast(value: ir.Value, like: ir.Value, dtype: ir.DataType, *, name: str) -> ir.Node:
    if dtype == ir.DataType.UNDEFINED:
        return _node(name, "CastLike", [value, like])
    return _node(name, "Cast", [value], to=dtype.value)


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
