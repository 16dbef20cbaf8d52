"""Constants that a graph computes from constants at each run, as numbers: TorchScript exports hold many of them.

What an exporter that folds (dynamo) stores as one tensor, another computes from several. Both read alike here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from adapterx.adapter import Array
from adapterx.errors import ModelError
from adapterx.graph.view import all_nodes, attribute, is_op
from adapterx.graph.weights import read
from adapterx.kinds.lora import wide

# Vectors are asked for more than once, matrices are not worth their memory.
_KEPT = 1 << 16


class Folding:
    """What of a model is known before the run.

    Args:
        model: looked at once, as it is now
    """

    def __init__(self, model: ir.Model) -> None:
        self._computed: set[ir.Value] = set()
        self._kept: dict[ir.Value, Array] = {}
        for node in all_nodes(model):
            known = node.op_type in _OPERATIONS and is_op(node, node.op_type)
            if known and all(value is None or self.holds(value) for value in node.inputs):
                self._computed.update(node.outputs[:1])

    def holds(self, value: ir.Value | None) -> bool:
        """Whether ``value`` is a constant, or computed from constants."""
        return value is not None and (value in self._computed or ir.convenience.get_const_tensor(value) is not None)

    def array(self, value: ir.Value) -> Array:
        """The numbers, in float32 where they are floats of fewer bits.

        Raises:
            ModelError: the graph's own numbers do not fit together.
        """
        if value in self._kept:
            return self._kept[value]
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            found = read(tensor)
            found = wide(found) if tensor.dtype.is_floating_point() else found
        else:
            found = self._evaluated(value)
        if found.size <= _KEPT:
            self._kept[value] = found
        return found

    def _evaluated(self, value: ir.Value) -> Array:
        node = value.producer()
        assert node is not None, "the caller asked holds()"
        operands = [operand for operand in node.inputs if operand is not None]
        if is_op(node, "MatMul") and self._is_identity(operands[0]):
            # PEFT has a layer's factors multiplied with the identity, which is as large as the layer is wide.
            return self.array(operands[1])
        return self._applied(node, operands)

    def _is_identity(self, value: ir.Value) -> bool:
        node = value.producer()
        like = node.inputs[0] if node is not None and is_op(node, "EyeLike") and "k" not in node.attributes else None
        filled = None if like is None else like.producer()
        if filled is None or not is_op(filled, "ConstantOfShape") or filled.inputs[0] is None:
            return False
        return len(set(self.array(filled.inputs[0]).tolist())) == 1

    def _applied(self, node: ir.Node, values: list[ir.Value]) -> Array:
        operands = [self.array(value) for value in values]
        try:
            return _OPERATIONS[node.op_type](node, *operands)
        except (ValueError, IndexError, TypeError) as cause:
            raise ModelError(f"node {node.name!r} computes nothing from its constants: {cause}") from None

    def dtype(self, value: ir.Value) -> ir.DataType:
        """The element type in which the graph has ``value``."""
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return tensor.dtype
        if value.dtype is not None:
            return value.dtype
        node = value.producer()
        assert node is not None, "the caller asked holds()"
        if is_op(node, "Cast"):
            return ir.DataType(node.attributes.get_int("to"))
        return next(self.dtype(operand) for operand in node.inputs if operand is not None)

    def behind(self, value: ir.Value | None) -> Iterator[ir.Value]:
        """``value`` and all that it is computed from, where it is known before the run."""
        queue, seen = [value], set()
        while queue:
            one = queue.pop()
            if one is None or one in seen or not self.holds(one):
                continue
            seen.add(one)
            yield one
            node = one.producer()
            queue.extend(() if node is None else node.inputs)


def _cast(node: ir.Node, array: Array) -> Array:
    dtype = ir.DataType(node.attributes.get_int("to"))
    if not dtype.is_floating_point():
        return array.astype(dtype.numpy())
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _transpose(node: ir.Node, array: Array) -> Array:
    perm = node.attributes.get("perm")
    return array.transpose(None if perm is None else list(perm.as_ints()))


def _reshape(_: ir.Node, array: Array, shape: Array) -> Array:
    return array.reshape([size or array.shape[i] for i, size in enumerate(shape.tolist())])


def _norm(node: ir.Node, array: Array, axes: Array | None = None) -> Array:
    chosen = node.attributes.get("axes")
    over = tuple(axes.tolist()) if axes is not None else None if chosen is None else tuple(chosen.as_ints())
    return np.asarray(np.linalg.norm(array, axis=over, keepdims=bool(attribute(node, "keepdims", 1))))


def _gemm(node: ir.Node, a: Array, b: Array, c: Array | None = None) -> Array:
    left, right = (m.T if attribute(node, flag, 0) else m for m, flag in ((a, "transA"), (b, "transB")))
    total = left @ right * np.float32(attribute(node, "alpha", 1.0))
    return total if c is None else total + c * np.float32(attribute(node, "beta", 1.0))


def _unsqueeze(node: ir.Node, array: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(array, tuple(node.attributes["axes"].as_ints() if axes is None else axes.tolist()))


def _squeeze(node: ir.Node, array: Array, axes: Array | None = None) -> Array:
    if axes is None and "axes" not in node.attributes:
        return array.squeeze()
    return array.squeeze(tuple(node.attributes["axes"].as_ints() if axes is None else axes.tolist()))


def _filled(node: ir.Node, shape: Array) -> Array:
    value = node.attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
    return np.full(shape.tolist(), fill.reshape(())[()])


def _eye(node: ir.Node, array: Array) -> Array:
    rows, columns = array.shape
    return np.eye(rows, columns, int(attribute(node, "k", 0)), dtype=np.float32)


def _same(_: ir.Node, *arrays: Array) -> Array:
    return arrays[0]


def _binary(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    return lambda _, left, right: function(left, right)


_OPERATIONS: Mapping[str, Callable[..., Array]] = {
    "Identity": _same,
    "Dropout": _same,
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Flatten": lambda node, array: array.reshape(int(np.prod(array.shape[: int(attribute(node, "axis", 1))])), -1),
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _binary(np.divide),
    "MatMul": _binary(np.matmul),
    "Gemm": _gemm,
    "Sqrt": lambda _, array: np.sqrt(array),
    "ReduceL2": _norm,
    "ConstantOfShape": _filled,
    "EyeLike": _eye,
}
