"""Say that a model is of a later opset, where its operators mean the same there."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from adapterx.errors import ModelError
from adapterx.graph.ports import equal_parts
from adapterx.graph.view import STANDARD, all_nodes, attribute

# From here on the operators that models are made of changed in what follows, and in nothing else.
_SINCE = 13
# The same words, other meanings.
_OTHERWISE = frozenset({"GridSample", "GroupNormalization"})
_SHOWN = 5


def raise_opset(model: ir.Model, version: int, *, where: str) -> None:
    """Change ``model`` in place, as far as its opset is earlier than ``version``.

    Reductions get their axes as an input, and splits their number, which is what changed on the way. ``onnx``'s own
    converter loses functions, metadata and names.

    Raises:
        ModelError: an operator means something else there; names them.
    """
    present = model.opset_imports.get("", 1)
    if present >= version:
        return
    functions = [function for function in model.functions.values() if "" in function.opset_imports]
    within = (node for function in functions for node in ir.traversal.RecursiveGraphIterator(function.graph))
    nodes = [node for node in (*all_nodes(model), *within) if node.domain in STANDARD]
    strange = sorted({node.op_type for node in nodes if not _is_same(node, present, version)})
    if strange or present < _SINCE:
        met = ", ".join(strange[:_SHOWN]) or "operators"
        raise ModelError(
            f"{where} is of opset {present}, and this format needs opset {version}, where {met} mean something else; "
            f"export for opset {version}, or take format='matmulnbits'"
        )
    for node in nodes:
        if "axes" in node.attributes and _takes_axes(node.op_type, version):
            _axes_as_input(node)
        elif node.op_type == "Split" and len(node.inputs) == 1 and "num_outputs" not in node.attributes:
            _cut(model, node)
    model.opset_imports[""] = version
    for function in functions:
        function.opset_imports[""] = version


def _is_same(node: ir.Node, present: int, version: int) -> bool:
    try:
        old = onnx.defs.get_schema(node.op_type, present, "")
        new = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return False
    if old.since_version == new.since_version:
        return True
    moved = {"axes"} if _takes_axes(node.op_type, version) else set()
    kept = {name: attribute.default_value for name, attribute in old.attributes.items() if name not in moved}
    defaults = {name: attribute.default_value for name, attribute in new.attributes.items()}
    same = all(name in defaults and (name in node.attributes or defaults[name] == kept[name]) for name in kept)
    return same and node.op_type not in _OTHERWISE


def _takes_axes(op_type: str, version: int) -> bool:
    """Whether the operator's axes are an input in that version."""
    return any(formal.name == "axes" for formal in onnx.defs.get_schema(op_type, version, "").inputs)


def _cut(model: ir.Model, node: ir.Node) -> None:
    """Say into how many parts; along the first axis by their sizes, since packed ports have no rows when not fed."""
    graph, value = node.graph, node.inputs[0]
    assert graph is not None and value is not None, "a node of the model"  # noqa: PT018
    if attribute(node, "axis", 0) != 0 or graph is not model.graph:
        node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))
        return
    sizes = equal_parts(model, value, len(node.outputs))
    graph.insert_before(node, sizes)
    node.resize_inputs(2)
    node.replace_input_with(1, sizes[-1].outputs[0])


def _axes_as_input(node: ir.Node) -> None:
    axes = np.array(node.attributes.pop("axes").as_ints(), np.int64)
    graph = node.graph
    assert graph is not None, "a node of the model lies in a graph"
    constant = ir.node("Constant", [], {"value": ir.tensor(axes)}, name=f"{node.name}/axes")
    constant.outputs[0].name = f"{node.outputs[0].name}/axes"
    graph.insert_before(node, constant)
    node.resize_inputs(2)
    node.replace_input_with(1, constant.outputs[0])
