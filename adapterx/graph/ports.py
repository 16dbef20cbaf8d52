"""Ports: how the tensors of a site come into the graph, as external initializers, inputs, or packed inputs."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from adapterx.adapter import PROMPT, tensor_name
from adapterx.errors import ModelError
from adapterx.manifest import MASK, ROW_MASK, Pack, Port
from adapterx.site import LOW_RANK, RANKED, AdapterSite

# The values of one site, by the names of its ports (`lora_A`, `gain` ...).
Ports = dict[str, ir.Value]

_ONNX_NAMES = {
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "float32": "FLOAT",
    "float64": "DOUBLE",
    "int8": "INT8",
}


@dataclasses.dataclass(frozen=True, slots=True)
class PortOptions:
    """What the caller asked for.

    Args:
        port: ``input``, ``packed`` or ``external``
        dynamic_rank: the rank is symbolic, one symbol a site; else that of the exported adapter
        optional: inputs have a default that makes the site the base
        location: file name that external initializers point at
        required: sites whose inputs have no default, since the graph has no base for them
    """

    port: Port
    dynamic_rank: bool
    optional: bool
    location: str
    required: frozenset[str] = frozenset()


def add_ports(
    model: ir.Model, sites: list[AdapterSite], options: PortOptions
) -> tuple[dict[str, Ports], tuple[Pack, ...]]:
    """Add the values of every site, and say which of them are parts of packed inputs.

    Raises:
        ModelError: the model has an input or output of its own by the name of a port.
    """
    names = [tensor_name(site.name, port) for site in sites for port in site.graph_ports]
    _make_room(model, {*names, MASK, ROW_MASK})
    packs = _packs([s for s in sites if s.name not in options.required]) if options.port == "packed" else ()
    packed = {(site, pack.side) for pack in packs for site in pack.sites}
    by_name = {site.name: site for site in sites}
    values: dict[str, Ports] = {site.name: {} for site in sites}
    offset = 0
    for site in sites:
        for port in site.graph_ports:
            if (site.name, port) not in packed:
                # In external mode the bytes are given at load; no two ports share a place, for tools that look.
                made = values[site.name][port] = _port(model, site, port, options, offset=offset)
                offset += 0 if made.const_value is None else made.const_value.nbytes
    for pack in packs:
        for member, value in _packed(model, pack, by_name, options).items():
            values[member][pack.side] = value
    return values, packs


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key of dotted paths with numbers as numbers: ``layers.2`` before ``layers.10``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def rank_symbol(site: str) -> str:
    """Name of a site's symbolic rank. One a site: a symbol that binds to two sizes can abort a run."""
    return f"{site}.rank"


def _port(model: ir.Model, site: AdapterSite, port: str, options: PortOptions, *, offset: int) -> ir.Value:
    name, rows, width, dtype = tensor_name(site.name, port), site.rows(port), site.width(port), _of_port(site, port)
    value = ir.Value(name=name, type=ir.TensorType(dtype))
    if options.port == "external":
        value.shape = ir.Shape([rows, *width])
        length = int(rows * np.prod(width)) * dtype.itemsize
        value.const_value = ir.ExternalTensor(
            options.location, offset, int(length), dtype, shape=ir.Shape([rows, *width]), name=name
        )
        model.graph.register_initializer(value)
        return value
    dynamic = options.dynamic_rank and port != PROMPT
    symbol = rank_symbol(site.name) if port in RANKED else f"{site.name}.{port}.rows"
    value.shape = ir.Shape([symbol if dynamic else rows, *width])
    # A convolution to no channels at all is not defined alike everywhere: one of zeros does as well.
    least = 1 if site.kernel and port in LOW_RANK else 0
    optional = options.optional and site.name not in options.required
    add_input(model, value, (least if dynamic else rows, *width) if optional else None)
    return value


def _packed(model: ir.Model, pack: Pack, sites: dict[str, AdapterSite], options: PortOptions) -> dict[str, ir.Value]:
    """One input and the Split that hands every member its rows."""
    first = sites[pack.sites[0]]
    [width] = first.width(pack.side)
    rows = len(pack.sites) * first.rank
    value = ir.Value(name=pack.name, type=ir.TensorType(_of_port(first, pack.side)))
    value.shape = ir.Shape([f"{pack.name}.rows" if options.dynamic_rank else rows, width])
    add_input(model, value, ((0 if options.dynamic_rank else rows), width) if options.optional else None)
    if len(pack.sites) == 1:
        return {pack.sites[0]: value}
    inputs, nodes = [value], []
    if model.opset_imports.get("", 1) >= 18:
        nodes = equal_parts(model, value, len(pack.sites))
        inputs.append(nodes[-1].outputs[0])
    split = ir.node("Split", inputs, attributes={"axis": 0}, num_outputs=len(pack.sites), name=f"{pack.name}.split")
    for output, site in zip(split.outputs, pack.sites, strict=True):
        output.name = tensor_name(site, pack.side)
        output.type = value.type
        output.shape = ir.Shape([rank_symbol(pack.name) if options.dynamic_rank else first.rank, width])
    prepend(model, [*nodes, split])
    return dict(zip(pack.sites, split.outputs, strict=True))


def equal_parts(model: ir.Model, value: ir.Value, count: int) -> list[ir.Node]:
    """Nodes that compute the sizes of ``count`` equal parts.

    From opset 18 on Split wants sizes or ``num_outputs``, and ONNX Runtime refuses to cut zero rows by the latter.
    """
    numbers = {"first": [0], "count": [count]}
    constants = []
    for what, number in numbers.items():
        tensor = ir.tensor(np.array(number, np.int64), name=f"{value.name}.{what}")
        constants.append(registered(model, tensor))
    first, parts = constants
    shape = ir.node("Shape", [value], name=f"{value.name}.shape")
    rows = ir.node("Gather", [shape.outputs[0], first], name=f"{value.name}.rows")
    size = ir.node("Div", [rows.outputs[0], parts], name=f"{value.name}.size")
    sizes = ir.node("Expand", [size.outputs[0], parts], name=f"{value.name}.sizes")
    nodes = [shape, rows, size, sizes]
    for node in nodes:
        node.outputs[0].name = node.name
    return nodes


def _packs(sites: list[AdapterSite]) -> tuple[Pack, ...]:
    """Group sites by module type (the last part of the path); only types whose members have one shape are packed."""
    types: dict[str, list[AdapterSite]] = defaultdict(list)
    for site in (site for site in sites if set(LOW_RANK) <= set(site.ports) and not site.kernel):
        types[site.name.rpartition(".")[2]].append(site)
    packs = []
    for kind, members in types.items():
        if len({(s.d_in, s.d_out, s.rank, s.dtype) for s in members}) == 1:
            order = tuple(sorted((s.name for s in members), key=natural_key))
            sides = [port for port in members[0].graph_ports if port in RANKED]
            packs += [Pack(f"{kind}.{side}.weight.packed", side, order) for side in sides]
    return tuple(packs)


def reshaped(model: ir.Model, op_type: str, value: ir.Value, axes: list[int], *, name: str) -> ir.Node:
    """A Squeeze or Unsqueeze, as the model's opset spells it; not yet in the graph."""
    if model.opset_imports.get("", 1) < 13:
        return ir.node(op_type, [value], attributes={"axes": axes}, name=name)
    where = model.graph.initializers.get(f"{name}.axes")
    if where is None:
        where = registered(model, ir.tensor(np.array(axes, np.int64), name=f"{name}.axes"))
    return ir.node(op_type, [value, where], name=name)


def registered(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def add_input(model: ir.Model, value: ir.Value, default: tuple[int, ...] | None, *, fill: float = 0.0) -> None:
    """A graph input, with a tensor of ``fill`` that stands in where it is not fed."""
    model.graph.inputs.append(value)
    if default is not None:
        # ORT lets an initializer with an input's name stand in when the input is not fed. Rank 0 makes it a matrix
        # of no rows, whose product adds exactly zero.
        assert value.dtype is not None, "ports are typed"
        value.const_value = ir.tensor(np.full(default, fill, value.dtype.numpy()), name=value.name)
        model.graph.register_initializer(value)


def prepend(model: ir.Model, nodes: Iterable[ir.Node]) -> None:
    """Put ``nodes`` in front of all others."""
    nodes = list(nodes)
    first = next(iter(model.graph), None)
    if first is None:
        model.graph.extend(nodes)
    else:
        model.graph.insert_before(first, nodes)


def _make_room(model: ir.Model, names: set[str]) -> None:
    """Rename inner values that go by a port's name; refuse where it is the model's own interface."""
    public = {value.name for value in (*model.graph.inputs, *model.graph.outputs)} & names
    weights = {value.name for value in model.graph.inputs if value.is_initializer()}
    if public - weights:
        raise ModelError(
            f"the model has inputs or outputs named {sorted(map(str, public - weights))}, which adapterx needs for its "
            "own; rename them in the export"
        )
    for graph in model.graphs():
        for value in [*graph.initializers.values(), *(output for node in graph for output in node.outputs)]:
            if value.name in names:
                _rename(value, f"{value.name}.exported")


def _rename(value: ir.Value, name: str) -> None:
    """``onnx_ir`` gives the tensor of an initializer the value's new name, and the tensor may be the caller's."""
    tensor, value.const_value = value.const_value, None
    value.name = name
    if isinstance(tensor, ir.ExternalTensor):
        place = (tensor.location, tensor.offset, tensor.length, tensor.dtype)
        value.const_value = ir.ExternalTensor(*place, shape=tensor.shape, name=name, base_dir=tensor.base_dir)
    elif tensor is not None:
        value.const_value = ir.LazyTensor(
            lambda: tensor, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )


def onnx_dtype(site: AdapterSite) -> ir.DataType:
    """The element type of a site's activations."""
    return ir.DataType[_ONNX_NAMES[site.x_dtype]]


def _of_port(site: AdapterSite, port: str) -> ir.DataType:
    return ir.DataType[_ONNX_NAMES[site.dtype_of(port)]]
