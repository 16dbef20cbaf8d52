"""Convolutions with LoRA: ``Conv(x, A) -> Conv(., B)`` of width 1, added to the base's convolution of ``x``."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from adapterx.graph.bases import Base
from adapterx.graph.branch_weights import folded
from adapterx.graph.branches import Branch, branch_between
from adapterx.graph.exported import Exported, exported_of
from adapterx.graph.identity import Identity, identities
from adapterx.graph.operations import operation
from adapterx.graph.paths import Paths
from adapterx.graph.view import Linear, all_nodes, attribute, constant, is_op, is_zero, scaled
from adapterx.kinds.conv import spread

_LEAST_AXES = 3
# Where a kernel is put: what is absent stands for this, along every axis.
_PLACING = {"dilations": 1, "pads": 0, "strides": 1}


def find_convs(model: ir.Model, _: Sequence[Base]) -> list[Exported]:
    """Every convolution with a low-rank branch whose first factor goes where the base goes: strides, pads, kernel."""
    factors = []
    for node in all_nodes(model):
        b = _convolution(node)
        if b is None or any(size != 1 for size in b.weight.shape[2:]):
            continue
        value, inner = scaled(b.x)
        a = _convolution(value.producer())
        if a is not None and a.addend is None and group_of(a.node) == 1 and a.d_out == b.d_in * group_of(node):
            factors.append((a, b, inner))
    heads = {a.node for a, _, _ in factors}
    met = (branch_between(a, b, inner=inner, heads=heads) for a, b, inner in factors)
    branches = [branch for branch in met if branch is not None and _is_beside_its_base(branch)]
    if not branches:
        return []
    told = identities(branches, Paths.of(model), strict=False)
    return [_exported(branch, who) for branch, who in zip(branches, told, strict=True)]


def _convolution(node: ir.Node | None) -> Linear | None:
    """A Conv as factor of a branch: weight ``[d_out, d_in / groups, *kernel]``."""
    if node is None or not is_op(node, "Conv"):
        return None
    x, weight = node.inputs[0], constant(node.inputs[1])
    if x is None or weight is None or len(weight.shape) < _LEAST_AXES:
        return None
    addend = node.inputs[2] if len(node.inputs) > 2 else None
    return Linear(node=node, x=x, weight=weight, flipped=True, addend=None if is_zero(addend) else addend)


def group_of(node: ir.Node) -> int:
    """Into how many groups a convolution divides its channels."""
    return int(attribute(node, "group", 1))


def _is_beside_its_base(branch: Branch) -> bool:
    node = branch.base_op
    base = None if node is None else operation(node)
    if node is None or base is None or base.kind != "conv" or branch.refolded or not is_op(branch.join, "Add"):
        return False
    kernel = branch.a.weight.shape[2:]
    return kernel == base.kernel and placing(branch.a.node, len(kernel)) == placing(node, len(kernel))


def placing(node: ir.Node, axes: int) -> list[object]:
    """Everything that says where a convolution of ``node`` puts its kernel."""
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    given: list[object] = [automatic]
    for name, default in _PLACING.items():
        count = 2 * axes if name == "pads" else axes
        given.append(tuple(node.attributes.get_ints(name, [default] * count)))
    return given


def _exported(branch: Branch, who: Identity | None) -> Exported:
    a, b = branch.a.weight.numpy(), branch.b.weight.numpy()
    return exported_of(branch, "conv", who, x=branch.x, change=folded(branch, a, spread(b, len(a))))
