"""Take a fused activation out of the operation that an optimizer put it into, so that its own result is there again."""

from __future__ import annotations

import onnx_ir as ir

from adapterx.errors import ModelError

_PARAMETERS = {"LeakyRelu": ("alpha",), "Elu": ("alpha",), "HardSigmoid": ("alpha", "beta")}
_KNOWN = frozenset({"Relu", "Tanh", "Sigmoid", *_PARAMETERS})
_OF_FUSION = ("activation", "activation_alpha", "activation_beta", "activation_gamma", "activation_params")


def is_activated(op: ir.Node) -> bool:
    """Whether ``op`` applies an activation to its own result."""
    return "activation" in op.attributes


def take_apart(op: ir.Node) -> None:
    """Replace FusedGemm or FusedConv by the operation and its activation, in place.

    Raises:
        ModelError: an activation that has no operator of its own.
    """
    activation = activation_after(op)
    kept = {name: attribute for name, attribute in op.attributes.items() if name not in _OF_FUSION}
    # A convolution that also adds a fourth operand stays what it is.
    fused = op.op_type == "FusedConv" and len(op.inputs) > 3
    plain = ir.Node(
        op.domain if fused else "",
        op.op_type if fused else op.op_type.removeprefix("Fused"),
        op.inputs,
        attributes=kept.values(),
        name=op.name,
    )
    total, given = plain.outputs[0], op.outputs[0]
    total.name, total.type, total.shape = f"{given.name}/sum", given.type, given.shape
    activation.replace_input_with(0, total)
    graph = op.graph
    assert graph is not None, "an operation lies in a graph"
    ir.convenience.replace_nodes_and_values(graph, op, [op], [plain, activation], [given], [activation.outputs[0]])


def activation_after(op: ir.Node) -> ir.Node:
    """The activation that ``op`` applies, as a node of its own that reads what ``op`` gives.

    Raises:
        ModelError: it has no operator of its own.
    """
    name = op.attributes.get_string("activation")
    given = {
        parameter: op.attributes.get_float(f"activation_{parameter}")
        for parameter in _PARAMETERS.get(name, ())
        if f"activation_{parameter}" in op.attributes
    }
    listed = op.attributes.get_floats("activation_params") if "activation_params" in op.attributes else ()
    given |= dict(zip(_PARAMETERS.get(name, ()), listed, strict=False))
    if name not in _KNOWN or "activation_gamma" in op.attributes:
        raise ModelError(
            f"node {op.name!r} fuses the operation of an adapter with activation {name!r}, which cannot be taken "
            "apart; start from the model as it was before it was optimized"
        )
    return ir.node(name, [op.outputs[0]], attributes=given, name=f"{op.name}/{name}")
