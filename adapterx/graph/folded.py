"""Constants that a graph computes from constants at each run, as numbers: TorchScript exports hold many of them.

What an exporter that folds (dynamo) stores as one tensor, another computes from several. Both read alike here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from adapterx.adapter import Array
from adapterx.errors import ModelError
from adapterx.graph.view import all_nodes, is_op
from adapterx.graph.weights import read
from adapterx.kinds.lora import wide

# Vectors are asked for more than once, matrices are not worth their memory.
_KEPT = 1 << 16
# What exporters leave to be computed of weights. What makes much of little is measured first.
_FUNCTIONS = (
    *("Identity", "Dropout", "Cast", "CastLike", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Shape"),
    *("Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "Pow", "Equal", "Where", "MatMul", "Gemm", "EyeLike"),
    *("ReduceL2", "ReduceSum", "ReduceSumSquare", "Concat", "Split", "Slice", "Gather"),
    *("ConstantOfShape", "Expand", "Range"),
)
_MOST = 1 << 28


class Folding:
    """What of a model is known before the run.

    Args:
        model: looked at once, as it is now
    """

    def __init__(self, model: ir.Model) -> None:
        self._opset = model.opset_imports.get("", 1)
        self._computed: set[ir.Value] = set()
        self._kept: dict[ir.Value, Array] = {}
        for node in all_nodes(model):
            known = is_op(node, *_FUNCTIONS) and node.inputs
            if known and all(value is None or self.holds(value) for value in node.inputs):
                self._computed.update(node.outputs)

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
        found = self._evaluated(value) if tensor is None else _widened(read(tensor))
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
        return self._applied(node, value)

    def _is_identity(self, value: ir.Value) -> bool:
        node = value.producer()
        like = node.inputs[0] if node is not None and is_op(node, "EyeLike") and "k" not in node.attributes else None
        filled = None if like is None else like.producer()
        if filled is None or not is_op(filled, "ConstantOfShape") or filled.inputs[0] is None:
            return False
        return len(set(self.array(filled.inputs[0]).tolist())) == 1

    def _applied(self, node: ir.Node, value: ir.Value) -> Array:
        from onnx.reference import ReferenceEvaluator  # noqa: PLC0415 - slow to import, and few graphs need it

        feeds = {str(operand.name): self.array(operand) for operand in node.inputs if operand is not None}
        _refuse_huge(node, list(feeds.values()))
        opset = node.version or self._opset
        try:
            results = list(ReferenceEvaluator(ir.to_proto(node), opsets={"": opset}).run(None, feeds))
            return _widened(np.asarray(results[value.index() or 0]))
        except Exception as cause:  # the evaluator's errors share no other class
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


def _widened(array: Array) -> Array:
    """Half types in float32: numpy is slow with them."""
    return wide(array) if array.dtype.kind == "f" or array.dtype.name == "bfloat16" else array


def _refuse_huge(node: ir.Node, operands: list[Array]) -> None:
    """A small file must not take all memory."""
    sizes = {"ConstantOfShape": operands[0], "Expand": operands[-1]}.get(node.op_type)
    count = 0.0 if sizes is None else float(np.prod(sizes.astype(np.float64)))
    if node.op_type == "Range":
        start, limit, step = (float(operand.reshape(())) for operand in operands)
        count = (limit - start) / step if step else np.inf
    if count > _MOST:
        raise ModelError(f"node {node.name!r} makes {count:.0f} numbers of constants; at most {_MOST} are computed")
