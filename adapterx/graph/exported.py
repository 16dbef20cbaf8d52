"""Exported: an adapter of another kind than linear LoRA, as a finder meets it in a graph."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import onnx_ir as ir

from adapterx.adapter import LowRank
from adapterx.graph.branches import Branch
from adapterx.graph.identity import Identity
from adapterx.graph.operations import operation
from adapterx.graph.view import constant
from adapterx.site import PORTS, AdapterSite, Kind, NameSource

# A node, and which of its inputs.
Operand: TypeAlias = tuple[ir.Node, int]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """One adapted operation, the adapter that was exported there, and what of the graph is the adapter's.

    Args:
        module: the module's path as the graph spells it (:meth:`adapterx.graph.paths.Paths.canonical` takes it); ``""``
            when nothing tells it, and only the exported adapter can
        adapter: the adapter's name, ``""`` when nothing tells it
        source: what told the name
        kind: of the adapter
        op: the base operation; ``None`` for a prompt, which has none
        x: what the base operation reads, before an adapter scaled it
        base: what the graph has there without the adapter, bias included: what the ports will change
        join: the node whose first output is what the adapter made of ``base``; ``None`` when there is no such node,
            since the weights themselves are the adapter's
        change: the exported adapter, relative parts only
        scale: the factor that the graph applies, for the record (it is in ``change`` already)
        nodes: all nodes that belong to the adapter
        trained: where weights trained in full are read, as nodes and slots; zeros are read there afterwards, and the
            site must be fed
        prompt: the constant that a prompt's port takes the place of
    """

    module: str
    adapter: str
    source: NameSource
    kind: Kind
    op: ir.Node | None
    x: ir.Value | None
    base: ir.Value | None
    join: ir.Node | None
    change: LowRank
    scale: float = 1.0
    nodes: tuple[ir.Node, ...] = ()
    trained: tuple[Operand, ...] = ()
    prompt: ir.Value | None = None

    @property
    def place(self) -> str:
        """The node in words, for messages."""
        node = self.join or self.op
        return f"node {node.name!r}" if node is not None else f"constant {self.module!r}"


def exported_of(branch: Branch, kind: Kind, who: Identity | None, *, x: ir.Value, change: LowRank) -> Exported:
    """A low-rank branch of another operation than a linear one.

    Args:
        branch: with an addition as its join
        kind: of the adapter
        who: the branch is, where anything tells
        x: what the base operation reads
        change: its weights
    """
    return Exported(
        module="" if who is None else who.module,
        adapter="" if who is None else who.adapter,
        source="structure" if who is None else who.source,
        kind=kind,
        op=branch.base_op,
        x=x,
        base=branch.base,
        join=branch.join,
        change=change,
        scale=branch.scale,
        nodes=nodes_between(branch.delta, branch.a.node),
    )


def nodes_between(last: ir.Value | None, first: ir.Node) -> tuple[ir.Node, ...]:
    """Every node from ``first`` down to what makes ``last``, with those that make constants ready for them."""
    found: dict[ir.Node, None] = {}
    queue = [] if last is None else [last]
    while queue:
        node = queue.pop().producer()
        if node is None or node in found:
            continue
        found[node] = None
        queue += [v for v in node.inputs if v is not None and (node is not first or constant(v) is not None)]
    return tuple(found)


def site_of_exported(exported: Exported, name: str) -> AdapterSite:
    """What there is to say of ``exported`` under its canonical name."""
    change, base = exported.change, None if exported.op is None else operation(exported.op)
    held = {side for side, _ in change.tensors()}
    prompt = exported.change.parts.get("prompt")
    return AdapterSite(
        name=name,
        adapter=exported.adapter,
        kind=exported.kind,
        op="?" if exported.op is None else exported.op.op_type,
        d_in=change.d_in if base is None else base.d_in,
        d_out=change.d_out if base is None else base.d_out,
        rank=change.rank if prompt is None else len(prompt),
        scale=exported.scale,
        dtype=change.dtype.name,
        name_source=exported.source,
        node=(node.name or "") if (node := exported.join or exported.op) is not None else "",
        kernel=() if base is None else base.kernel,
        ports=tuple(port for port in PORTS if port in held),
    )
