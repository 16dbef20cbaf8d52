"""The operations with a weight that an adapter can act on: what each operator reads, and how wide it is.

One place for every spelling of a linear layer, a convolution and an embedding, float or quantized. What follows the
operation (dequantization, bias) is in :mod:`adapterx.graph.bases`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx_ir as ir

from adapterx.graph.view import MICROSOFT, SAME_VALUE, STANDARD, attribute, is_op, is_zero

Kind = Literal["linear", "conv", "embedding"]

ANY = (*STANDARD, MICROSOFT)
_BYTE = 8
_WEIGHT_STEPS = (*SAME_VALUE, "Transpose")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "ConvInteger", "MatMulInteger", "QLinearMatMul", "QLinearConv")
# Rounding to float8 takes about a hundred: two for each of its binades.
_ROUNDING_NODES = 200


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """A node with a constant weight.

    Args:
        kind: what it computes
        x: the operand that depends on the run, as floats (above quantization); of an embedding, the ids
        weight: values from the operand down to the constant that holds the weight, nearest to the node first
        d_in: features that come in (channels of a convolution, rows of an embedding)
        d_out: features that go out
        kernel: of a convolution, else empty
        bias: a constant that the node itself adds, or ``None``
        integer: gives integers, to be multiplied with scales afterwards
        pure: gives the product and that bias, nothing on top (an activation, a sum with what depends on the run)
        columns: constants by which the operand's columns are multiplied or put in order after ``x``, in that order
    """

    kind: Kind
    x: ir.Value
    weight: tuple[ir.Value, ...]
    d_in: int
    d_out: int
    kernel: tuple[int, ...] = ()
    bias: ir.Value | None = None
    integer: bool = False
    pure: bool = True
    columns: tuple[ir.Value, ...] = ()

    @property
    def root(self) -> ir.Value:
        """The constant that holds the weight."""
        return self.weight[-1]


def operation(node: ir.Node) -> Operation | None:
    """``node`` as an :class:`Operation`; ``None`` when it is none, or its weight depends on the run."""
    for read in (_product, _packed_product, _integer_product, _convolution, _lookup):
        found = read(node)
        if found is not None:
            return found
    return None


def factor_of(node: ir.Node | None) -> float:
    """What a linear layer multiplies its product with (``alpha``); 1.0 for any other operation.

    Optimizers put there what the model multiplies the layer's input with, or its output. Both are none of the layer's
    own: its weight is what is stored, and an adapter beside it is multiplied, too.
    """
    products = is_op(node, "Gemm") or is_op(node, "FusedGemm", "FusedMatMul", "TransposeMatMul", domain=(MICROSOFT,))
    return float(attribute(node, "alpha", 1.0)) if products and node is not None else 1.0


def _product(node: ir.Node) -> Operation | None:
    """MatMul and Gemm of floats, the weight perhaps behind a DequantizeLinear."""
    gemm = is_op(node, "Gemm") or is_op(node, "FusedGemm", domain=(MICROSOFT,))
    fused = is_op(node, "FusedMatMul", "TransposeMatMul", domain=(MICROSOFT,))
    if not (gemm or fused or is_op(node, "MatMul")):
        return None
    if any(attribute(node, flag, 0) for flag in ("transA", "transBatchA", "transBatchB")):
        return None
    shape = _shape_behind(node.inputs[1])
    if shape is None or len(shape) != 2:
        return None
    addend = _input(node, 2) if gemm else None
    first, second = shape
    sizes = (second, first) if attribute(node, "transB", 0) else (first, second)
    found = _operation(node, "linear", 1, sizes=sizes, bias=addend)
    beta = attribute(node, "beta", 1.0) if addend is not None else 1.0
    if found is None or (found.pure and beta == 1.0 and "activation" not in node.attributes):
        return found
    return dataclasses.replace(found, pure=False)


def _packed_product(node: ir.Node) -> Operation | None:
    """MatMulNBits and MatMulBnb4, whose attributes say how wide the packed weight is."""
    if not is_op(node, "MatMulNBits", "MatMulBnb4", domain=(MICROSOFT,)):
        return None
    sizes = int(attribute(node, "K", 0)), int(attribute(node, "N", 0))
    return _operation(node, "linear", 1, sizes=sizes, bias=_input(node, 5))


def _integer_product(node: ir.Node) -> Operation | None:
    """Products of codes, with scales inside the node or after it."""
    slots = {"MatMulInteger": None, "MatMulIntegerToFloat": 6, "DynamicQuantizeMatMul": 4}
    if node.op_type not in slots or not is_op(node, node.op_type, domain=ANY):
        return None
    shape, slot = _shape_behind(node.inputs[1]), slots[node.op_type]
    if shape is None or len(shape) != 2:
        return None
    found = _operation(node, "linear", 1, sizes=(shape[0], shape[1]), bias=None if slot is None else _input(node, slot))
    return found if found is None or slot is not None else dataclasses.replace(found, integer=True)


def _convolution(node: ir.Node) -> Operation | None:
    integer = is_op(node, "ConvInteger")
    if not (integer or is_op(node, "Conv") or is_op(node, "FusedConv", domain=(MICROSOFT,))):
        return None
    shape = _shape_behind(node.inputs[1])
    if shape is None:
        return None
    sizes = shape[1] * int(attribute(node, "group", 1)), shape[0]
    found = _operation(node, "conv", 1, sizes=sizes, bias=None if integer else _input(node, 2))
    if found is None:
        return None
    plain = found.pure and "activation" not in node.attributes and _input(node, 3 if not integer else 4) is None
    return dataclasses.replace(found, kernel=shape[2:], integer=integer, pure=plain)


def _lookup(node: ir.Node) -> Operation | None:
    """Rows of a table by ids that depend on the run."""
    blocks = is_op(node, "GatherBlockQuantized", domain=(MICROSOFT,))
    if not (blocks or is_op(node, "Gather")) or attribute(node, "gather_axis" if blocks else "axis", 0) != 0:
        return None
    shape = _shape_behind(node.inputs[0])
    if shape is None or len(shape) != 2:
        return None
    rows, width = shape
    root = _behind(node.inputs[0])[-1]
    tensor = ir.convenience.get_const_tensor(root)
    if blocks and tensor is not None and tensor.dtype.bitwidth == _BYTE:
        width = width * _BYTE // int(attribute(node, "bits", 4))
    return _operation(node, "embedding", 0, sizes=(rows, width), bias=None)


def _operation(
    node: ir.Node, kind: Kind, slot: int, *, sizes: tuple[int, int], bias: ir.Value | None
) -> Operation | None:
    """The weight is in ``slot``, what depends on the run in the other of the first two."""
    weight, x = tuple(_behind(node.inputs[slot])), node.inputs[1 - slot]
    if not weight or x is None or _behind(x):
        return None
    if bias is not None and not _behind(bias) and is_zero(bias):
        bias = None
    fixed = bias is None or bool(_behind(bias))
    floats, columns = (x, ()) if kind == "embedding" else rearranged(_unrounded(_floats(x)))
    return Operation(kind, floats, weight, *sizes, bias=bias if fixed else None, pure=fixed, columns=columns)


def _unrounded(value: ir.Value) -> ir.Value:
    """Up to what a quantized layer scaled or put in order before it rounded it by plain operators (MX, float8).

    These are no others than a model's own, but behind a product of such a layer they cannot lie: paths end at products.
    """
    seen: set[ir.Node] = set()
    todo = [value]
    while todo and len(seen) < _ROUNDING_NODES:
        node = todo.pop(0).producer()
        if node is None or node in seen or node.domain or node.op_type in _PRODUCTS:
            continue
        if rearranged(node.outputs[0])[1]:
            return node.outputs[0]
        seen.add(node)
        todo += [each for each in node.inputs if each is not None]
    return value


def rearranged(value: ir.Value) -> tuple[ir.Value, tuple[ir.Value, ...]]:
    """What ``value`` is of, where a quantized layer scales or orders its inputs first, and the constants by which.

    Those are the weight's (AWQ's scales, GPTQ's act_order), so an adapter reads what is above them. By name: a norm
    multiplies by a vector too, and adapters read what is below that.
    """
    columns: list[ir.Value] = []
    while (node := value.producer()) is not None and node.outputs[0] is value:
        scales = is_op(node, "Mul")
        if not (scales or is_op(node, "Gather")) or None in node.inputs:
            break
        suffix, operands = (".pre_scale", list(node.inputs)) if scales else (".order", [node.inputs[1], node.inputs[0]])
        named = [one for one in operands if one is not None and one.const_value is not None]
        named = [one for one in named if (one.name or "").endswith(suffix)]
        above = next((one for one in operands if one is not None and one not in named), None)
        if len(named) != 1 or above is None or (not scales and node.inputs[1] is not named[0]):
            break
        columns.insert(0, named[0])
        value = above
    return value, tuple(columns)


def _floats(value: ir.Value) -> ir.Value:
    """Up to what quantizers of activations read: ``QuantizeLinear``, alone or undone, and the dynamic one."""
    while (node := value.producer()) is not None and node.outputs[0] is value and node.inputs[0] is not None:
        if is_op(node, "DequantizeLinear", domain=ANY):
            # What looks codes up in a table is dequantized, too, and has no floats above it.
            node = node.inputs[0].producer()
        if node is None or not is_op(node, "QuantizeLinear", "DynamicQuantizeLinear", domain=ANY):
            break
        assert node.inputs[0] is not None, "a quantizer has its operand"
        value = node.inputs[0]
    return value


def constant_behind(value: ir.Value | None) -> ir.Value | None:
    """The constant that ``value`` comes from, through casts, transpositions, reshapes and dequantization."""
    found = _behind(value, *_WEIGHT_STEPS, "Reshape", "Unsqueeze", "Squeeze")
    return found[-1] if found else None


def _behind(value: ir.Value | None, *steps: str) -> list[ir.Value]:
    """``value`` and what it is made of, down to a constant; nothing when it depends on the run."""
    found: list[ir.Value] = []
    while value is not None:
        found.append(value)
        node = value.producer()
        if node is None or is_op(node, "Constant"):
            return found if ir.convenience.get_const_tensor(value) is not None else []
        if not (is_op(node, *(steps or _WEIGHT_STEPS)) or is_op(node, "DequantizeLinear", domain=ANY)):
            return []
        value = node.inputs[0]
    return []


def _shape_behind(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a constant operand as the node sees it, or ``None``."""
    values = _behind(value)
    if not values:
        return None
    tensor = ir.convenience.get_const_tensor(values[-1])
    assert tensor is not None, "what is behind is constant"
    shape = tuple(int(dim) for dim in tensor.shape.numpy())
    for transpose in reversed([v.producer() for v in values if is_op(v.producer(), "Transpose")]):
        assert transpose is not None, "is_op looked at it"
        perm = transpose.attributes.get("perm")
        order = range(len(shape))[::-1] if perm is None else perm.as_ints()
        shape = tuple(shape[axis] for axis in order)
    return shape


def _input(node: ir.Node, slot: int) -> ir.Value | None:
    return node.inputs[slot] if len(node.inputs) > slot else None
