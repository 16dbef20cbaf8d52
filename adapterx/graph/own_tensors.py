"""Tensors of its own for one operation: what others read too (tied weights, merged duplicates) is left to them.

Private, in place: a graph comes first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from adapterx.errors import ModelError
from adapterx.graph.operations import ANY
from adapterx.graph.view import SAME_ROWS, SAME_VALUE, is_op

_STEPS = (*SAME_VALUE, *SAME_ROWS, "Transpose")
# Scales of products of integers and of codes that were looked up come in below the operation.
_BELOW = ("Cast", "Mul", "DequantizeLinear")
_FAR = 3

Slot = tuple[ir.Node, int]


def readers(value: ir.Value) -> set[Slot]:
    """Who finally reads ``value``, seen through what only casts, turns, reshapes or dequantizes it."""
    found: set[Slot] = set()
    queue = [value]
    while queue:
        one = queue.pop()
        if one.is_graph_output():
            raise ModelError(f"{value.name} is an output of the model, and cannot be merged into")
        for node, slot in one.uses():
            if is_op(node, *_STEPS) or is_op(node, "DequantizeLinear", domain=ANY):
                queue.append(node.outputs[0])
            else:
                found.add((node, slot))
    return found


def below(op: ir.Node) -> set[ir.Node]:
    """``op``, and the nodes after it that only scale what it gives, with those that make their scales."""
    nodes: set[ir.Node] = {op}
    node = op
    for _ in range(_FAR):
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or not is_op(uses[0].node, *_BELOW, domain=ANY):
            break
        node = uses[0].node
        nodes.add(node)
        makers = [value.producer() for value in node.inputs if value is not None]
        nodes.update(maker for maker in makers if maker is not None and is_op(maker, "Mul"))
    return nodes


def own_operand(slot: Slot, root: ir.Value, name: str) -> ir.Value:
    """Give the operand at ``slot`` a root of its own: a new initializer, and its own copies of the nodes on the way.

    Args:
        slot: where the operand enters
        root: the constant that it comes from
        name: of the new initializer, made unique

    Returns:
        The initializer, whose tensor is still that of ``root``.
    """
    node, index = slot
    graph = node.graph
    assert graph is not None, "a reader lies in a graph"
    way = list(_way(node.inputs[index], root))
    fresh = _initializer(graph, root, name)
    copy = fresh
    for step in reversed(way):
        inputs = [copy if i == 0 else value for i, value in enumerate(step.inputs)]
        clone = ir.Node(
            step.domain,
            step.op_type,
            inputs,
            step.attributes.values(),
            name=f"{step.name}/{name}",
            version=step.version,
        )
        original = step.outputs[0]
        clone.outputs[0].name, clone.outputs[0].type = f"{original.name}/{name}", original.type
        clone.outputs[0].shape = original.shape
        graph.insert_before(node, clone)
        copy = clone.outputs[0]
    node.replace_input_with(index, copy)
    return fresh


def own_parameter(nodes: Collection[ir.Node], root: ir.Value, name: str) -> ir.Value:
    """Give ``nodes`` an initializer of their own in place of ``root``, which some of them read directly.

    Raises:
        ModelError: none of them does.
    """
    slots = [(node, slot) for node, slot in root.uses() if node in nodes]
    if not slots:
        raise ModelError(f"{root.name} is shared with another operation, in a way that cannot be taken apart")
    graph = slots[0][0].graph
    assert graph is not None, "a reader lies in a graph"
    fresh = _initializer(graph, root, name)
    for node, slot in slots:
        node.replace_input_with(slot, fresh)
    return fresh


def _way(value: ir.Value | None, root: ir.Value) -> Iterator[ir.Node]:
    """Nodes from an operand up to its root, nearest to the operand first."""
    while value is not root:
        node = None if value is None else value.producer()
        assert node is not None, "the root is behind the operand"
        yield node
        value = node.inputs[0]


def _initializer(graph: ir.Graph, root: ir.Value, name: str) -> ir.Value:
    taken = {str(value.name) for value in graph.initializers.values()}
    unique, count = name, 1
    while unique in taken:
        unique, count = f"{name}.{count}", count + 1
    tensor = ir.convenience.get_const_tensor(root)
    assert tensor is not None, "a root is constant"
    fresh = ir.Value(name=unique, type=root.type, shape=root.shape, const_value=tensor)
    fresh.type = fresh.type or ir.TensorType(tensor.dtype)
    fresh.shape = fresh.shape or ir.Shape(tensor.shape.numpy())
    graph.register_initializer(fresh)
    return fresh
