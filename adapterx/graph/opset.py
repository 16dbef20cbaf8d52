"""Say that a model is of a later opset, where its operators mean the same there."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from adapterx.errors import ModelError
from adapterx.graph.view import STANDARD, all_nodes

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
    nodes = [node for node in all_nodes(model) if node.domain in STANDARD]
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
            node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))
    model.opset_imports[""] = version


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


def _axes_as_input(node: ir.Node) -> None:
    axes = np.array(node.attributes.pop("axes").as_ints(), np.int64)
    graph = node.graph
    assert graph is not None, "a node of the model lies in a graph"
    constant = ir.node("Constant", [], {"value": ir.tensor(axes)}, name=f"{node.name}/axes")
    constant.outputs[0].name = f"{node.outputs[0].name}/axes"
    graph.insert_before(node, constant)
    node.resize_inputs(2)
    node.replace_input_with(1, constant.outputs[0])
