"""Ports: how the weights of a site come into the graph, as external initializers, inputs, or packed inputs."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from adapterx.adapter import LORA_A, LORA_B, tensor_name
from adapterx.errors import ModelError
from adapterx.manifest import MASK, Pack, Port
from adapterx.site import AdapterSite

Pair = tuple[ir.Value, ir.Value]

_ONNX_NAMES = {"float16": "FLOAT16", "bfloat16": "BFLOAT16", "float32": "FLOAT", "float64": "DOUBLE"}


@dataclasses.dataclass(frozen=True, slots=True)
class PortOptions:
    """What the caller asked for.

    Args:
        port: ``input``, ``packed`` or ``external``
        dynamic_rank: the rank is symbolic, one symbol a site; else that of the exported adapter
        optional: inputs have a default that makes the site the base
        location: file name that external initializers point at
    """

    port: Port
    dynamic_rank: bool
    optional: bool
    location: str


def add_ports(
    model: ir.Model, sites: list[AdapterSite], options: PortOptions
) -> tuple[dict[str, Pair], tuple[Pack, ...]]:
    """Add a pair of values for every site, and say which of them are parts of packed inputs.

    Raises:
        ModelError: the model has an input or output of its own by the name of a port.
    """
    names = [tensor_name(site.name, side) for site in sites for side in (LORA_A, LORA_B)]
    _make_room(model, {*names, MASK})
    packs = _packs(sites) if options.port == "packed" else ()
    packed = {site for pack in packs for site in pack.sites}
    pairs = {site.name: _pair(model, site, options) for site in sites if site.name not in packed}
    by_name = {site.name: site for site in sites}
    halves: dict[str, dict[str, ir.Value]] = defaultdict(dict)
    for pack in packs:
        for member, value in _packed(model, pack, by_name, options).items():
            halves[member][pack.side] = value
    pairs |= {name: (sides[LORA_A], sides[LORA_B]) for name, sides in halves.items()}
    return pairs, packs


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key of dotted paths with numbers as numbers: ``layers.2`` before ``layers.10``."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def rank_symbol(site: str) -> str:
    """Name of a site's symbolic rank. One a site: a symbol that binds to two sizes can abort a run."""
    return f"{site}.rank"


def _pair(model: ir.Model, site: AdapterSite, options: PortOptions) -> Pair:
    rank: int | str = rank_symbol(site.name) if options.dynamic_rank and options.port != "external" else site.rank
    a = ir.Value(name=tensor_name(site.name, LORA_A), shape=ir.Shape([rank, site.d_in]))
    b = ir.Value(name=tensor_name(site.name, LORA_B), shape=ir.Shape([rank, site.d_out]))
    offset = 0
    for value, width in ((a, site.d_in), (b, site.d_out)):
        value.type = ir.TensorType(_dtype(site))
        if options.port == "external":
            # The bytes are given at load; offsets keep the tensors apart for tools that look.
            length = site.rank * width * _dtype(site).itemsize
            value.const_value = ir.ExternalTensor(
                options.location,
                offset,
                int(length),
                _dtype(site),
                shape=ir.Shape([site.rank, width]),
                name=value.name or "",
            )
            model.graph.register_initializer(value)
        else:
            default = (0 if options.dynamic_rank else site.rank, width)
            _add_input(model, value, default if options.optional else None)
    return a, b


def _packed(model: ir.Model, pack: Pack, sites: dict[str, AdapterSite], options: PortOptions) -> dict[str, ir.Value]:
    """One input and the Split that hands every member its rows."""
    first = sites[pack.sites[0]]
    width = first.d_in if pack.side == LORA_A else first.d_out
    rows = len(pack.sites) * first.rank
    value = ir.Value(name=pack.name, type=ir.TensorType(_dtype(first)))
    value.shape = ir.Shape([f"{pack.name}.rows" if options.dynamic_rank else rows, width])
    _add_input(model, value, ((0 if options.dynamic_rank else rows), width) if options.optional else None)
    if len(pack.sites) == 1:
        return {pack.sites[0]: value}
    inputs, nodes = [value], []
    if model.opset_imports.get("", 1) >= 18:
        nodes = _equal_parts(model, value, len(pack.sites))
        inputs.append(nodes[-1].outputs[0])
    split = ir.node("Split", inputs, attributes={"axis": 0}, num_outputs=len(pack.sites), name=f"{pack.name}.split")
    for output, site in zip(split.outputs, pack.sites, strict=True):
        output.name = tensor_name(site, pack.side)
        output.type = value.type
        output.shape = ir.Shape([rank_symbol(pack.name) if options.dynamic_rank else first.rank, width])
    _prepend(model, [*nodes, split])
    return dict(zip(pack.sites, split.outputs, strict=True))


def _equal_parts(model: ir.Model, value: ir.Value, count: int) -> list[ir.Node]:
    """Nodes that compute the sizes of ``count`` equal parts.

    From opset 18 on Split wants sizes or ``num_outputs``, and ONNX Runtime refuses to cut zero rows by the latter.
    """
    numbers = {"first": [0], "count": [count]}
    constants = []
    for what, number in numbers.items():
        tensor = ir.tensor(np.array(number, np.int64), name=f"{value.name}.{what}")
        constants.append(_registered(model, tensor))
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
    for site in sites:
        types[site.name.rpartition(".")[2]].append(site)
    packs = []
    for kind, members in types.items():
        if len({(s.d_in, s.d_out, s.rank, s.dtype) for s in members}) == 1:
            order = tuple(sorted((s.name for s in members), key=natural_key))
            packs += [Pack(f"{kind}.{side}.weight.packed", side, order) for side in (LORA_A, LORA_B)]
    return tuple(packs)


class Masks:
    """The one mask input, and its forms for operands of other ranks and dtypes, each made once.

    ``adapter_mask`` is ``[n, R]``. A site whose ``x`` is ``[n, t, d_in]`` needs it as ``[n, 1, R]``.
    """

    def __init__(self, model: ir.Model, *, as_input: bool) -> None:
        self._model = model
        self._input = ir.Value(name=MASK, type=ir.TensorType(ir.DataType.FLOAT))
        self._forms: dict[tuple[int, ir.DataType], ir.Value] = {}
        if as_input:
            self._input.shape = ir.Shape(["adapter_rows", "adapter_ranks"])
            _add_input(model, self._input, (1, 1), fill=1.0)
        else:
            self._input.shape = ir.Shape([1, 1])
            self._input.const_value = ir.tensor(np.ones((1, 1), np.float32), name=MASK)
            model.graph.register_initializer(self._input)

    def form(self, rank: int, dtype: ir.DataType) -> ir.Value:
        """The mask for ``x`` of ``rank`` dimensions in ``dtype``."""
        key = (rank, dtype)
        if key not in self._forms:
            self._forms[key] = self._made(*key)
        return self._forms[key]

    def _made(self, rank: int, dtype: ir.DataType) -> ir.Value:
        value, nodes = self._input, []
        name = f"{MASK}.{rank}d"
        if rank > 2:
            nodes.append(self._reshaped("Unsqueeze", value, list(range(1, rank - 1)), name))
            value = nodes[-1].outputs[0]
        elif rank == 1:
            # One row without a batch axis.
            nodes.append(self._reshaped("Squeeze", value, [0], name))
            value = nodes[-1].outputs[0]
        if dtype != ir.DataType.FLOAT:
            name = f"{name}.{dtype.name.lower()}"
            nodes.append(ir.node("Cast", [value], attributes={"to": dtype.value}, name=name))
            value = nodes[-1].outputs[0]
        if nodes:
            value.name = name
        _prepend(self._model, nodes)
        return value

    def _reshaped(self, op_type: str, value: ir.Value, axes: list[int], name: str) -> ir.Node:
        if self._model.opset_imports.get("", 1) < 13:
            return ir.node(op_type, [value], attributes={"axes": axes}, name=name)
        where = self._model.graph.initializers.get(f"{name}.axes")
        if where is None:
            where = _registered(self._model, ir.tensor(np.array(axes, np.int64), name=f"{name}.axes"))
        return ir.node(op_type, [value, where], name=name)


def _registered(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _add_input(model: ir.Model, value: ir.Value, default: tuple[int, int] | None, *, fill: float = 0.0) -> None:
    model.graph.inputs.append(value)
    if default is not None:
        # ORT lets an initializer with an input's name stand in when the input is not fed. Rank 0 makes it a matrix
        # of no rows, whose product adds exactly zero.
        assert value.dtype is not None, "ports are typed"
        value.const_value = ir.tensor(np.full(default, fill, value.dtype.numpy()), name=value.name)
        model.graph.register_initializer(value)


def _prepend(model: ir.Model, nodes: Iterable[ir.Node]) -> None:
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
                value.name = f"{value.name}.exported"


def _dtype(site: AdapterSite) -> ir.DataType:
    return ir.DataType[_ONNX_NAMES[site.dtype]]
