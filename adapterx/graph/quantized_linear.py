"""Linear operations whose weight a graph holds as codes: MatMulNBits, MatMulInteger, DequantizeLinear and a product."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from adapterx.adapter import Array
from adapterx.base_weight import SCALE, WEIGHT, BaseWeight, read_weight
from adapterx.graph.stored import base_weight_of, dequantized_product, tensor_reader
from adapterx.graph.view import MICROSOFT, SAME_VALUE, STANDARD, Linear, attribute, constant, is_op, linear

# Where the optional bias of an operator is. Those of MatMulInteger and MatMul are nodes of their own.
_BIAS = {"MatMulNBits": 5, "DynamicQuantizeMatMul": 4, "MatMulIntegerToFloat": 6, "Gemm": 2, "FusedGemm": 2}
_OF_FLOATS = ("MatMul", "Gemm", "FusedMatMul", "TransposeMatMul", "FusedGemm")
_WITH_SCALES = ("MatMulNBits", "MatMulBnb4", "DynamicQuantizeMatMul")
_OF_INTEGERS = ("MatMulInteger", "MatMulIntegerToFloat")
OF_CODES = (*_WITH_SCALES, *_OF_INTEGERS)
"""Operators that take codes where others take numbers."""
_IN_BETWEEN = ("DequantizeLinear", "Transpose", *SAME_VALUE)
_MATRIX = 2


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A weight ``[d_in, d_out]`` that is stored as codes with scales; what :class:`view.Constant` is for floats.

    Args:
        root: the codes
        stored: how the numbers are to be had from them; its factor is 1
        by_name: the tensors that ``stored`` names
        dtype: of the numbers in the graph
    """

    root: ir.Value
    stored: BaseWeight
    by_name: Mapping[str, ir.Value]
    dtype: ir.DataType

    def numpy(self) -> Array:
        """The numbers that the codes stand for, in float32."""
        return read_weight(self.stored, tensor_reader(self.by_name))

    @property
    def shape(self) -> tuple[int, ...]:
        """``(d_in, d_out)``, whatever the storage pads."""
        return self.stored.d_in, self.stored.d_out

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """The codes, scales and zero points."""
        return tuple(self.by_name.values())


def any_linear(node: ir.Node) -> Linear | None:
    """``node`` as a :class:`Linear`, whether its weight is stored as numbers or as codes; else ``None``.

    What is several nodes in the graph is one linear operation here: of ``DynamicQuantizeLinear -> MatMulInteger -> Cast
    -> Mul``, ``node`` is the MatMulInteger, ``x`` the float above and ``output`` the product below.
    """
    found = linear(node)
    return found if found is not None else _quantized(node)


def _quantized(node: ir.Node) -> Linear | None:
    x = _operand(node)
    stored = None if x is None else base_weight_of(node)
    if x is None or stored is None or not stored.quantized or constant(x) is not None:
        return None
    if stored.form not in {"in_out", "out_in"} or len(stored.shape) != _MATRIX:
        return None
    product = dequantized_product(node)
    by_name = _constants_of(node, product.scale)
    by_name = {name: by_name[name] for name in stored.tensors.values()}
    scale = constant(by_name[stored.tensors[SCALE]])
    assert scale is not None, "a base weight names constants"
    slot = _BIAS.get(node.op_type, len(node.inputs))
    codes = Codes(by_name[stored.tensors[WEIGHT]], stored, by_name, scale.dtype)
    return Linear(
        node=node,
        x=x,
        weight=codes,
        flipped=False,
        factor=attribute(node, "alpha", 1.0),
        addend=node.inputs[slot] if slot < len(node.inputs) else None,
        addend_factor=attribute(node, "beta", 1.0),
        product=product.output,
    )


def _operand(node: ir.Node) -> ir.Value | None:
    """The floats that ``node`` multiplies, above the quantization of them that belongs to it."""
    anywhere = (*STANDARD, MICROSOFT)
    if is_op(node, *_OF_FLOATS, *_WITH_SCALES, domain=anywhere):
        return node.inputs[0]
    if is_op(node, *_OF_INTEGERS, domain=anywhere):
        codes = node.inputs[0]
        quantize = None if codes is None else codes.producer()
        return quantize.inputs[0] if quantize is not None and is_op(quantize, "DynamicQuantizeLinear") else None
    return None


def _constants_of(node: ir.Node, scale: ir.Value | None) -> dict[str, ir.Value]:
    """Constants by name that ``node`` reads, directly or through nodes that read nothing else."""
    found = {}
    queue = [scale, *node.inputs[1:]]
    while queue:
        value = queue.pop()
        root = constant(value)
        if root is not None:
            found[str(root.root.name)] = root.root
        elif value is not None and (producer := value.producer()) is not None and is_op(producer, *_IN_BETWEEN):
            queue.extend(producer.inputs)
    return found
