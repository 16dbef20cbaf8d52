"""What a merge does to the tensors of a graph: which are rewritten where they are, and which get a copy of their own.

Private, in place: the graph comes first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from adapterx.base_weight import WEIGHT, BaseWeight
from adapterx.errors import ModelError
from adapterx.graph.bases import Base
from adapterx.graph.merge_plan import Planned
from adapterx.graph.own_tensors import Slot, below, own_operand, own_parameter, readers
from adapterx.graph.rewire import put_after
from adapterx.graph.view import is_op
from adapterx.graph.weights import read
from adapterx.kinds.merged import Merger


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One stored weight that is rewritten.

    Args:
        site: whose it is
        ref: how it is stored, by the names of the initializers that it is read from
        merger: the change beside it
        keep_grid: as for :func:`adapterx.base_weight.written`
        sources: initializer name -> its tensor, as it is before
        targets: initializer name -> the value that will hold what becomes of it; another than that of this name where
            other operations read it too
    """

    site: str
    ref: BaseWeight
    merger: Merger
    keep_grid: bool
    sources: Mapping[str, ir.TensorProtocol]
    targets: Mapping[str, ir.Value]


def edits_of(model: ir.Model, planned: Sequence[Planned], values: Mapping[str, ir.Value]) -> list[Edit]:
    """Prepare ``model`` in place, biases included, and say which weights are to be rewritten.

    Args:
        model: that we may change
        planned: what is merged
        values: everything that a stored weight names

    Raises:
        ModelError: a tensor is shared in a way that cannot be taken apart.
    """
    groups: dict[tuple[str, str], list[Planned]] = {}
    for one in planned:
        assert one.base.weight is not None, "the plan looked at it"
        groups.setdefault((one.base.name, one.base.weight.tensors[WEIGHT]), []).append(one)
    edits = [_edit(members, values) for members in groups.values() if members[0].merger.changes_weight]
    by_bias: dict[tuple[str, ir.Value | None], list[Planned]] = {}
    for one in planned:
        if one.merger.changes_bias:
            by_bias.setdefault((one.base.name, one.base.bias), []).append(one)
    for (_, root), members in by_bias.items():
        if root is not None:
            _write_bias(root, members)
        elif members[0].merger.shift is not None:
            for one in members:
                _add_bias(model, one)
    roots = {values[name] for one in planned if one.base.weight for name in one.base.weight.tensors.values()}
    forget_unread(roots | {one.base.bias for one in planned if one.base.bias is not None})
    return edits


def forget_unread(values: Iterable[ir.Value]) -> None:
    """Initializers that nothing reads any more, because every reader got its own."""
    for value in values:
        graph = value.graph
        if value.is_initializer() and graph is not None and not (value.uses() or value.is_graph_output()):
            del graph.initializers[str(value.name)]


def _edit(members: list[Planned], values: Mapping[str, ir.Value]) -> Edit:
    """The members are one module, called several times perhaps, with one weight."""
    base = members[0].base
    ref = base.weight
    assert ref is not None, "the plan looked at it"
    slots: set[Slot] = {(one.base.op, _weight_slot(one.base)) for one in members}
    roots = {role: values[name] for role, name in ref.tensors.items()}
    sources = {name: _tensor(values[name]) for name in ref.tensors.values()}
    targets: dict[str, ir.Value] = {}
    root = roots.pop(WEIGHT)
    if readers(root) <= slots:
        targets[ref.tensors[WEIGHT]] = _initializer_of(root)
    else:
        own = [own_operand(slot, root, f"{root.name}.{base.name}") for slot in sorted(slots, key=_order)]
        targets[ref.tensors[WEIGHT]] = _one_of(own)
    for role, parameter in roots.items():
        nodes = {node for slot in slots for node in (*below(slot[0]), *_before(slot))}
        name = ref.tensors[role]
        if {node for node, _ in parameter.uses()} <= nodes:
            targets[name] = _initializer_of(parameter)
        else:
            targets[name] = own_parameter(nodes, parameter, f"{parameter.name}.{base.name}")
    return Edit(base.name, ref, members[0].merger, members[0].keep_grid, sources, targets)


def _order(slot: Slot) -> tuple[str, int]:
    return slot[0].name or "", slot[1]


def _one_of(own: list[ir.Value]) -> ir.Value:
    """Copies for several calls of one module are one."""
    first, *others = own
    for value in others:
        value.replace_all_uses_with(first)
        assert value.graph is not None, "it was registered"
        del value.graph.initializers[str(value.name)]
    return first


def _weight_slot(base: Base) -> int:
    return 0 if base.kind == "embedding" else 1


def _before(slot: Slot) -> list[ir.Node]:
    """The nodes between a constant and the operand, along the first input."""
    found: list[ir.Node] = []
    value = slot[0].inputs[slot[1]]
    while value is not None and (node := value.producer()) is not None and not is_op(node, "Constant"):
        found.append(node)
        value = node.inputs[0]
    return found


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None, "a stored weight is constant"
    return tensor


def _initializer_of(value: ir.Value) -> ir.Value:
    """``value`` itself, or an initializer in place of a Constant node."""
    node = value.producer()
    if node is None:
        return value
    graph, tensor = node.graph, _tensor(value)
    assert graph is not None, "a Constant node lies in a graph"
    fresh = ir.Value(name=f"{value.name}.value", type=ir.TensorType(tensor.dtype), const_value=tensor)
    fresh.shape = ir.Shape(tensor.shape.numpy())
    graph.register_initializer(fresh)
    value.replace_all_uses_with(fresh)
    graph.remove(node, safe=True)
    return fresh


# -- Biases -----------------------------------------------------------------------------------------------------------


def _write_bias(root: ir.Value, members: list[Planned]) -> None:
    first = members[0]
    slots = {slot for one in members for slot in _bias_slots(one.base, root)}
    if not slots:
        raise ModelError(f"{first.base.name}: where its bias {root.name!r} enters cannot be seen")
    present = read(_tensor(root))
    whole = np.broadcast_to(present.reshape(-1), first.base.d_out) if present.size == 1 else present.reshape(-1)
    merged = first.merger.bias(whole)
    assert merged is not None, "there is a bias"
    if readers(root) <= slots:
        target = _initializer_of(root)
    else:
        own = [own_operand(slot, root, f"{root.name}.{first.base.name}") for slot in sorted(slots, key=_order)]
        target = _one_of(own)
    content = merged.astype(present.dtype)
    content = content if present.size == 1 and first.base.d_out > 1 else content.reshape(present.shape)
    target.const_value = ir.tensor(np.ascontiguousarray(content), name=target.name)
    target.shape = ir.Shape(content.shape)


def _bias_slots(base: Base, root: ir.Value) -> set[Slot]:
    """Where the bias enters: the operation itself, or what stands between it and ``base.output``."""
    nodes, value = {base.op}, base.op.outputs[0]
    while value is not base.output:
        uses = list(value.uses())
        if len(uses) != 1:
            break
        nodes.add(uses[0].node)
        value = uses[0].node.outputs[0]
    return {slot for slot in readers(root) if slot[0] in nodes}


def _add_bias(model: ir.Model, one: Planned) -> None:
    """An addition behind a base that had no bias."""
    base, shift = one.base, one.merger.bias(None)
    assert shift is not None, "there is something to add"
    shape = (base.d_out, *(1 for _ in base.kernel))
    array = shift.reshape(shape).astype(np.dtype(base.dtype))
    name = f"{base.name}.bias"
    taken = {str(value.name) for graph in model.graphs() for value in graph.initializers.values()}
    while name in taken:
        name += ".merged"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(shape))
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph = base.op.graph
    assert graph is not None, "a base lies in a graph"
    graph.register_initializer(value)
    users = list(base.output.uses())
    node = ir.node("Add", [base.output, value], name=f"{base.name}/bias")
    node.outputs[0].name = f"{base.output.name}/biased"
    put_after(base.output, [node], users)
