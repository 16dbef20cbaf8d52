"""Shapes and types of values: those that the model states, and inferred ones where it states none."""

from __future__ import annotations

import functools
import logging

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass, shape_inference

from adapterx.graph.view import MICROSOFT, STANDARD, all_nodes, attribute
from adapterx.ops import DOMAIN

# ONNX knows nothing of ONNX Runtime's own operators. Of the ones that lie between base operations, most give what
# they read, in other numbers; these attend, and give [n, t, d].
_ATTENTION = frozenset(
    {"Attention", "GroupQueryAttention", "MultiHeadAttention", "PackedAttention", "QAttention"}
    | {"EmbedLayerNormalization"}
)
_TOKENS = 3
_GATHERS = frozenset({"Gather", "GatherBlockQuantized"})
_BROADCAST = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Where", "Max", "Min"}
    | {"MatMul", "FusedMatMul", "TransposeMatMul", "MatMulInteger"}
)
_SAME = frozenset(
    {"Identity", "Cast", "Dropout", "Relu", "Sigmoid", "Tanh", "Erf", "Sqrt", "Exp", "Neg", "Reciprocal", "Clip"}
    | {"Elu", "LeakyRelu", "Gelu", "Softmax", "LayerNormalization", "SimplifiedLayerNormalization"}
    | {"RMSNormalization", "Slice", "Concat", "Transpose", "QuantizeLinear", "DequantizeLinear"}
    | {"DynamicQuantizeLinear"}
)


class Shapes:
    """What is known of a model's values. Inference is run on a copy, once, when something is missing.

    Args:
        model: looked at as it is now; values that come later must state their own shape
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    def rank(self, value: ir.Value) -> int | None:
        """How many dimensions it has, or ``None`` when nothing tells."""
        shape = self.shape(value)
        return self._ranks.get(value) if shape is None else len(shape)

    def shape(self, value: ir.Value) -> ir.Shape | None:
        """Its shape, or ``None`` when nothing tells."""
        if value.shape is not None:
            return value.shape
        found = self._inferred.get(value.name or "")
        return None if found is None else found.shape

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The type of its elements, or ``None`` when nothing tells."""
        if value.dtype is not None:
            return value.dtype
        found = self._inferred.get(value.name or "")
        return None if found is None else found.dtype

    @functools.cached_property
    def _inferred(self) -> dict[str, ir.Value]:
        # It logs a page for a graph that it does not understand to the end; what it found up to there is of use.
        log = logging.getLogger(shape_inference.__name__)
        disabled, log.disabled = log.disabled, True
        infer = ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)
        try:
            model = infer(self._model.clone()).model
        finally:
            log.disabled = disabled
        values = {str(value.name): value for value in model.graph.inputs}
        return values | {str(v.name): v for graph in model.graphs() for node in graph for v in node.outputs}

    @functools.cached_property
    def _ranks(self) -> dict[ir.Value, int]:
        """Numbers of dimensions behind operators that ONNX's inference stops at, told by what they read."""
        ranks: dict[ir.Value, int] = {}
        for node in all_nodes(self._model):
            output = node.outputs[0] if node.outputs else None
            if output is not None and self.shape(output) is None:
                rank = self._told(node, [self._so_far(value, ranks) for value in node.inputs])
                ranks |= {} if rank is None else {output: rank}
        return ranks

    def _so_far(self, value: ir.Value | None, ranks: dict[ir.Value, int]) -> int | None:
        shape = None if value is None else self.shape(value)
        return len(shape) if shape is not None else None if value is None else ranks.get(value)

    def _told(self, node: ir.Node, operands: list[int | None]) -> int | None:
        """Dimensions of a node's first output, given those of its operands; ``None`` when they do not tell."""
        op_type, known = node.op_type, [rank for rank in operands if rank is not None]
        if node.domain not in {*STANDARD, MICROSOFT, DOMAIN} or not operands:
            return None
        if op_type in _ATTENTION and node.domain == MICROSOFT:
            return _TOKENS
        if op_type == "Transpose" and "perm" in node.attributes:
            return len(node.attributes.get_ints("perm"))
        if op_type == "Reshape":
            sizes = None if node.inputs[1] is None else self.shape(node.inputs[1])
            return int(sizes[0]) if sizes is not None and isinstance(sizes[0], int) else None
        if op_type in _GATHERS:
            return sum(known) - 1 if len(known) > 1 else None
        if op_type in _BROADCAST:
            return max(known) if len(known) == len(operands) else None
        kept = op_type.startswith("Reduce") and attribute(node, "keepdims", 1) == 1
        same = kept or op_type in _SAME or node.domain not in STANDARD
        return operands[0] if same else None
