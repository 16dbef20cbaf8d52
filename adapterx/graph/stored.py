"""How a node stores its weight: from operators and what lies in front of them to a :class:`BaseWeight`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from adapterx.adapter import Array
from adapterx.base_weight import SCALE, WEIGHT, ZERO, BaseWeight, Form, Storage
from adapterx.graph.view import MICROSOFT, SAME_VALUE, STANDARD, attribute, constant, is_op
from adapterx.graph.weights import read

_ANY = (*STANDARD, MICROSOFT)
_INTEGERS = frozenset(
    {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4}
    | {getattr(ir.DataType, name) for name in ("INT2", "UINT2") if hasattr(ir.DataType, name)}
)
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_BYTE = 8
_OF_INTEGERS = ("MatMulInteger", "ConvInteger")


def base_weight_of(op: ir.Node) -> BaseWeight | None:
    """How ``op`` stores the weight that it multiplies or looks up, or ``None`` where that cannot be read.

    Not read: weights that depend on the run, operators with static activation scales of their own (QLinearMatMul), a
    MatMulNBits whose columns are reordered (``g_idx``) or packed for one device.
    """
    for read_op in (_linear, _convolution, _embedding, _n_bits, _bnb4, _gather_blocks, _integer):
        found = read_op(op)
        if found is not None:
            return found
    return None


def weight_values(model: ir.Model) -> dict[str, ir.Value]:
    """Everything that a :class:`BaseWeight` can name: initializers and outputs of Constant nodes, of all graphs."""
    found = {}
    for graph in model.graphs():
        found.update({str(name): value for name, value in graph.initializers.items()})
        found.update({str(node.outputs[0].name): node.outputs[0] for node in graph if is_op(node, "Constant")})
    return found


def tensor_reader(values: Mapping[str, ir.Value]) -> Callable[[str], Array]:
    """Reads tensors by name as :func:`adapterx.base_weight.read_weight` takes them, external ones without mapping."""

    def tensor(name: str) -> Array:
        found = ir.convenience.get_const_tensor(values[name])
        assert found is not None, "a base weight names constants"
        if isinstance(found, ir.ExternalTensor) and found.dtype.bitwidth < _BYTE:
            with (Path(found.base_dir) / found.location).open("rb", buffering=0) as file:
                file.seek(found.offset or 0)
                return np.fromfile(file, packed_dtype(found.dtype), found.nbytes)
        return read(found)

    return tensor


def packed_dtype(dtype: ir.DataType) -> np.dtype[np.generic]:
    """The numpy type of a tensor's bytes as they lie in a file: codes of less than a byte are packed into bytes."""
    return np.dtype(np.uint8) if dtype.bitwidth < _BYTE else dtype.numpy()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Behind:
    """What is behind a weight operand: the initializer, and the DequantizeLinear and Transpose on the way."""

    root: ir.Value
    dequantize: ir.Node | None
    transposed: bool


def _behind(value: ir.Value | None) -> _Behind | None:
    dequantize, transposed = None, False
    while value is not None and (node := value.producer()) is not None and not is_op(node, "Constant"):
        if is_op(node, "DequantizeLinear", domain=_ANY) and dequantize is None:
            dequantize = node
        elif is_op(node, "Transpose") and dequantize is None and _swaps_two(node):
            transposed = not transposed
        elif not is_op(node, *SAME_VALUE):
            return None
        value = node.inputs[0]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if value is None or tensor is None or tensor.dtype not in (_FLOATS if dequantize is None else _INTEGERS):
        return None
    return _Behind(value, dequantize, transposed)


def _swaps_two(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return perm is None or list(perm.as_ints()) == [1, 0]


def _stored(operand: ir.Value | None, form: Form) -> BaseWeight | None:
    """A float operand, or a DequantizeLinear of a constant. ``form`` is how the node sees it."""
    found = _behind(operand)
    if found is None:
        return None
    shape = _shape(found.root)
    if form != "conv" and len(shape) != 2:
        return None
    if found.transposed:
        swapped: Mapping[Form, Form] = {"in_out": "out_in", "out_in": "in_out", "embedding": "out_in"}
        if form not in swapped:
            return None
        form = swapped[form]
    if found.dequantize is not None:
        return _dequantized(found.dequantize, found.root, form)
    return BaseWeight(form, shape, {WEIGHT: str(found.root.name)})


def _dequantized(node: ir.Node, root: ir.Value, form: Form) -> BaseWeight | None:
    """DequantizeLinear: per tensor, per axis or blocked."""
    block = int(attribute(node, "block_size", 0))
    axis = int(attribute(node, "axis", 1))
    found = _affine(form, root, [*node.inputs, None][1:3], axis=axis % len(_shape(root)))
    return None if found is None else dataclasses.replace(found, block_size=block)


def _affine(form: Form, root: ir.Value, parameters: list[ir.Value | None], *, axis: int) -> BaseWeight | None:
    """Codes in ``root`` with ``[scale, zero_point or None]``, which must be constants."""
    tensors = _named(root, *parameters)
    codes, scale = ir.convenience.get_const_tensor(root), constant(parameters[0])
    if tensors is None or codes is None or scale is None or codes.dtype not in _INTEGERS:
        return None
    signed = not codes.dtype.name.startswith("U")
    return BaseWeight(
        form=form,
        shape=_shape(root),
        tensors=tensors,
        storage="affine",
        bits=int(codes.dtype.bitwidth),
        signed=signed,
        axis=None if scale.tensor.size == 1 else axis,
    )


def _named(weight: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None = None) -> dict[str, str] | None:
    """Role -> name of the constants; ``None`` when one of them depends on the run, or is changed on its way."""
    tensors = {}
    for role, value in ((WEIGHT, weight), (SCALE, scale), (ZERO, zero)):
        if value is None and role == ZERO:
            continue
        found = constant(value)
        if found is None or found.transposed or found.dtype != found.tensor.dtype:
            return None
        tensors[role] = str(found.root.name)
    return tensors


def _shape(root: ir.Value) -> tuple[int, ...]:
    tensor = ir.convenience.get_const_tensor(root)
    assert tensor is not None, "a root is constant"
    return tuple(int(dim) for dim in tensor.shape.numpy())


# -- Operators --------------------------------------------------------------------------------------------------------


def _linear(op: ir.Node) -> BaseWeight | None:
    gemm = is_op(op, "Gemm") or is_op(op, "FusedGemm", domain=(MICROSOFT,))
    fused = is_op(op, "FusedMatMul", "TransposeMatMul", domain=(MICROSOFT,))
    if not (gemm or fused or is_op(op, "MatMul")):
        return None
    if any(attribute(op, flag, 0) for flag in ("transA", "transBatchA", "transBatchB")):
        return None
    form: Form = "out_in" if attribute(op, "transB", 0) else "in_out"
    return _stored(op.inputs[1], form)


def _convolution(op: ir.Node) -> BaseWeight | None:
    if not (is_op(op, "Conv") or is_op(op, "FusedConv", domain=(MICROSOFT,))):
        return None
    return _stored(op.inputs[1], "conv")


def _embedding(op: ir.Node) -> BaseWeight | None:
    if not is_op(op, "Gather") or attribute(op, "axis", 0) != 0:
        return None
    found = _stored(op.inputs[0], "embedding")
    if found is not None:
        return found
    # Dynamic quantization looks codes up and dequantizes them afterwards.
    users = [use.node for use in op.outputs[0].uses()]
    root = op.inputs[0]
    if len(users) != 1 or root is None or not is_op(users[0], "DequantizeLinear", domain=_ANY):
        return None
    found = None if constant(root) is None else _affine("embedding", root, [*users[0].inputs, None][1:3], axis=0)
    return found if found is not None and found.axis is None else None


def _n_bits(op: ir.Node) -> BaseWeight | None:
    if not is_op(op, "MatMulNBits", domain=(MICROSOFT,)):
        return None
    weight, scale, zero, order = [*op.inputs[1:], None, None, None][:4]
    tensors = _named(weight, scale, zero)
    if tensors is None or order is not None or attribute(op, "weight_prepacked", 0):
        return None
    bits = int(attribute(op, "bits", 4))
    return BaseWeight(
        form="out_in",
        shape=(int(attribute(op, "N", 0)), int(attribute(op, "K", 0))),
        tensors=tensors,
        storage="affine",
        bits=bits,
        axis=1,
        block_size=int(attribute(op, "block_size", 0)),
        zero=1 << (bits - 1),
        by_rows=True,
    )


def _bnb4(op: ir.Node) -> BaseWeight | None:
    if not is_op(op, "MatMulBnb4", domain=(MICROSOFT,)):
        return None
    tensors = _named(op.inputs[1], op.inputs[2])
    if tensors is None:
        return None
    storage: Storage = "nf4" if attribute(op, "quant_type", 1) else "fp4"
    return BaseWeight(
        form="out_in" if attribute(op, "transB", 1) else "in_out",
        shape=(int(attribute(op, "N", 0)), int(attribute(op, "K", 0))),
        tensors=tensors,
        storage=storage,
        bits=4,
        block_size=int(attribute(op, "block_size", 0)),
    )


def _gather_blocks(op: ir.Node) -> BaseWeight | None:
    if not is_op(op, "GatherBlockQuantized", domain=(MICROSOFT,)):
        return None
    data, _, scale, zero = [*op.inputs, None][:4]
    if data is None or _named(data, scale, zero) is None or attribute(op, "gather_axis", 0) != 0:
        return None
    shape = _shape(data)
    axis = int(attribute(op, "quantize_axis", 1)) % len(shape)
    found = _affine("embedding", data, [scale, zero], axis=axis)
    if found is None:
        return None
    found = dataclasses.replace(found, axis=axis, block_size=int(attribute(op, "block_size", 128)))
    if found.bits < _BYTE:
        return found
    bits = int(attribute(op, "bits", 4))
    shape = (*shape[:-1], shape[-1] * _BYTE // bits)
    return dataclasses.replace(found, shape=shape, bits=bits, zero=1 << (bits - 1), by_rows=True)


def _integer(op: ir.Node) -> BaseWeight | None:
    """Products of integers: the weight's scale is multiplied in afterwards, beside that of the activations."""
    inputs = [*op.inputs, None, None, None, None]
    form: Form = "in_out"
    if is_op(op, "MatMulInteger"):
        weight, zero, scale = inputs[1], inputs[3], dequantized_product(op).scale
    elif is_op(op, "ConvInteger"):
        weight, zero, scale, form = inputs[1], inputs[3], dequantized_product(op).scale, "conv"
    elif is_op(op, "DynamicQuantizeMatMul", domain=(MICROSOFT,)):
        weight, scale, zero = inputs[1:4]
    elif is_op(op, "MatMulIntegerToFloat", domain=(MICROSOFT,)):
        weight, scale, zero = inputs[1], inputs[3], inputs[5]
    else:
        return None
    if weight is None or constant(weight) is None:
        return None
    found = _affine(form, weight, [scale, zero], axis=0 if form == "conv" else 1)
    columns = 1 if found is None or found.axis is None else found.shape[found.axis]
    found_scale, found_zero = constant(scale), constant(zero)
    fits = found_scale is not None and found_scale.tensor.size == columns
    fits = fits and (found_zero is None or found_zero.tensor.size in {1, columns})
    return found if fits else None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Product:
    """What a product of integers becomes as floats: ``product * (x_scale * weight_scale)``.

    Args:
        output: the floats
        scale: the constant one of the factors, ``None`` where there is none
    """

    output: ir.Value
    scale: ir.Value | None


def dequantized_product(op: ir.Node) -> Product:
    """The floats below ``op``; its own output where it multiplies floats."""
    value = op.outputs[0]
    while is_op(op, *_OF_INTEGERS) and len(uses := list(value.uses())) == 1:
        node = uses[0].node
        if is_op(node, "Mul"):
            constants = [one for one in _factors(node.inputs[1 - uses[0].idx]) if constant(one) is not None]
            if constants:
                return Product(node.outputs[0], constants[0] if len(constants) == 1 else None)
        elif not is_op(node, "Cast"):
            break
        value = node.outputs[0]
    return Product(op.outputs[0], None)


def _factors(value: ir.Value | None) -> list[ir.Value]:
    if value is None:
        return []
    node = value.producer()
    if node is not None and is_op(node, "Mul"):
        return [factor for operand in node.inputs for factor in _factors(operand)]
    return [value]
