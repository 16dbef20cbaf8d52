"""(IA)3 in a graph: one ``Mul`` by a constant vector behind a base, or before it.

A vector that features are multiplied with is common (norms, LayerScale), so a name, metadata or a path has to say that
this one is an adapter's: its own, or that it was traced in the module that PEFT made of the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from adapterx.adapter import GAIN, INPUT_GAIN, LowRank
from adapterx.graph.bases import Base
from adapterx.graph.evidence import evidence
from adapterx.graph.exported import Exported
from adapterx.graph.folded import Folding
from adapterx.graph.identity import Identity, agreed
from adapterx.graph.paths import Paths
from adapterx.graph.sums import between
from adapterx.graph.view import SAME_VALUE, is_op
from adapterx.kinds.lora import cast


def find_ia3(model: ir.Model, bases: Sequence[Base]) -> list[Exported]:
    """Every (IA)3 vector of ``model``.

    Args:
        model: looked at
        bases: its base operations
    """
    folding = Folding(model)
    met = []
    for base in bases:
        if base.kind != "embedding":
            for port, node, slot in (*_behind(base, folding), *_before(base, folding)):
                told = evidence(base, node, _own_nodes(node, slot), folding)
                if told.speaks_of("ia3_") or (not told.parts and (told.wrapped or told.silent)):
                    met.append((base, port, node, slot, told))
    if not met:
        return []
    places = [f"the vector at node {node.name!r}" for _, _, node, _, _ in met]
    # The base's name alone does not make a vector an adapter's.
    claims = [told.claims if told.wrapped else () for *_, told in met]
    who = agreed(claims, places, Paths.of(model), strict=False)
    return [_exported(*one[:4], identity, folding) for one, identity in zip(met, who, strict=True)]


def _behind(base: Base, folding: Folding) -> Iterator[tuple[str, ir.Node, int]]:
    """The multiplication that all who read the base's output read it through; and the vector's slot."""
    value = base.output
    while not value.is_graph_output() and len(value.uses()) == 1:
        node, slot = next(iter(value.uses()))
        if _is_vector(node, 1 - slot, base.d_out, len(base.kernel), folding):
            yield GAIN, node, 1 - slot
            return
        if not is_op(node, *SAME_VALUE):
            return
        value = node.outputs[0]


def _before(base: Base, folding: Folding) -> Iterator[tuple[str, ir.Node, int]]:
    node = base.x.producer()
    while is_op(node, *SAME_VALUE) and node is not None and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    for slot in (0, 1):
        if node is not None and _is_vector(node, slot, base.d_in, len(base.kernel), folding):
            yield INPUT_GAIN, node, slot
            return


def _is_vector(node: ir.Node, slot: int, width: int, axes: int, folding: Folding) -> bool:
    """``node`` multiplies with one constant number a feature, the features lying ``axes`` before the last axis."""
    if not is_op(node, "Mul") or not folding.holds(node.inputs[slot]) or folding.holds(node.inputs[1 - slot]):
        return False
    value = node.inputs[slot]
    assert value is not None, "a constant was found there"
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None and tensor.size != width:
        return False
    shape = folding.array(value).shape
    return int(np.prod(shape)) == width and len(shape) > axes and shape[len(shape) - 1 - axes] == width


def _own_nodes(node: ir.Node, slot: int) -> tuple[ir.Node, ...]:
    run = node.inputs[1 - slot]
    assert run is not None, "a product has two operands"
    return between(node, {run})


def _exported(base: Base, port: str, node: ir.Node, slot: int, who: Identity | None, folding: Folding) -> Exported:
    vector, run = node.inputs[slot], node.inputs[1 - slot]
    assert vector is not None, "a product has two operands"
    dtype = folding.dtype(vector).numpy()
    change = cast(folding.array(vector).reshape(1, -1) - 1, dtype, port)
    return Exported(
        module="" if who is None else who.module,
        adapter="" if who is None else who.adapter,
        source="structure" if who is None else who.source,
        kind="ia3",
        op=base.op,
        x=run if port == INPUT_GAIN else base.x,
        base=base.output if port == INPUT_GAIN else run,
        join=node,
        change=LowRank.of_parts({port: change}),
        nodes=_own_nodes(node, slot),
    )
