"""Quantize the chosen weights of a graph one after another, and put what multiplies with their codes in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from adapterx.adapter import Array
from adapterx.base_weight import SCALE, WEIGHT, BaseWeight, read_weight
from adapterx.graph.activation_ranges import Range
from adapterx.graph.base_codes import BlockCodes, block_codes, column_codes, finite, flat_codes
from adapterx.graph.base_methods import HQQ, RTN, Blocks, Bnb4, DynamicInt8, Method, StaticInt8, block_in_graph
from adapterx.graph.bases import Base
from adapterx.graph.quantize_plan import QuantizePlan, of_table
from adapterx.graph.quantized_nodes import (
    Place,
    Quantizers,
    computed_in,
    put_blocks,
    put_dequantized,
    put_dynamic,
    put_lookup,
    put_static,
    put_table,
)
from adapterx.graph.stored import tensor_reader, weight_values
from adapterx.graph.weight_store import WeightStore
from adapterx.packed_codes import repacked
from adapterx.progress import progress
from adapterx.quantization_table import QuantizedRow
from adapterx.weight_rows import BLOCK_BYTES

Tensors: TypeAlias = tuple[ir.Value | None, ...]
_BY_BATCH = (
    "dynamic: activations have one range for the whole batch, so its rows round each other a little; "
    "rtn with 8 bits has ranges by row"
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """What was done.

    Args:
        rows: one a weight
        ops: module -> the node that reads it now
        notes: what stays in the file besides
    """

    rows: tuple[QuantizedRow, ...]
    ops: Mapping[str, ir.Node]
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """One stored weight: where it is, as a layer reads it ``[d_out, d_in]``, and what its tensors will be called."""

    root: ir.Value
    ref: BaseWeight
    graph: ir.Graph
    store: WeightStore

    @property
    def name(self) -> str:
        return str(self.root.name)

    def rows(self, values: Mapping[str, ir.Value]) -> Array:
        """The numbers, in their own type or float32, possibly a view."""
        matrix = read_weight(self.ref, tensor_reader(values))
        return matrix if self.ref.form == "embedding" else matrix.T

    def hold(
        self, suffix: str, array: Array, *, dtype: ir.DataType | None = None, shape: tuple[int, ...] = ()
    ) -> ir.Value:
        """A new initializer beside it."""
        return self.store.initializer(self.graph, f"{self.name}_{suffix}", array, dtype=dtype, shape=shape)


def quantized_weights(
    model: ir.Model, plan: QuantizePlan, ranges: Mapping[str, Range], store: WeightStore
) -> Quantized:
    """Change ``model`` in place as ``plan`` says.

    Args:
        model: that we may change
        plan: which weights, and how
        ranges: of the activations that statically quantized layers read, by name
        store: where tensors go

    Raises:
        ModelError: NaN or infinity among the weights.
    """
    values, quantizers = weight_values(model), Quantizers()
    held: dict[tuple[ir.Value, str, Method, ir.DataType], Tensors] = {}
    grids: dict[str, Tensors] = {}
    rows: list[QuantizedRow] = []
    ops: dict[str, ir.Node] = {}
    total = sum(_bytes_of(values, base) for base, _ in plan.chosen)
    with progress("quantizing", total) as advance:
        for base, wanted in plan.chosen:
            method = of_table(wanted) if base.kind == "embedding" else wanted
            place, source = _place(base), _source(base, values, store)
            key = (source.root, source.ref.form, method, computed_in(method, place.dtype))
            before = _bytes_of(values, base)
            if fresh := key not in held:
                held[key], error = _tensors(source, source.rows(values), method, key[-1])
            if isinstance(method, StaticInt8):
                _hold_grid(place, ranges, grids, store)
            node = _put(place, base, method, held[key], quantizers, grids)
            if base.name:
                ops[base.name] = node
            if fresh:
                rows.append(_row(place, node, method, held[key], before=before, error=error))
            advance(before)
    kept = sorted({root.name for root, *_ in held if root.uses() and root.name})
    notes = [f"{name} is in the file twice: something that stays float reads it, too" for name in kept]
    if any(isinstance(method, DynamicInt8) for _, method in plan.chosen):
        notes.append(_BY_BATCH)
    return Quantized(tuple(rows), ops, tuple(notes))


def _bytes_of(values: Mapping[str, ir.Value], base: Base) -> int:
    assert base.weight is not None, "the plan looked at it"
    tensor = ir.convenience.get_const_tensor(values[base.weight.tensors[WEIGHT]])
    assert tensor is not None, "a base weight names constants"
    return tensor.nbytes


def _place(base: Base) -> Place:
    dtype = ir.DataType[_ONNX_NAMES[base.dtype]]
    name = base.name or base.op.name or str(base.op.outputs[0].name)
    return Place(base.op, base.d_in, base.d_out, dtype, name)


_ONNX_NAMES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}


def _source(base: Base, values: Mapping[str, ir.Value], store: WeightStore) -> _Source:
    assert base.weight is not None, "the plan looked at it"
    root = values[base.weight.tensors[WEIGHT]]
    producer = root.producer()
    graph = root.graph if producer is None else producer.graph
    assert isinstance(graph, ir.Graph), "a constant lies in a graph"
    return _Source(root, base.weight, graph, store)


def _row(place: Place, node: ir.Node, method: Method, tensors: Tensors, *, before: int, error: float) -> QuantizedRow:
    held = [value.const_value for value in tensors if value is not None]
    after = sum(tensor.nbytes for tensor in held if tensor is not None)
    return QuantizedRow(place.name, node.op_type, (place.d_in, place.d_out), _storage(method), before, after, error)


def _storage(method: Method) -> str:
    match method:
        case Bnb4():
            return f"{method.table} in blocks of {method.block_size}"
        case DynamicInt8() | StaticInt8():
            return "int8 by channel"
        case _:
            blocks = "by row" if method.block_size == -1 else f"in blocks of {method.block_size}"
            signed = isinstance(method, RTN) and method.symmetric
            return f"{'' if signed else 'u'}int{method.bits} {blocks}"


# -- Tensors ----------------------------------------------------------------------------------------------------------


def _tensors(source: _Source, matrix: Array, method: Method, dtype: ir.DataType) -> tuple[Tensors, float]:
    """The tensors that hold ``matrix``, and the error that they make."""
    error = _Error()
    match method:
        case Bnb4():
            return _of_table(source, matrix, method, dtype, error), error.ratio
        case DynamicInt8() | StaticInt8():
            return _by_column(source, matrix, static=isinstance(method, StaticInt8), error=error), error.ratio
    if source.ref.form != "embedding" and not isinstance(method, HQQ) and method.format == "qdq":
        return _dequantized(source, matrix, method, dtype, error), error.ratio
    return _in_blocks(source, matrix, method, dtype, error), error.ratio


@dataclasses.dataclass(slots=True)
class _Error:
    """Squares of differences and of numbers, added up block by block."""

    difference: float = 0.0
    whole: float = 0.0

    def add(self, rows: Array, values: Array) -> None:
        self.difference += float(np.square(values - rows, dtype=np.float64).sum())
        self.whole += float(np.square(rows, dtype=np.float64).sum())

    @property
    def ratio(self) -> float:
        return float(np.sqrt(self.difference / self.whole)) if self.whole else 0.0


def _parts(matrix: Array, name: str) -> Iterator[Array]:
    """Rows in float32, some at a time."""
    step = max(1, BLOCK_BYTES // max(1, 4 * matrix.shape[1]))
    for first in range(0, len(matrix), step):
        yield finite(matrix[first : first + step], name)


def _coded(
    source: _Source, matrix: Array, method: Blocks, stored: np.dtype[np.generic], error: _Error
) -> Iterator[BlockCodes]:
    for rows in _parts(matrix, source.name):
        codes = block_codes(rows, method, stored=stored)
        error.add(rows, codes.values(method.bits)[:, : rows.shape[1]])
        yield codes


def _in_blocks(source: _Source, matrix: Array, method: Blocks, dtype: ir.DataType, error: _Error) -> Tensors:
    """Codes as MatMulNBits and GatherBlockQuantized read them: packed by row, low bits first."""
    packed, scales, zeros = [], [], []
    for found in _coded(source, matrix, method, dtype.numpy(), error):
        packed.append(_packed(found.codes, method.bits))
        scales.append(found.scales)
        if found.zeros is not None:
            whole = found.zeros.dtype == np.uint8
            zeros.append(_packed(found.zeros, method.bits) if whole else found.zeros)
    codes = np.concatenate(packed)
    table = source.ref.form == "embedding"
    if table:
        codes = codes.reshape(len(codes), -1)[:, : -(-matrix.shape[1] * method.bits // 8)]
    held = source.hold(f"Q{method.bits}", codes)
    _say(held, source.root)
    zero = source.hold("zero_points", np.concatenate(zeros)) if zeros else None
    tensors = (held, source.hold("scales", np.concatenate(scales)))
    return tensors if zero is None else (*tensors, zero)


def _packed(codes: Array, bits: int) -> Array:
    """uint8 ``[..., bytes]``."""
    return repacked(codes, np.zeros((*codes.shape[:-1], -(-codes.shape[-1] * bits // 8)), np.uint8), bits)


def _dequantized(source: _Source, matrix: Array, method: Blocks, dtype: ir.DataType, error: _Error) -> Tensors:
    """Codes as a blocked DequantizeLinear reads them: ``[K, N]``, signed without zero points, else unsigned with."""
    n, k = matrix.shape
    found = list(_coded(source, matrix, method, dtype.numpy(), error))
    whole = np.concatenate([one.codes.reshape(len(one.codes), -1)[:, :k] for one in found]).T
    scales = np.concatenate([one.scales for one in found]).T
    zeros = [one.zeros for one in found if one.zeros is not None]
    middle = 0 if zeros else 1 << (method.bits - 1)
    element = ir.DataType[f"{'U' if zeros else ''}INT{method.bits}"]

    def hold(suffix: str, codes: Array) -> ir.Value:
        shifted = (codes - np.uint8(middle)).view(np.uint8)
        flat = _packed(np.ascontiguousarray(shifted).reshape(-1), method.bits)
        if method.bits == 8:
            return source.hold(suffix, flat.view(element.numpy()).reshape(codes.shape))
        return source.hold(suffix, flat, dtype=element, shape=codes.shape)

    held = hold(f"DQ_Q{method.bits}", np.ascontiguousarray(whole))
    _say(held, source.root)
    tensors: Tensors = (held, source.hold("DQ_scales", np.ascontiguousarray(scales)))
    assert whole.shape == (k, n), "as a product reads it"
    return (*tensors, hold("DQ_zero_points", np.ascontiguousarray(np.concatenate(zeros).T))) if zeros else tensors


def _of_table(source: _Source, matrix: Array, method: Bnb4, dtype: ir.DataType, error: _Error) -> Tensors:
    rows = finite(matrix, source.name)
    packed, largest = flat_codes(rows, method)
    largest = largest.astype(dtype.numpy())
    tensors = {WEIGHT: packed, SCALE: largest}
    form = BaseWeight(
        "out_in",
        rows.shape,
        {role: role for role in tensors},
        storage=method.table,
        bits=4,
        block_size=method.block_size,
    )
    error.add(rows, read_weight(form, tensors.__getitem__).T)
    held = source.hold("Bnb4", packed)
    _say(held, source.root)
    return held, source.hold("absmax", largest)


def _by_column(source: _Source, matrix: Array, *, static: bool, error: _Error) -> Tensors:
    codes, scales = [], []
    for rows in _parts(matrix, source.name):
        part, scale = column_codes(rows)
        error.add(rows, part * scale[:, None])
        codes.append(part)
        scales.append(scale)
    held = source.hold("quantized", np.concatenate(codes).T)
    _say(held, source.root)
    tensors: Tensors = (held, source.hold("scale", np.concatenate(scales)))
    zeros = np.zeros(len(matrix), np.int8)
    return (*tensors, source.hold("zero_point", zeros)) if static else tensors


def _say(codes: ir.Value, root: ir.Value) -> None:
    """Codes have what the exporter said of the weight."""
    codes.metadata_props.update(root.metadata_props)


# -- Nodes ------------------------------------------------------------------------------------------------------------


def _hold_grid(place: Place, ranges: Mapping[str, Range], grids: dict[str, Tensors], store: WeightStore) -> None:
    """Scale and zero point of what ``place`` reads, uint8 from the least to the most that it was, zero included."""
    x = place.op.inputs[0]
    assert x is not None, "a product has its operand"
    name = str(x.name)
    if name in grids:
        return
    low, high = min(0.0, ranges[name][0]), max(0.0, ranges[name][1])
    scale = np.float32((high - low) / 255) or np.float32(1)
    zero = np.array(np.clip(np.rint(-low / scale), 0, 255), np.uint8)
    grids[name] = (
        store.initializer(place.graph, f"{name}_scale", np.array(scale)),
        store.initializer(place.graph, f"{name}_zero_point", zero),
    )


def _put(
    place: Place, base: Base, method: Method, tensors: Tensors, quantizers: Quantizers, grids: Mapping[str, Tensors]
) -> ir.Node:
    match method:
        case Bnb4():
            return put_table(place, method, tensors)
        case DynamicInt8():
            return put_dynamic(place, _present(tensors), quantizers)
        case StaticInt8():
            x = place.op.inputs[0]
            assert x is not None, "a product has its operand"
            return put_static(place, _present(tensors), _present(grids[str(x.name)]), quantizers)
    width = base.d_out if base.kind == "embedding" else base.d_in
    block = block_in_graph(method.block_size, width)
    if base.kind == "embedding":
        return put_lookup(place, method.bits, block, tensors)
    if not isinstance(method, HQQ) and method.format == "qdq":
        return put_dequantized(place, method, tensors, block=block)
    return put_blocks(place, method, tensors)


def _present(tensors: Tensors) -> list[ir.Value]:
    return [value for value in tensors if value is not None]
