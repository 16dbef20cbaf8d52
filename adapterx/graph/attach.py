"""What the ports of a site do to its base, as nodes: the formula of :class:`adapterx.adapter.LowRank`.

    y = base * (1 + gain) + shift + (x @ a.T * mask) @ b        with x * (1 + input_gain) in front of the base

Private, in place: the graph comes first.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from adapterx.adapter import GAIN, INPUT_GAIN, LORA_A, LORA_B, SHIFT
from adapterx.errors import ModelError
from adapterx.graph.facts import FIRST, Rows
from adapterx.graph.masks import Masks, Operand
from adapterx.graph.operations import factor_of
from adapterx.graph.ports import Ports, onnx_dtype, reshaped
from adapterx.graph.rows import entrance
from adapterx.manifest import ROW_MASK
from adapterx.ops import DOMAIN, LOW_RANK_ADD, ROW_VECTOR, VERSION
from adapterx.site import LORA_SCALE, AdapterSite

_COPIED = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where an adapter meets its base.

    Args:
        base: what the base operation gives, bias included
        x: what it reads: features, pictures, or the ids of an embedding
        op: the base operation
        rank: dimensions of ``base``; 2 where nothing tells (a mask then enters as it is)
        call: how often the module was called before, in this graph; each call has nodes of its own
        rows: where the rows of a batch lie in ``base``; ``None`` where its rows cannot be told apart
        at: a value with as many entries along ``rows.axis``, ``None`` where those are the rows themselves
    """

    base: ir.Value
    x: ir.Value
    op: ir.Node | None
    rank: int
    call: int = 0
    rows: Rows | None = FIRST
    at: ir.Value | None = None

    def operand(self, site: AdapterSite, rank: int | None = None, *, leading: bool = False) -> Operand:
        """What a mask meets here."""
        return Operand(rank or self.rank, onnx_dtype(site), self.rows, self.at, leading)


def attached(model: ir.Model, place: Place, site: AdapterSite, ports: Ports, masks: Masks) -> list[ir.Node]:
    """Nodes that turn ``place.base`` into the adapted value, in order, not yet in the graph.

    The first output of the last one is that value. ``input_gain`` is put in front of the base operation at once.

    Raises:
        ModelError: the base operation does not read its operand itself, so that it cannot be scaled for it alone.
    """
    nodes: list[ir.Node] = []
    if INPUT_GAIN in ports:
        _scale_input(model, place, site, ports[INPUT_GAIN], masks)
    base = place.base
    if GAIN in ports:
        nodes += _vector(model, place, site, ports[GAIN], masks, GAIN)
        scaled = ir.node("Mul", [base, nodes[-1].outputs[0]], name=f"{site.name}.{GAIN}/Mul")
        nodes += [scaled, ir.node("Add", [base, scaled.outputs[0]], name=f"{site.name}.{GAIN}/Add")]
        base = nodes[-1].outputs[0]
    if SHIFT in ports:
        nodes += _vector(model, place, site, ports[SHIFT], masks, SHIFT)
        nodes.append(ir.node("Add", [base, nodes[-1].outputs[0]], name=f"{site.name}.{SHIFT}/Add"))
        base = nodes[-1].outputs[0]
    if LORA_A in ports:
        made = {"conv": _convolved, "embedding": _looked_up}.get(_form(site), _multiplied)
        nodes += made(model, dataclasses.replace(place, base=base), site, ports, masks)
    for node in nodes:
        output = node.outputs[0]
        output.name = output.name or f"{node.name}.out"
    return numbered(nodes, place.call)


def numbered(nodes: list[ir.Node], call: int) -> list[ir.Node]:
    """Names of their own for the nodes at the second and later calls of a module."""
    for node in nodes if call else ():
        node.name = f"{node.name}_{call}"
        for output in node.outputs:
            output.name = f"{output.name}_{call}"
    return nodes


def _form(site: AdapterSite) -> str:
    if site.kernel:
        return "conv"
    return "embedding" if site.is_embedding else "linear"


def scaled_input(model: ir.Model, place: Place, site: AdapterSite, port: ir.Value, masks: Masks) -> list[ir.Node]:
    """Nodes that give ``place.x * (1 + input_gain)``, in order, not yet in the graph.

    Args:
        model: gets the constants that they need
        place: ``rank`` is that of ``x`` here
        site: which of the ports there are
        port: of the gain
        masks: made as they are needed
    """
    nodes = _vector(model, place, site, port, masks, INPUT_GAIN)
    scaled = ir.node("Mul", [place.x, nodes[-1].outputs[0]], name=f"{site.name}.{INPUT_GAIN}/Mul")
    nodes += [scaled, ir.node("Add", [place.x, scaled.outputs[0]], name=f"{site.name}.{INPUT_GAIN}/Add")]
    for node in nodes:
        node.outputs[0].name = f"{node.name}.out"
    return numbered(nodes, place.call)


def _scale_input(model: ir.Model, place: Place, site: AdapterSite, port: ir.Value, masks: Masks) -> None:
    found = None if place.op is None else entrance(place.x, place.op)
    graph = None if found is None else found[0].graph
    if found is None or graph is None:
        raise ModelError(
            f"{site.name}: its input cannot be scaled for it alone, because its operation does not read it directly"
        )
    node, slot = found
    nodes = scaled_input(model, place, site, port, masks)
    graph.insert_before(node, nodes)
    node.replace_input_with(slot, nodes[-1].outputs[0])


def _vector(model: ir.Model, place: Place, site: AdapterSite, port: ir.Value, masks: Masks, name: str) -> list[ir.Node]:
    """Each row's own vector, ready to broadcast against the base."""
    # Channels lie second, so a convolution's vectors get their other axes afterwards.
    rank = 2 if site.kernel else place.rank
    mask = masks.form(place.operand(site, rank), name=ROW_MASK)
    row = ir.node(ROW_VECTOR, [port, mask], domain=DOMAIN, version=VERSION, name=f"{site.name}.{name}/{ROW_VECTOR}")
    row.outputs[0].name = f"{row.name}.out"
    if not site.kernel:
        return [row]
    axes = list(range(2, 2 + len(site.kernel)))
    return [row, reshaped(model, "Unsqueeze", row.outputs[0], axes, name=f"{site.name}.{name}/Unsqueeze")]


def _multiplied(_: ir.Model, place: Place, site: AdapterSite, ports: Ports, masks: Masks) -> list[ir.Node]:
    nodes, x = _multiplied_x(place, site)
    inputs = [place.base, x, ports[LORA_A], ports[LORA_B], masks.form(place.operand(site))]
    inputs += [ports[LORA_SCALE]] if LORA_SCALE in ports else []
    return [*nodes, ir.node(LOW_RANK_ADD, inputs, domain=DOMAIN, version=VERSION, name=f"{site.name}/{LOW_RANK_ADD}")]


def _multiplied_x(place: Place, site: AdapterSite) -> tuple[list[ir.Node], ir.Value]:
    """``x`` times what the base operation multiplies with besides its weight."""
    factor = factor_of(place.op)
    if factor == 1:
        return [], place.x
    tensor = ir.tensor(np.asarray(factor, onnx_dtype(site).numpy()), name=f"{site.name}.x/factor")
    constant = ir.node("Constant", [], attributes={"value": tensor}, name=f"{site.name}.x/factor")
    scaled = ir.node("Mul", [place.x, constant.outputs[0]], name=f"{site.name}.x/Mul")
    return [constant, scaled], scaled.outputs[0]


def _looked_up(_: ir.Model, place: Place, site: AdapterSite, ports: Ports, masks: Masks) -> list[ir.Node]:
    """``a`` is gathered by column, which gives the rank first; the product wants it last."""
    low = ir.node("Gather", [ports[LORA_A], place.x], attributes={"axis": 1}, name=f"{site.name}.lora/Gather")
    order = [*range(1, place.rank), 0]
    last = ir.node("Transpose", [low.outputs[0]], attributes={"perm": order}, name=f"{site.name}.lora/Transpose")
    mask = masks.form(place.operand(site))
    return [low, last, *_weighed(place, site, last.outputs[0], mask, ports[LORA_B])]


def _weighed(place: Place, site: AdapterSite, low: ir.Value, mask: ir.Value, b: ir.Value) -> list[ir.Node]:
    masked = ir.node("Mul", [low, mask], name=f"{site.name}.lora/Mul")
    delta = ir.node("MatMul", [masked.outputs[0], b], name=f"{site.name}.lora/MatMul")
    return [masked, delta, ir.node("Add", [place.base, delta.outputs[0]], name=f"{site.name}.lora/Add")]


def _convolved(model: ir.Model, place: Place, site: AdapterSite, ports: Ports, masks: Masks) -> list[ir.Node]:
    """The base's own convolution to ``r`` channels, weighed, and one of width 1 to the base's."""
    assert place.op is not None, "a convolution's site has its operation"
    same = {name: place.op.attributes[name].value for name in _COPIED if name in place.op.attributes}
    low = ir.node("Conv", [place.x, ports[LORA_A]], attributes=same, name=f"{site.name}.lora_A/Conv")
    mask = masks.form(place.operand(site, 2 + len(site.kernel), leading=True))
    masked = ir.node("Mul", [low.outputs[0], mask], name=f"{site.name}.lora/Mul")
    turned = ir.node("Transpose", [ports[LORA_B]], attributes={"perm": [1, 0]}, name=f"{site.name}.lora_B/Transpose")
    axes = list(range(2, 2 + len(site.kernel)))
    kernel = reshaped(model, "Unsqueeze", turned.outputs[0], axes, name=f"{site.name}.lora_B/Unsqueeze")
    delta = ir.node("Conv", [masked.outputs[0], kernel.outputs[0]], name=f"{site.name}.lora_B/Conv")
    total = ir.node("Add", [place.base, delta.outputs[0]], name=f"{site.name}.lora/Add")
    return [low, masked, turned, kernel, delta, total]
