"""The model without its ports: what every site is when nothing is fed, and no trace of adapters."""

from __future__ import annotations

import onnx_ir as ir

from adapterx.errors import ModelError
from adapterx.graph.rewire import drop_dead
from adapterx.graph.view import all_nodes, is_op
from adapterx.manifest import KEY, Manifest
from adapterx.ops import DOMAIN, LOW_RANK_ADD, ROW_VECTOR

# Nodes that make zeros of zeros.
_ZERO = ("Transpose", "Unsqueeze", "Reshape", "Cast", "Identity", "Split", "Gather", "Mul", "MatMul", "Conv")


def take_out_ports(model: ir.Model, manifest: Manifest) -> None:
    """Remove in place everything that ``manifest`` describes, and the manifest.

    A port that is not fed is all zeros. Zeros are followed to the additions where they meet the base, and what was
    added to becomes the sum.

    Raises:
        ModelError: zeros that end somewhere else.
    """
    names = {name for site in manifest.tensor_names().values() for name in site} | {
        pack.name for pack in manifest.packs
    }
    masks = {name for name in (manifest.mask, manifest.row_mask) if name is not None}
    ports = [value for value in _entries(model) if value.name in names | masks]
    zeros = {value for value in ports if value.name in names}
    weights = set(ports) - zeros
    dead: list[ir.Node] = []
    for node in list(all_nodes(model)):
        if zeros.intersection(value for value in node.inputs if value is not None):
            dead.append(node)
            if is_op(node, "Shape"):  # of a packed port, to split it by
                weights.update(node.outputs)
                continue
            base = _what_stays(node, zeros)
            if base is None:
                zeros.update(node.outputs)
            else:
                _stand_in(node.outputs[0], base)
        elif weights.intersection(value for value in node.inputs if value is not None):
            dead.append(node)
            weights.update(node.outputs)
    drop_dead(reversed(dead))
    for value in ports:
        _drop(model, value)
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    model.opset_imports.pop(DOMAIN, None)
    del model.metadata_props[KEY]


def _entries(model: ir.Model) -> list[ir.Value]:
    return list(dict.fromkeys([*model.graph.inputs, *model.graph.initializers.values()]))


def _what_stays(node: ir.Node, zeros: set[ir.Value]) -> ir.Value | None:
    """What the output of a node is that reads zeros: a value that was added to, or ``None`` for zeros."""
    if is_op(node, LOW_RANK_ADD, domain=(DOMAIN,)):
        return node.inputs[0]
    if is_op(node, "Add"):
        others = [value for value in node.inputs if value not in zeros]
        return others[0] if others else None
    if is_op(node, ROW_VECTOR, domain=(DOMAIN,)) or is_op(node, *_ZERO):
        return None
    raise ModelError(f"node {node.name!r} ({node.op_type}) makes something else than a sum of an adapter's tensors")


def _stand_in(total: ir.Value, base: ir.Value) -> None:
    """Let every reader of ``total`` read ``base``; as an output of the model it keeps the name of ``total``."""
    if total.is_graph_output():
        name, total.name = total.name, f"{total.name}/adapted"
        base.name = name
        base.type, base.shape = total.type or base.type, total.shape or base.shape
    total.replace_all_uses_with(base, replace_graph_outputs=True)


def _drop(model: ir.Model, value: ir.Value) -> None:
    assert not value.uses(), f"{value.name} is still read"
    if value.is_graph_input():
        model.graph.inputs.remove(value)
    if value.is_initializer():
        del model.graph.initializers[str(value.name)]
