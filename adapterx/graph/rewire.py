"""Put the ports of a site where a branch met its base, and take the branch out. Private, in place: graph first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from adapterx.adapter import INPUT_GAIN
from adapterx.errors import ModelError
from adapterx.graph.apart import activation_after
from adapterx.graph.attach import Place, attached, scaled_input
from adapterx.graph.branches import SKIP_NORMS, Branch
from adapterx.graph.exported import Exported, Operand
from adapterx.graph.masks import Masks
from adapterx.graph.ports import Ports, prepend, reshaped
from adapterx.graph.view import MICROSOFT, constant, is_op
from adapterx.site import AdapterSite

# On a value that rewiring replaced: what replaced it. Finders saw the graph as it was before.
_NOW = "adapterx.now"
_NORMS = {
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SimplifiedLayerNormalization",
}


def rewire(
    model: ir.Model,
    branch: Branch,
    site: AdapterSite,
    ports: Ports,
    masks: Masks,
    *,
    place: Place,
) -> None:
    """Let ``site``'s ports do what ``branch`` did.

    Args:
        model: that we may change
        branch: in it
        site: which of the ports there are
        ports: their values
        masks: made as they are needed
        place: as it was before anything was rewired
    """
    base, before = _base_of(branch)
    place = dataclasses.replace(place, base=base, x=branch.x, at=branch.x)
    nodes = attached(model, place, site, ports, masks)
    nodes[-1].name = branch.join.name
    nodes[-1].metadata_props.update(branch.join.metadata_props)
    _put(branch, nodes, before)


def bypass(branch: Branch) -> None:
    """Take ``branch`` out and put nothing in its place: another branch of the same site carries the port."""
    base, before = _base_of(branch)
    _put(branch, [ir.node("Identity", [base], name=branch.join.name)], before)


def put_exported(
    model: ir.Model,
    exported: Exported,
    site: AdapterSite,
    ports: Ports,
    masks: Masks,
    *,
    place: Place,
    before: Place,
) -> None:
    """Let ``site``'s ports do what an exported adapter of another kind than linear LoRA did, at one call of it.

    Args:
        model: that we may change
        exported: in it, and no prompt
        site: which of the ports there are
        ports: their values
        masks: made as they are needed
        place: as it was before anything was rewired
        before: the same for what is put in front of the operation: where a mask meets what it reads
    """
    base, x, join = _now(place.base), _now(place.x), exported.join
    place = dataclasses.replace(place, base=base, x=x, at=base)
    if join is not None and INPUT_GAIN in ports:
        # It stands before the operation; the others come behind it.
        before = dataclasses.replace(before, base=base, x=x, at=x)
        scaled = scaled_input(model, before, site, ports[INPUT_GAIN], masks)
        _replace(join, scaled, {0: scaled[-1].outputs[0]})
        drop_dead(exported.nodes)
        ports, join = {name: port for name, port in ports.items() if name != INPUT_GAIN}, None
    users = [] if join is not None else list(place.base.uses())
    nodes = attached(model, place, site, ports, masks)
    if join is None:
        put_after(place.base, nodes, users)
        return
    nodes[-1].name = join.name
    nodes[-1].metadata_props.update(join.metadata_props)
    operands = [producer for value in join.inputs if value is not None and (producer := value.producer()) is not None]
    after, outputs = _after(join, nodes[-1].outputs[0])
    _replace(join, [*nodes, *after], outputs)
    drop_dead([*operands, *exported.nodes])


def bypass_exported(exported: Exported) -> None:
    """Take an adapter out and put nothing in its place: another of the same site carries the port."""
    join, base = exported.join, exported.base
    assert join is not None, "only what is added can be one of several"
    assert base is not None, "and it is added to something"
    nodes = [ir.node("Identity", [_now(base)], name=join.name)]
    after, outputs = _after(join, nodes[-1].outputs[0])
    _replace(join, [*nodes, *after], outputs)
    drop_dead(exported.nodes)


def put_prompt(model: ir.Model, constant_prompt: ir.Value, port: ir.Value) -> None:
    """Let whoever reads the constant read ``port``, under as many leading dimensions of 1."""
    assert constant_prompt.const_value is not None, "a prompt is a constant"
    axes = list(range(len(constant_prompt.const_value.shape.numpy()) - 2))
    if axes:
        node = reshaped(model, "Unsqueeze", port, axes, name=f"{port.name}.leading")
        node.outputs[0].name = node.name
        prepend(model, [node])
        port = node.outputs[0]
    constant_prompt.replace_all_uses_with(port)
    _drop_initializer(constant_prompt)


def put_after(base: ir.Value, nodes: Sequence[ir.Node], users: Iterable[tuple[ir.Node, int]]) -> None:
    """Let ``users`` of ``base``, and whoever reads it as the model's output, read what ``nodes`` make of it."""
    if not nodes:
        return
    producer, total = base.producer(), nodes[-1].outputs[0]
    assert producer is not None, "the base operation gives its own result"
    graph = producer.graph
    assert graph is not None, "and lies in a graph"
    total.type, total.shape = base.type, base.shape
    base.meta[_NOW] = total
    if base.is_graph_output():
        name, base.name = base.name, f"{base.name}/base"
        total.name = name
        graph.outputs[list(graph.outputs).index(base)] = total
    graph.insert_after(producer, nodes)
    for node, slot in users:
        node.replace_input_with(slot, total)


def blank(model: ir.Model, places: Iterable[Operand]) -> None:
    """Zeros in place of constants that were trained in full; whatever else reads them keeps them.

    Args:
        model: changed
        places: nodes, and which of their inputs
    """
    for node, slot in places:
        value = node.inputs[slot]
        found = constant(value)
        assert value is not None, "an operand that was found is there"
        assert found is not None, "what was trained is a constant"
        name = f"{found.root.name}.zeros{'.turned' if found.transposed else ''}"
        if name not in model.graph.initializers:
            zeros = ir.tensor(np.zeros(found.shape, found.dtype.numpy()), name=name)
            model.graph.register_initializer(
                ir.Value(name=name, type=ir.TensorType(found.dtype), shape=ir.Shape(found.shape), const_value=zeros)
            )
        producer = value.producer()
        node.replace_input_with(slot, model.graph.initializers[name])
        drop_dead([] if producer is None else [producer])
        _drop_initializer(found.root)


def _put(branch: Branch, nodes: list[ir.Node], before: list[ir.Node]) -> None:
    """Let the last of ``nodes`` give what the join gave, and remove what nothing reads any more."""
    after, outputs = _after(branch.join, nodes[-1].outputs[0])
    _replace(branch.join, [*before, *nodes, *after], outputs)
    scaling = None if branch.delta is None else branch.delta.producer()
    drop_dead([branch.b.node, branch.a.node, *([scaling] if scaling is not None else [])])


def _base_of(branch: Branch) -> tuple[ir.Value, list[ir.Node]]:
    """The base alone: a value, and the nodes that make it where the join computed base and sum in one."""
    join = branch.join
    if branch.delta_slot == 2:
        kept = {name: join.attributes[name].value for name in ("alpha", "transB") if name in join.attributes}
        base = ir.node("Gemm", list(join.inputs[:2]), attributes=kept, name=f"{join.name}/base")
        base.outputs[0].name = f"{join.outputs[0].name}/base"
        base.outputs[0].type, base.outputs[0].shape = join.outputs[0].type, join.outputs[0].shape
        return base.outputs[0], [base]
    return branch.base, []


def _after(join: ir.Node, total: ir.Value) -> tuple[list[ir.Node], dict[int, ir.Value]]:
    """What the join did besides adding, as nodes of its own; and its outputs by index."""
    if is_op(join, *SKIP_NORMS, domain=(MICROSOFT,)):
        return _norm(join, total)
    if is_op(join, "FusedGemm", domain=(MICROSOFT,)) and "activation" in join.attributes:
        return _activation(join, total)
    return [], {0: total}


def _activation(join: ir.Node, total: ir.Value) -> tuple[list[ir.Node], dict[int, ir.Value]]:
    total.name = f"{join.outputs[0].name}/sum"
    node = activation_after(join)
    node.replace_input_with(0, total)
    return [node], {0: node.outputs[0]}


def _norm(join: ir.Node, total: ir.Value) -> tuple[list[ir.Node], dict[int, ir.Value]]:
    """SkipLayerNormalization(base, delta, gamma, beta, bias) is a norm of the sum; output 3 is the sum itself."""
    simplified = join.op_type == "SkipSimplifiedLayerNormalization"
    operands = [*join.inputs[2:], None, None, None]
    gamma, beta, bias = (operands[0], None, operands[1]) if simplified else (operands[0], operands[1], operands[2])
    nodes = []
    total.name = f"{join.outputs[0].name}/sum"
    if bias is not None:
        nodes.append(ir.node("Add", [total, bias], name=f"{join.name}/bias"))
        total = nodes[0].outputs[0]
        total.name = f"{join.outputs[0].name}/biased"
    epsilon = join.attributes.get_float("epsilon", 1e-12)
    inputs = [total, gamma] if beta is None else [total, gamma, beta]
    norm = ir.node(_NORMS[join.op_type], inputs, attributes={"axis": -1, "epsilon": epsilon}, name=f"{join.name}/norm")
    if any(output.uses() for output in join.outputs[1:3]):
        raise ModelError(
            f"node {join.name!r} fuses an adapter with a norm whose statistics are used; cannot be taken apart"
        )
    return [*nodes, norm], {0: norm.outputs[0], 3: total}


def _replace(join: ir.Node, nodes: Sequence[ir.Node], outputs: dict[int, ir.Value]) -> None:
    graph = join.graph
    assert graph is not None, "a join lies in a graph"
    old = [join.outputs[i] for i in outputs if i < len(join.outputs)]
    new = [value for i, value in outputs.items() if i < len(join.outputs)]
    ir.convenience.replace_nodes_and_values(graph, join, [join], nodes, old, new)
    for before, after in zip(old, new, strict=True):
        before.meta[_NOW] = after


def _now(value: ir.Value) -> ir.Value:
    """What stands for ``value`` since sites above it were rewired."""
    while (after := value.meta.get(_NOW)) is not None:
        value = after
    return value


def drop_dead(nodes: Iterable[ir.Node]) -> None:
    """Remove ``nodes`` and what only they used, as far as nothing else reads it."""
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if node.graph is None or any(value.uses() or value.is_graph_output() for value in node.outputs):
            continue
        producers = {p for value in node.inputs if value is not None and (p := value.producer()) is not None}
        constants = [value for value in node.inputs if value is not None and value.is_initializer()]
        node.graph.remove(node, safe=True)
        for value in constants:
            _drop_initializer(value)
        queue.extend(producers)


def _drop_initializer(value: ir.Value) -> None:
    graph = value.graph
    if graph is None or value.uses() or value.is_graph_output():
        return
    if value.name is not None and value.name in graph.initializers:
        del graph.initializers[value.name]
    if value.is_graph_input():
        graph.inputs.remove(value)
