"""Rows that an exporter flattened in front of an operation and folded back after it: ``x`` and result as they were.

``nn.Conv1D`` of GPT-2 and every Linear that becomes a Gemm compute ``[n * t, d]``. An adapter that tells the rows of a
batch apart has to work on ``[n, t, d]``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from adapterx.graph.shapes import Shapes
from adapterx.graph.view import SAME_ROWS, constant, is_op, scalar, source
from adapterx.graph.weights import read

_ONE_NUMBER = ("Unsqueeze", "Squeeze", "Cast", "Identity", "Reshape")


def unflattened(x: ir.Value, result: ir.Value, widths: tuple[int, int], shapes: Shapes) -> tuple[ir.Value, ir.Value]:
    """``x`` above the flattening and ``result`` below the folding, where the one undoes the other; else both as given.

    Args:
        x: what the operation reads, ``[rows, d_in]``
        result: what it gives, ``[rows, d_out]``
        widths: ``d_in`` and ``d_out``
        shapes: of the model
    """
    flat, folding = x.producer(), _only_user(result)
    if flat is None or folding is None or not (is_op(flat, *SAME_ROWS) and is_op(folding, *SAME_ROWS)):
        return x, result
    whole, folded = flat.inputs[0], folding.outputs[0]
    if whole is None or not (_stated(whole, folded, widths, shapes) or _computed(whole, folding, widths[1])):
        return x, result
    return whole, folded


def folded_rows(result: ir.Value, width: int, shapes: Shapes) -> ir.Value:
    """``result`` ``[rows, width]`` of a linear layer, or what it is folded to, where that has more dimensions.

    For layers of which :func:`unflattened` finds no ``x``, since an optimizer merged the flattening with what stood
    before it (``[n, heads, t, d] -> [n * t, heads * d]``).
    """
    folding = _only_user(result)
    if folding is None or not is_op(folding, *SAME_ROWS):
        return result
    folded = folding.outputs[0]
    flat, after = shapes.rank(result), shapes.shape(folded)
    if flat != 2 or after is None or len(after) <= flat or after[-1] != width:
        return result
    return folded


def entrance(x: ir.Value, op: ir.Node) -> tuple[ir.Node, int] | None:
    """Where ``x`` enters what is there for ``op`` alone: the operation, or the first node that flattens its rows.

    ``None`` where ``op`` reads something else than the numbers of ``x``, or others read the flattened rows too.
    """
    node = op
    while x not in node.inputs:
        value = node.inputs[0]
        above = None if value is None else value.producer()
        if value is None or above is None or not is_op(above, *SAME_ROWS) or _only_user(value) is not node:
            return None
        node = above
    return node, node.inputs.index(x)


def unflattening(x: ir.Value, folded: ir.Value, d_in: int, name: str) -> list[ir.Node]:
    """Nodes that give ``x`` ``[rows, d_in]`` the leading dimensions of ``folded``; the last one's output is that."""
    numbers = {"first": 0, "last": -1, "width": d_in}
    nodes, values = [], {}
    for what, number in numbers.items():
        tensor = ir.tensor(np.array([number], np.int64), name=f"{name}.x/{what}")
        nodes.append(ir.node("Constant", [], attributes={"value": tensor}, name=f"{name}.x/{what}"))
        values[what] = nodes[-1].outputs[0]
    shape = ir.node("Shape", [folded], name=f"{name}.x/Shape")
    leading = ir.node("Slice", [shape.outputs[0], values["first"], values["last"]], name=f"{name}.x/Slice")
    whole = ir.node("Concat", [leading.outputs[0], values["width"]], attributes={"axis": 0}, name=f"{name}.x/Concat")
    reshaped = ir.node("Reshape", [x, whole.outputs[0]], name=f"{name}.x/Reshape")
    nodes += [shape, leading, whole, reshaped]
    for node in nodes:
        node.outputs[0].name = f"{node.name}.out"
    return nodes


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    alone = len(uses) == 1 and uses[0].idx == 0 and not value.is_graph_output()
    return uses[0].node if alone else None


def _stated(whole: ir.Value, folded: ir.Value, widths: tuple[int, int], shapes: Shapes) -> bool:
    """Both have the same number of dimensions, more than two, and the last are the operation's widths."""
    before, after = shapes.shape(whole), shapes.shape(folded)
    if before is None or after is None or len(before) != len(after) or len(before) <= len(widths):
        return False
    return (before[-1], after[-1]) == widths


def _computed(whole: ir.Value, folding: ir.Node, width: int) -> bool:
    """The new shape is that of ``whole``, dimension by dimension, but for the last."""
    wanted = folding.inputs[1] if is_op(folding, "Reshape") else None
    node = None if wanted is None else _number(wanted).producer()
    if node is None or not is_op(node, "Concat") or len(node.inputs) < 3:
        return False
    *leading, last = node.inputs
    if not _is_width(last, width):
        return False
    return all(_is_dimension(value, i, whole) for i, value in enumerate(leading))


def _number(value: ir.Value) -> ir.Value:
    """Up through what leaves one number the number that it is."""
    while is_op(node := value.producer(), *_ONE_NUMBER) and node is not None and node.inputs[0] is not None:
        value = node.inputs[0]
    return value


def _is_width(value: ir.Value | None, width: int) -> bool:
    found = None if value is None else constant(_number(value))
    return found is not None and found.tensor.size == 1 and int(np.ravel(read(found.tensor))[0]) == width


def _is_dimension(value: ir.Value | None, axis: int, whole: ir.Value) -> bool:
    """``value`` is ``Shape(whole)[axis]``."""
    node = None if value is None else _number(value).producer()
    if node is None or not is_op(node, "Gather") or scalar(node.inputs[1]) != axis or node.inputs[0] is None:
        return False
    shape = node.inputs[0].producer()
    read_of = None if not is_op(shape, "Shape") or shape is None else shape.inputs[0]
    return read_of is not None and source(read_of) is source(whole)
