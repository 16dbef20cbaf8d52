"""Masks by position: where a value has several entries for each row of a batch (``[n * t, d]``, ``[t * n, d]``)."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from adapterx.graph.facts import Rows
from adapterx.graph.ports import prepend, registered, reshaped
from adapterx.graph.sizes import ONE, Size


@dataclasses.dataclass(slots=True)
class _Wide:
    """One mask with every row repeated, and all nodes that depend on how often.

    Args:
        value: ``[m, columns]``
        nodes: in order, the first two count the entries
        probes: pairs of nodes that count them at one place each; the earliest in the graph is taken
    """

    value: ir.Value
    nodes: list[ir.Node]
    probes: list[tuple[ir.Node, ir.Node]]


class MaskPositions:
    """Masks ``[n, columns]`` as ``[m, columns]``, for which nodes compute in the run how often m has n.

    Entry i takes row ``i // (m / n)`` where the rows lie outermost, and ``i % n`` where they lie innermost.

    A mask of one row serves every m. Where n does not divide m the run stops at a Reshape. The nodes read a shape, so
    they lie behind what has it, not in front of the graph; places of provably the same m share them.

    Args:
        model: that we may change
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._wide: dict[tuple[ir.Value, Size, Size, ir.Graph], _Wide] = {}
        self._counts: dict[ir.Value, ir.Value] = {}

    def wide(self, mask: ir.Value, rows: Rows, at: ir.Value) -> ir.Value:
        """``mask`` for entries like those of ``at`` along ``rows.axis``."""
        producer = at.producer()
        graph = self._model.graph if producer is None or producer.graph is None else producer.graph
        assert isinstance(graph, ir.Graph), "functions have no sites"
        key = (mask, rows.before, rows.after, graph)
        index = len(self._wide)
        name = f"{mask.name}.wide{index or ''}"
        if key in self._wide:
            made = self._wide[key]
            made.probes.append(self._probe(at, rows.axis, f"{made.value.name}.entries{len(made.probes)}"))
            return made.value
        probe = self._probe(at, rows.axis, f"{name}.entries")
        nodes = self._repeated(mask, probe[1].outputs[0], name, inside=rows.before != ONE)
        self._wide[key] = _Wide(nodes[-1].outputs[0], nodes, [probe])
        return self._wide[key].value

    def then(self, wide: ir.Value, nodes: list[ir.Node]) -> None:
        """Let ``nodes`` follow those of ``wide``."""
        made = next(made for made in self._wide.values() if made.value is wide)
        made.nodes += nodes

    def place(self) -> None:
        """Put all nodes into the graph, each group behind the earliest value that it can count the entries of."""
        orders: dict[ir.Graph, dict[ir.Node, int]] = {}
        for (*_, graph), made in self._wide.items():
            order = orders.setdefault(graph, {node: i for i, node in enumerate(graph)})
            producers = [_source(probe).producer() for probe in made.probes]
            places = [-1 if producer is None else order[producer] for producer in producers]
            first = places.index(min(places))
            probe, producer = made.probes[first], producers[first]
            if first:
                ir.convenience.replace_all_uses_with(made.probes[0][1].outputs[0], probe[1].outputs[0])
            for shape, _ in made.probes[:first] + made.probes[first + 1 :]:
                shape.replace_input_with(0, None)
            if producer is None:
                prepend(self._model, [*probe, *made.nodes])
            else:
                graph.insert_after(producer, [*probe, *made.nodes])

    def _probe(self, at: ir.Value, axis: int, name: str) -> tuple[ir.Node, ir.Node]:
        shape = _node("Shape", [at], f"{name}.shape")
        return shape, _node("Gather", [shape.outputs[0], self._number(axis)], name)

    def _repeated(self, mask: ir.Value, entries: ir.Value, name: str, *, inside: bool) -> list[ir.Node]:
        one = self._number(1)
        often = _node("Div", [entries, self._rows(mask)], f"{name}.often")
        spread_to = [often.outputs[0], one, one] if inside else [one, often.outputs[0], one]
        times = ir.node("Concat", spread_to, attributes={"axis": 0}, name=f"{name}.times")
        apart = reshaped(self._model, "Unsqueeze", mask, [0 if inside else 1], name=f"{name}.apart")
        spread = _node("Expand", [apart.outputs[0], times.outputs[0]], f"{name}.spread")
        flat = ir.node("Flatten", [spread.outputs[0]], attributes={"axis": 2}, name=f"{name}.flat")
        # A 0 keeps the dimension. Where the rows do not come out even this is what stops the run.
        ends = [entries, self._number(0)]
        target = ir.node("Concat", ends, attributes={"axis": 0}, name=f"{name}.target")
        whole = _node("Reshape", [flat.outputs[0], target.outputs[0]], name)
        nodes = [often, times, apart, spread, flat, target, whole]
        for node in nodes:
            node.outputs[0].name = node.name
        return nodes

    def _rows(self, mask: ir.Value) -> ir.Value:
        """How many rows a mask has; 1 for none, by which one can divide."""
        if mask not in self._counts:
            zero, one = self._number(0), self._number(1)
            shape = _node("Shape", [mask], f"{mask.name}.shape")
            count = _node("Gather", [shape.outputs[0], zero], f"{mask.name}.count")
            none = _node("Equal", [count.outputs[0], zero], f"{mask.name}.none")
            rows = _node("Where", [none.outputs[0], one, count.outputs[0]], f"{mask.name}.rows")
            prepend(self._model, [shape, count, none, rows])
            self._counts[mask] = rows.outputs[0]
        return self._counts[mask]

    def _number(self, number: int) -> ir.Value:
        name = f"adapter_mask.number_{number}"
        found = self._model.graph.initializers.get(name)
        return found or registered(self._model, ir.tensor(np.array([number], np.int64), name=name))


def _node(op_type: str, inputs: list[ir.Value], name: str) -> ir.Node:
    node = ir.node(op_type, inputs, name=name)
    node.outputs[0].name = name
    return node


def _source(probe: tuple[ir.Node, ir.Node]) -> ir.Value:
    """What is counted, as it is now: sites above may have put another value in its place."""
    value = probe[0].inputs[0]
    assert value is not None, "it was given"
    return value
