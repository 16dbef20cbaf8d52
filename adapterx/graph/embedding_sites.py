"""Embeddings with LoRA: ``Gather(A, ids) @ B``, added to what the base gathers for the same ids."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from adapterx.graph.bases import Base
from adapterx.graph.branch_weights import low_rank_of
from adapterx.graph.branches import Branch, branch_between
from adapterx.graph.exported import Exported, exported_of
from adapterx.graph.identity import Identity, identities
from adapterx.graph.operations import operation
from adapterx.graph.paths import Paths
from adapterx.graph.quantized_linear import any_linear
from adapterx.graph.view import Linear, all_nodes, attribute, constant, is_op, scaled


def find_embeddings(model: ir.Model, _: Sequence[Base]) -> list[Exported]:
    """Every embedding with a low-rank branch. An output head that shares its table is a site of its own."""
    factors = []
    for node in all_nodes(model):
        b = any_linear(node)
        if b is None:
            continue
        value, inner = scaled(b.x)
        a = _lookup(value.producer())
        if a is not None and a.d_out == b.d_in:
            factors.append((a, b, inner))
    heads = {a.node for a, _, _ in factors}
    met = (branch_between(a, b, inner=inner, heads=heads) for a, b, inner in factors)
    branches = [branch for branch in met if branch is not None and _is_beside_its_base(branch)]
    if not branches:
        return []
    told = identities(branches, Paths.of(model), strict=False)
    return [_exported(branch, who) for branch, who in zip(branches, told, strict=True)]


def _lookup(node: ir.Node | None) -> Linear | None:
    """A Gather of rows as factor of a branch: ids times one-hot rows, weight ``[vocabulary, rank]``."""
    if node is None or not is_op(node, "Gather") or attribute(node, "axis", 0) != 0:
        return None
    weight, ids = constant(node.inputs[0]), node.inputs[1]
    if weight is None or len(weight.shape) != 2 or ids is None or constant(ids) is not None:
        return None
    return Linear(node=node, x=ids, weight=weight, flipped=False)


def _is_beside_its_base(branch: Branch) -> bool:
    base = None if branch.base_op is None else operation(branch.base_op)
    return base is not None and base.kind == "embedding" and is_op(branch.join, "Add")


def _exported(branch: Branch, who: Identity | None) -> Exported:
    return exported_of(branch, "embedding", who, x=branch.a.x, change=low_rank_of(branch))
