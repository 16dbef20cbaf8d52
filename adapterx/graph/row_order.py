"""Which row of the batch each row of a value belongs to, everywhere in a graph: found before the run, or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from adapterx.graph.batch_inputs import batch_inputs
from adapterx.graph.facts import Dims, Fact, Rows, Step
from adapterx.graph.row_moves import MOVES
from adapterx.graph.row_rules import RULES
from adapterx.graph.shape_numbers import numbers_of
from adapterx.graph.shapes import Shapes
from adapterx.graph.sizes import ONE, Size, stated, unknown
from adapterx.graph.view import MICROSOFT, STANDARD, is_op
from adapterx.graph.weights import read
from adapterx.ops import DOMAIN

_SMALL, _MATRIX = 64, 2
_SHARED = "what it reads is the same for all rows of a batch: nothing of the inputs that have rows comes in"


class RowOrder:
    """Where the rows of a batch lie in every value of a graph.

    One pass from the inputs down, in the order of the graph; each operator's rule says where the rows go. What is told
    holds for every run in which the model computes each row of a batch by itself.

    Args:
        model: looked at as it is now, never changed
        shapes: of the model
        bases: results of operations that adapters change, which tell rows apart once there is an adapter, even where
            nothing of the batch comes in (time steps that were expanded to the batch)
    """

    def __init__(self, model: ir.Model, shapes: Shapes, *, bases: Iterable[ir.Value] = ()) -> None:
        self._shapes, self._bases = shapes, frozenset(bases)
        self._opset = model.opset_imports.get("", 1)
        found = batch_inputs(value for value in model.graph.inputs if not value.is_initializer())
        self._rows, self._names, self._facts = found.rows, found.names, dict(found.facts)
        firsts = (value for value, fact in found.facts.items() if fact.rows == Rows())
        self.batch: tuple[str, ...] = tuple(str(value.name) for value in firsts)
        self._visit(model.graph)

    def rows(self, value: ir.Value) -> Rows | str:
        """Where the rows of the batch lie in ``value``; the reason in words where nothing tells."""
        fact = self._of(value)
        if fact is None or fact.rows is None:
            return _SHARED if fact is None or not fact.lost else fact.lost
        if ONE not in {fact.rows.before, fact.rows.after}:
            return f"the rows of the batch lie in the midst of axis {fact.rows.axis} of what it reads"
        return fact.rows

    def _of(self, value: ir.Value | None) -> Fact | None:
        if value is None:
            return None
        if value not in self._facts:
            self._facts[value] = _constant(value)
        return self._facts[value]

    def _visit(self, graph: ir.Graph) -> None:
        for node in graph:
            graphs = _graphs(node)
            if not graphs:
                self._compute(node)
            elif is_op(node, "If"):
                self._choose(node, graphs)
            else:
                self._repeat(node, graphs)

    def _compute(self, node: ir.Node) -> None:
        if is_op(node, "Constant"):
            return
        step = self._step(node)
        known = node.domain in STANDARD or node.domain in {MICROSOFT, DOMAIN}
        rule = MOVES.get(node.op_type) or RULES.get(node.op_type) if known else None
        facts = rule(step) if rule is not None else Fact() if step.is_shared else step.lost("is not known to keep rows")
        several = facts if isinstance(facts, list) else [facts] * len(node.outputs)
        numbers = numbers_of(step) if node.domain in STANDARD else None
        for index, (value, fact) in enumerate(zip(node.outputs, several, strict=True)):
            self._facts[value] = self._complete(value, fact, None if index else numbers)

    def _step(self, node: ir.Node) -> Step:
        operands = tuple(self._of(value) for value in node.inputs)
        return Step(node, operands, self._opset, self._rows, lambda index: self._said(node.outputs[index]))

    def _said(self, value: ir.Value) -> Dims | None:
        shape = self._shapes.shape(value)
        if shape is None:
            rank = self._shapes.rank(value)
            return None if rank is None else (None,) * rank
        return tuple(stated(dim, self._names) for dim in shape)

    def _complete(self, value: ir.Value, fact: Fact, numbers: Dims | None) -> Fact:
        """With what the model says of dimensions, and names for those of which nothing is known."""
        dims = fact.dims
        if dims is None or None in dims:
            said = self._said(value)
            if dims is None:
                dims = said
            elif said is not None and len(said) == len(dims):
                dims = tuple(there if size is None else size for size, there in zip(dims, said, strict=True))
        if dims is not None:
            dims = tuple(unknown(value.name, i) if size is None else size for i, size in enumerate(dims))
        rows, lost = fact.rows, fact.lost
        if rows is not None and dims is not None:
            if rows.axis >= len(dims):
                rows, lost = None, f"value {value.name!r} has {len(dims)} dimensions, and its rows lie beyond them"
            else:
                whole = rows.before * self._rows * rows.after
                dims = (*dims[: rows.axis], whole, *dims[rows.axis + 1 :])
        elif value in self._bases and not lost and dims and dims[0] == self._rows and not self._rows.is_number:
            rows = Rows()
        # Matrices of known width are as far as numbers are followed.
        few = (
            dims is None
            or len(dims) < _MATRIX
            or (len(dims) == _MATRIX and dims[-1] is not None and dims[-1].is_number)
        )
        return dataclasses.replace(fact, dims=dims, rows=rows, lost=lost, numbers=numbers if few else None)

    def _choose(self, node: ir.Node, graphs: list[ir.Graph]) -> None:
        """One branch or the other: they have to agree."""
        for graph in graphs:
            self._visit(graph)
        for index, value in enumerate(node.outputs):
            facts = [fact for graph in graphs if (fact := self._of(graph.outputs[index])) is not None]
            found = {fact.rows for fact in facts if fact.rows is not None}
            lost = next((fact.lost for fact in facts if fact.lost), "")
            if len(found) > 1 and not lost:
                lost = f"node {node.name!r} (If) has branches in which the rows of the batch lie differently"
            ranks = {fact.rank for fact in facts}
            dims = facts[0].dims if len({fact.dims for fact in facts}) == 1 else None
            if dims is None and len(ranks) == 1 and (rank := ranks.pop()) is not None:
                dims = (None,) * rank
            rows = None if lost else next(iter(found), None)
            self._facts[value] = self._complete(value, Fact(dims, rows, lost), None)

    def _repeat(self, node: ir.Node, graphs: list[ir.Graph]) -> None:
        """A loop: nothing is followed into it."""
        inner = [one for graph in graphs for one in ir.traversal.RecursiveGraphIterator(graph)]
        own = {value for one in inner for value in one.outputs} | {value for g in graphs for value in g.inputs}
        read_of = [
            *node.inputs,
            *(value for one in inner for value in one.inputs),
            *(v for g in graphs for v in g.outputs),
        ]
        facts = [self._of(value) for value in read_of if value is not None and value not in own]
        shared = all(fact is None or fact.is_shared for fact in facts)
        fact = Fact() if shared else self._step(node).lost("is a loop")
        for value in own:
            self._facts[value] = fact
        for value in node.outputs:
            self._facts[value] = self._complete(value, fact, None)


def _graphs(node: ir.Node) -> list[ir.Graph]:
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs += attribute.as_graphs()
    return graphs


def _constant(value: ir.Value) -> Fact:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return (
            Fact() if value.shape is None else Fact(tuple(Size(d) if isinstance(d, int) else None for d in value.shape))
        )
    sizes = [int(dim) for dim in tensor.shape.numpy()]
    numbers = None
    if len(sizes) < _MATRIX and tensor.size <= _SMALL and tensor.dtype.is_integer():
        numbers = tuple(Size(int(number)) for number in np.ravel(read(tensor)))
    return Fact(tuple(map(Size, sizes)), numbers=numbers)
