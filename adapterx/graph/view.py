"""A normalised view of a graph: what a value is behind Identity, Cast, Transpose, Dropout and Reshape.

Nothing here changes the graph. Exporters and optimizers wrap the same arithmetic in different nodes; the
matchers in :mod:`adapterx.graph.branches` see through them with these functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import onnx_ir as ir

from adapterx.base_weight import SCALE, WEIGHT, ZERO, BaseWeight, read_weight
from adapterx.graph.weights import read

MICROSOFT = "com.microsoft"
STANDARD = ("", "ai.onnx")
SAME_VALUE = frozenset({"Identity", "Cast", "Dropout", "CastLike"})
SAME_ROWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
QUANTIZERS = ("DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear")
_CODE_BITS = 8


def is_op(node: ir.Node | None, *op_types: str, domain: tuple[str, ...] = STANDARD) -> bool:
    """Whether ``node`` is one of ``op_types`` in ``domain`` (by default the standard one)."""
    return node is not None and node.op_type in op_types and node.domain in domain


def attribute(node: ir.Node, name: str, default: float) -> float:
    """A numeric attribute, or its default."""
    found = node.attributes.get(name)
    return default if found is None else float(found.value)


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of the main graph and of the graphs inside it, in graph order."""
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A value known before the run.

    Args:
        root: the initializer, or the output of the Constant node, at the far end
        tensor: its content; external data stays on disk until ``numpy()`` is called
        transposed: a 2-D Transpose (or an odd number of them) lies between
        dtype: as the consumer sees it, after a Cast
    """

    root: ir.Value
    tensor: ir.TensorProtocol
    transposed: bool
    dtype: ir.DataType

    def numpy(self) -> np.ndarray:
        """The content as the consumer sees it."""
        array = read(self.tensor)
        return array.T if self.transposed else array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as the consumer sees it."""
        shape = tuple(int(d) for d in self.tensor.shape.numpy())
        return shape[::-1] if self.transposed else shape

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """What the graph stores of it."""
        return (self.root,)


class Weight(Protocol):
    """A weight that is known before the run, in numbers (:class:`Constant`) or as codes."""

    @property
    def root(self) -> ir.Value:
        """What holds most of it."""

    @property
    def dtype(self) -> ir.DataType:
        """Of the numbers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the consumer sees it."""

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """Everything that the graph stores of it."""

    def numpy(self) -> np.ndarray:
        """The numbers as the consumer sees them."""


def constant(value: ir.Value | None) -> Constant | None:
    """The constant behind ``value``, or ``None`` when it depends on the run."""
    transposed = False
    dtype: ir.DataType | None = None
    while value is not None:
        node = value.producer()
        if node is None or is_op(node, "Constant"):
            tensor = ir.convenience.get_const_tensor(value)
            return None if tensor is None else Constant(value, tensor, transposed, dtype or tensor.dtype)
        if is_op(node, "Transpose"):
            perm = node.attributes.get_ints("perm", None) if "perm" in node.attributes else None
            if perm is not None and list(perm) != [1, 0]:
                return None
            transposed = not transposed
        elif not is_op(node, *SAME_VALUE):
            return None
        if is_op(node, "Cast") and dtype is None:
            dtype = ir.DataType(node.attributes.get_int("to"))
        value = node.inputs[0]
    return None


def scalar(value: ir.Value | None) -> float | None:
    """The number behind a constant of one element, quantized or not, or ``None``."""
    found = constant(value)
    node = None if value is None else value.producer()
    if found is None and node is not None and is_static_quantizer(node):
        return _dequantized(node)
    if found is None or found.tensor.size != 1:
        return None
    return float(read(found.tensor).astype(np.float64).reshape(()))


def _dequantized(node: ir.Node) -> float | None:
    """The number that DequantizeLinear makes of one code; of what was a number before, that number."""
    if (quantize := _quantize_before(node)) is not None:
        return scalar(quantize.inputs[0])
    names = dict(zip((WEIGHT, SCALE, ZERO), node.inputs, strict=False))
    parts = {role: constant(value) for role, value in names.items() if value is not None}
    tensors = {role: part.tensor for role, part in parts.items() if part is not None}
    if node.op_type != "DequantizeLinear" or len(tensors) < len(parts) or any(t.size != 1 for t in tensors.values()):
        return None
    codes = tensors[WEIGHT].dtype
    if codes.bitwidth != _CODE_BITS:
        return None
    signed = codes == ir.DataType.INT8
    ref = BaseWeight("in_out", (1, 1), {r: r for r in tensors}, storage="affine", bits=_CODE_BITS, signed=signed)
    return float(read_weight(ref, lambda role: read(tensors[role])).item())


def _quantize_before(node: ir.Node) -> ir.Node | None:
    codes = node.inputs[0]
    found = None if codes is None else codes.producer()
    return found if found is not None and found.op_type == "QuantizeLinear" else None


def is_static_quantizer(node: ir.Node) -> bool:
    """Whether ``node`` puts activations on a grid that was chosen before the run, or takes them from it."""
    return is_op(node, "QuantizeLinear", "DequantizeLinear", domain=(*STANDARD, MICROSOFT))


def is_fixed(value: ir.Value | None) -> bool:
    """Whether ``value`` is known before the run, in numbers or as codes that are dequantized."""
    while value is not None and constant(value) is None:
        node = value.producer()
        if node is None or not is_static_quantizer(node):
            return False
        value = node.inputs[0]
    return value is not None


def source(value: ir.Value) -> ir.Value:
    """Where a value really comes from: up through what keeps its numbers, or (Reshape, quantizers) what a row means."""
    while (node := value.producer()) is not None:
        through = is_op(node, *SAME_VALUE, *SAME_ROWS) or is_op(node, *QUANTIZERS, domain=(*STANDARD, MICROSOFT))
        if not through or node.inputs[0] is None or node.outputs[0] is not value:
            break
        value = node.inputs[0]
    return value


def scaled(value: ir.Value) -> tuple[ir.Value, float]:
    """Up through Identity, Cast, Dropout, static quantizers and constant factors: the value and the total factor."""
    factor = 1.0
    while (node := value.producer()) is not None and node.outputs[0] is value:
        if (is_op(node, *SAME_VALUE) or is_static_quantizer(node)) and node.inputs[0] is not None:
            value = node.inputs[0]
        elif (step := times(node)) is not None:
            value, factor = step[0], factor * step[1]
        else:
            break
    return value, factor


def times(node: ir.Node) -> tuple[ir.Value, float] | None:
    """``(operand, factor)`` when ``node`` multiplies or divides by a constant scalar, else ``None``."""
    if not is_op(node, "Mul", "Div"):
        return None
    left, right = node.inputs
    if left is None or right is None:
        return None
    if (number := scalar(right)) is not None:
        return left, (number if node.op_type == "Mul" else 1.0 / number if number else float("inf"))
    if node.op_type == "Mul" and (number := scalar(left)) is not None:
        return right, number
    return None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """``x @ weight * factor (+ addend)`` with a constant weight, whatever operator says it.

    Args:
        node: MatMul, Gemm, FusedMatMul, FusedGemm or one that multiplies with codes
        x: the operand that depends on the run
        weight: the constant; ``weight.shape`` is how the node sees it
        flipped: the node itself transposes the weight (``transB``)
        factor: ``alpha``
        addend: Gemm's ``C``, ``None`` when it is absent or all zero
        addend_factor: ``beta``
        product: where ``node`` alone does not give the result (products of integers are scaled afterwards), what does
    """

    node: ir.Node
    x: ir.Value
    weight: Weight
    flipped: bool
    factor: float = 1.0
    addend: ir.Value | None = None
    addend_factor: float = 1.0
    product: ir.Value | None = None

    @property
    def output(self) -> ir.Value:
        """The result."""
        return self.node.outputs[0] if self.product is None else self.product

    @property
    def d_in(self) -> int:
        """Features that come in."""
        return self.weight.shape[1 if self.flipped else 0]

    @property
    def d_out(self) -> int:
        """Features that go out."""
        return self.weight.shape[0 if self.flipped else 1]

    def matrix(self) -> np.ndarray:
        """The weight as ``[d_in, d_out]``."""
        array = self.weight.numpy()
        return array.T if self.flipped else array


def linear(node: ir.Node) -> Linear | None:
    """``node`` as a :class:`Linear` if its weight is stored as numbers, else ``None`` (``any_linear`` reads codes)."""
    gemm = is_op(node, "Gemm") or is_op(node, "FusedGemm", domain=(MICROSOFT,))
    fused = is_op(node, "FusedMatMul", "TransposeMatMul", domain=(MICROSOFT,))
    if not (gemm or fused or is_op(node, "MatMul")):
        return None
    if any(attribute(node, flag, 0) for flag in ("transA", "transBatchA", "transBatchB")):
        return None
    x, weight = node.inputs[0], constant(node.inputs[1])
    if x is None or weight is None or len(weight.shape) != 2 or constant(x) is not None:
        return None
    addend = node.inputs[2] if gemm and len(node.inputs) > 2 else None
    return Linear(
        node=node,
        x=x,
        weight=weight,
        flipped=bool(attribute(node, "transB", 0)),
        factor=attribute(node, "alpha", 1.0),
        addend=None if is_zero(addend) else addend,
        addend_factor=attribute(node, "beta", 1.0),
    )


def is_zero(value: ir.Value | None) -> bool:
    """Whether ``value`` is absent, or constant zeros; also zeros that a run makes larger (dynamo's absent bias)."""
    while value is not None and is_op(node := value.producer(), "Expand", *SAME_VALUE) and node is not None:
        value = node.inputs[0]
    found = constant(value)
    return value is None or (found is not None and not np.any(read(found.tensor)))
