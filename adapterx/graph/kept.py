"""Leave adapters in the codes that a quantizer made of them, as initializers of their own. In place: graph first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from adapterx.adapter import LORA_A, LORA_B, tensor_name
from adapterx.base_weight import SCALE, WEIGHT, ZERO, BaseWeight
from adapterx.errors import ModelError
from adapterx.graph.branches import Branch
from adapterx.graph.own_tensors import below, own_operand, own_parameter
from adapterx.graph.quantized_linear import Codes
from adapterx.graph.rewire import drop_dead
from adapterx.graph.stored import base_weight_of
from adapterx.graph.view import Linear
from adapterx.manifest import Kept

_SUFFIXES = {WEIGHT: "", SCALE: ".scale", ZERO: ".zero_point"}
_WEIGHT_SLOT = 1
_ALIGNMENT = 64

Values = dict[str, ir.Value]  # by role


def is_quantized(branch: Branch) -> bool:
    """Whether at least one factor is stored as codes."""
    return any(isinstance(factor.weight, Codes) for factor in (branch.a, branch.b))


def keep(branches: Sequence[Branch], site: str) -> Kept:
    """Give the factors of a site tensors of its own, whose names tell the site; the nodes stay as they are.

    Args:
        branches: the site's, one for each call of the module; in a graph that we may change
        site: the module's path

    Returns:
        How the tensors hold the adapter.

    Raises:
        ModelError: a form in which no other adapter can be written.
    """
    first, *others = branches
    a, values_a = _own(first.a, tensor_name(site, LORA_A))
    b, values_b = _own(first.b, tensor_name(site, LORA_B))
    for branch in others:
        for factor, values, side in ((branch.a, values_a, LORA_A), (branch.b, values_b, LORA_B)):
            stored, again = _own(factor, tensor_name(site, side))
            if again.keys() != values.keys():
                raise ModelError(
                    f"{site}: the module is called several times, and only some calls are stored as codes "
                    f"({stored.storage} at node {factor.node.name!r}); pass quantized='float'"
                )
            for role, value in again.items():
                value.replace_all_uses_with(values[role])
                _drop(value)
    return Kept(a, b, first.scale)


def into_file(values: Sequence[ir.Value], file: Path) -> None:
    """Write tensors one after another, and let the graph point at them."""
    with file.open("wb") as out:
        for value in values:
            tensor = value.const_value
            assert tensor is not None, "an initializer has a value"
            out.seek(-out.tell() % _ALIGNMENT, 1)
            offset, raw = out.tell(), tensor.tobytes()
            out.write(raw)
            value.const_value = ir.ExternalTensor(
                file.name,
                offset,
                len(raw),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=file.parent,
            )


def _own(factor: Linear, name: str) -> tuple[BaseWeight, Values]:
    """Tensors for one factor, taken out of whatever others share; how they are stored, and their values by role."""
    stored = base_weight_of(factor.node)
    if stored is None or stored.storage not in {"float", "affine"}:
        raise ModelError(
            f"{name}: weights as node {factor.node.name!r} stores them can be read but not written, so that no other "
            "adapter could take their place; pass quantized='float'"
        )
    by_name = {str(value.name): value for value in factor.weight.values}
    roots = {role: by_name[tensor] for role, tensor in stored.tensors.items()}
    before = [node for value in factor.node.inputs[_WEIGHT_SLOT:] for node in _upwards(value)]
    slot = (factor.node, _WEIGHT_SLOT)
    values = {WEIGHT: own_operand(slot, roots[WEIGHT], name)}
    nodes = {*below(factor.node), *_upwards(factor.node.inputs[_WEIGHT_SLOT])}
    for role in (SCALE, ZERO):
        if role in roots:
            values[role] = own_parameter(nodes, roots[role], f"{name}{_SUFFIXES[role]}")
    drop_dead(before)
    for root in roots.values():
        _drop(root)
    names = {role: str(value.name) for role, value in values.items()}
    return dataclasses.replace(stored, tensors=names), values


def _upwards(value: ir.Value | None) -> Iterator[ir.Node]:
    """The nodes between an operand and the constant behind it."""
    while value is not None and (node := value.producer()) is not None:
        yield node
        value = node.inputs[0] if node.inputs else None


def _drop(value: ir.Value) -> None:
    graph, name = value.graph, str(value.name)
    if graph is not None and not value.uses() and not value.is_graph_output() and name in graph.initializers:
        del graph.initializers[name]
