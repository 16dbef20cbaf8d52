"""The operators that multiply with a quantized base weight, put in the place of one MatMul, Gemm or Gather.

Private, in place. The new operation keeps the old one's name and metadata, and its result the old name: whoever reads
the graph for modules finds the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import onnx_ir as ir

from adapterx.graph.base_methods import HQQ, Blocks, Bnb4, DynamicInt8, Method, StaticInt8, block_in_graph
from adapterx.graph.merge_edits import forget_unread
from adapterx.graph.rewire import drop_dead
from adapterx.graph.view import MICROSOFT

FLOAT = ir.DataType.FLOAT
_NF4 = 1


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Place:
    """One base operation that is replaced.

    Args:
        op: the node
        d_in: features that come in; rows of a table
        d_out: features that go out
        dtype: of what it reads (what a Gather gives)
        name: of its module, or of its node
    """

    op: ir.Node
    d_in: int
    d_out: int
    dtype: ir.DataType
    name: str

    @property
    def stem(self) -> str:
        """What names of nodes beside it begin with."""
        return self.op.name or str(self.op.outputs[0].name)

    @property
    def graph(self) -> ir.Graph:
        """Where it lies."""
        found = self.op.graph
        assert isinstance(found, ir.Graph), "a base lies in a graph"
        return found


def computed_in(method: Method, dtype: ir.DataType) -> ir.DataType:
    """The type of the activations beside the codes: float32 where ONNX Runtime has no kernel for theirs on the CPU."""
    if dtype == ir.DataType.BFLOAT16 or isinstance(method, DynamicInt8 | StaticInt8):
        return FLOAT
    # ONNX Runtime 1.24 multiplies 2-bit weights with float32 only.
    narrow = not isinstance(method, Bnb4) and method.bits == 2
    return FLOAT if narrow else dtype


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Quantizers:
    """Nodes that put activations on a grid, one for all operations that read them: by value and graph."""

    made: dict[tuple[ir.Value, ir.Graph], Sequence[ir.Value]] = dataclasses.field(default_factory=dict)

    def of(self, place: Place, make: Callable[[ir.Value, str], list[ir.Node]]) -> Sequence[ir.Value]:
        """What ``make``'s nodes give in front of ``place``, or gave before for another that reads the same."""
        x = place.op.inputs[0]
        assert x is not None, "a product has its operand"
        key = (x, place.graph)
        if key not in self.made:
            # A body of an If may read what the graph around it has on a grid already.
            again = sum(value is x for value, _ in self.made)
            wide, before = _read(place, FLOAT)
            nodes = [*before, *make(wide, f"{x.name}/{again}" if again else str(x.name))]
            place.graph.insert_before(place.op, nodes)
            self.made[key] = nodes[-1].outputs
        return self.made[key]


def put_blocks(place: Place, method: Blocks, tensors: Sequence[ir.Value | None]) -> ir.Node:
    """MatMulNBits; ``tensors`` are codes, scales, zero points or ``None``."""
    attributes = {
        "K": place.d_in,
        "N": place.d_out,
        "bits": method.bits,
        "block_size": block_in_graph(method.block_size, place.d_in),
    }
    # ONNX Runtime multiplies fractional zero points exactly, whatever level is asked for.
    if method.accuracy_level and not (isinstance(method, HQQ) and method.bits == 4):
        attributes["accuracy_level"] = method.accuracy_level
    return _product(place, method, "MatMulNBits", tensors, attributes)


def put_table(place: Place, method: Bnb4, tensors: Sequence[ir.Value | None]) -> ir.Node:
    """MatMulBnb4; ``tensors`` are codes and the largest of each block."""
    kind = _NF4 if method.table == "nf4" else 0
    attributes = {"K": place.d_in, "N": place.d_out, "block_size": method.block_size, "quant_type": kind}
    return _product(place, method, "MatMulBnb4", tensors, attributes)


def _product(
    place: Place, method: Method, op_type: str, tensors: Sequence[ir.Value | None], attributes: dict[str, int]
) -> ir.Node:
    x, before = _read(place, computed_in(method, place.dtype))
    node = _named(place, op_type, [x, *tensors], attributes, domain=MICROSOFT)
    _replace(place, [*before, node], computed_in(method, place.dtype))
    return node


def put_dequantized(place: Place, method: Method, tensors: Sequence[ir.Value | None], *, block: int) -> ir.Node:
    """DequantizeLinear in front of a MatMul, in blocks of ``block`` along ``[K, N]``, or by column where that is 0."""
    x, before = _read(place, computed_in(method, place.dtype))
    weight, wide = _dequantized(place, tensors, block=block)
    node = _named(place, "MatMul", [x, wide])
    _replace(place, [*before, weight, node], computed_in(method, place.dtype))
    return node


def put_dynamic(place: Place, tensors: Sequence[ir.Value], quantizers: Quantizers) -> ir.Node:
    """``DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul``; ``tensors``: codes ``[K, N]``, scales ``[N]``."""
    codes, scale, zero = quantizers.of(place, _quantize)
    weight, weight_scale = tensors
    product = _named(place, "MatMulInteger", [codes, weight, zero])
    whole = ir.node("Cast", [product.outputs[0]], {"to": FLOAT.value}, name=f"{place.stem}/float")
    both = ir.node("Mul", [scale, weight_scale], name=f"{place.stem}/scales")
    given = ir.node("Mul", [whole.outputs[0], both.outputs[0]], name=f"{place.stem}/scaled")
    both.outputs[0].name = f"{place.op.outputs[0].name}/scales"
    _replace(place, [product, whole, both, given], FLOAT)
    return product


def _quantize(x: ir.Value, stem: str) -> list[ir.Node]:
    node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=f"{stem}/quantize")
    _call(node, stem, ("quantized", "scale", "zero_point"))
    return [node]


def put_static(place: Place, tensors: Sequence[ir.Value], grid: Sequence[ir.Value], quantizers: Quantizers) -> ir.Node:
    """QuantizeLinear and DequantizeLinear around a MatMul's operands; ``grid`` is the activations' scale and zero."""

    def on_grid(x: ir.Value, stem: str) -> list[ir.Node]:
        codes = ir.node("QuantizeLinear", [x, *grid], name=f"{stem}/quantize")
        _call(codes, stem, ("quantized",))
        floats = ir.node("DequantizeLinear", [codes.outputs[0], *grid], name=f"{stem}/dequantize")
        _call(floats, stem, ("dequantized",))
        floats.outputs[0].type, floats.outputs[0].shape = ir.TensorType(FLOAT), x.shape
        return [codes, floats]

    [rounded] = quantizers.of(place, on_grid)
    weight, wide = _dequantized(place, tensors, block=0)
    node = _named(place, "MatMul", [rounded, wide])
    _replace(place, [weight, node], FLOAT)
    return node


def put_lookup(place: Place, bits: int, block: int, tensors: Sequence[ir.Value | None]) -> ir.Node:
    """GatherBlockQuantized in the place of Gather; ``tensors`` are codes and scales."""
    codes, scales = tensors
    attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    node = _named(place, "GatherBlockQuantized", [codes, place.op.inputs[1], scales], attributes, domain=MICROSOFT)
    _finish(place, [node])
    return node


def _dequantized(place: Place, tensors: Sequence[ir.Value | None], *, block: int) -> tuple[ir.Node, ir.Value]:
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    weight = ir.node("DequantizeLinear", tensors, attributes, name=f"{place.stem}/weight")
    value = weight.outputs[0]
    value.name = f"{place.op.outputs[0].name}/weight"
    scale = tensors[1]
    assert scale is not None, "codes have scales"
    value.type, value.shape = scale.type, ir.Shape((place.d_in, place.d_out))
    return weight, value


def _read(place: Place, dtype: ir.DataType) -> tuple[ir.Value, list[ir.Node]]:
    """What the operation reads, in ``dtype``."""
    x = place.op.inputs[0]
    assert x is not None, "a product has its operand"
    if place.dtype == dtype:
        return x, []
    cast = ir.node("Cast", [x], {"to": dtype.value}, name=f"{place.stem}/wide")
    value = cast.outputs[0]
    value.name, value.type, value.shape = f"{place.op.outputs[0].name}/x", ir.TensorType(dtype), x.shape
    return value, [cast]


def _named(
    place: Place,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, int] | None = None,
    *,
    domain: str = "",
) -> ir.Node:
    """A node by the name of the operation that it stands for."""
    op = place.op
    return ir.node(op_type, inputs, attributes, domain=domain, name=op.name, metadata_props=dict(op.metadata_props))


def _call(node: ir.Node, stem: str, words: Sequence[str]) -> None:
    for value, word in zip(node.outputs, words, strict=True):
        value.name = f"{stem}/{word}"


def _replace(place: Place, nodes: Sequence[ir.Node], dtype: ir.DataType) -> None:
    """Let ``nodes``, whose last gives the product in ``dtype``, take the operation's place: its type, its addend."""
    op, given = place.op, place.op.outputs[0]
    steps = list(nodes)
    if place.dtype != dtype:
        steps.append(ir.node("Cast", steps[-1].outputs, {"to": place.dtype.value}, name=f"{place.stem}/narrow"))
    if op.op_type in {"Gemm", "FusedGemm"} and len(op.inputs) > 2 and op.inputs[2] is not None:
        steps.append(ir.node("Add", [steps[-1].outputs[0], op.inputs[2]], name=f"{place.stem}/bias"))
    product = nodes[-1].outputs[0]
    product.type, product.shape = ir.TensorType(dtype), given.shape
    if steps[-1].op_type == "Add" and place.dtype != dtype:
        steps[-2].outputs[0].type, steps[-2].outputs[0].shape = ir.TensorType(place.dtype), given.shape
    _finish(place, steps)


def _finish(place: Place, nodes: Sequence[ir.Node]) -> None:
    """Put ``nodes`` there, and let the last one's output be the operation's."""
    given, last = place.op.outputs[0], nodes[-1].outputs[0]
    for node in nodes:
        for value in node.outputs:
            if value is not last and value.name is None:
                value.name = f"{given.name}/{node.op_type}"
    graph, operands = place.graph, list(place.op.inputs)
    ir.convenience.replace_nodes_and_values(graph, place.op, [place.op], list(nodes), [given], [last])
    makers = [value.producer() for value in operands if value is not None]
    drop_dead(node for node in makers if node is not None)
    # A constant that is an input, too, may not be left as one that has to be fed.
    inputs = [value for value in operands if value is not None and value.is_initializer() and value.is_graph_input()]
    forget_unread(value for value in operands if value is not None)
    for value in inputs:
        if not value.uses():
            graph.inputs.remove(value)
