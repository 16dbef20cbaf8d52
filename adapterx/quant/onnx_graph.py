"""What torch's exporter gives, made ready: constants folded but weights kept, names of the model, narrow codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from adapterx.errors import ModelError
from adapterx.quant.lowered_product import KEPT, Product
from adapterx.quant.onnx_signature import Signature

_SCOPES = "pkg.torch.onnx.name_scopes"
# Folders of the machine that exported are nobody's business.
_TALK = ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node")
_LORA = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")


def finished(model: Any, signature: Signature, products: Mapping[str, Product]) -> Any:
    """``model``, an ``onnx_ir.Model``, changed in place.

    Args:
        model: as torch traced it, nothing folded
        signature: what it was called with
        products: of the quantized layers, by name
    """
    import onnx_ir as ir  # noqa: PLC0415 - half a second
    from onnx_ir.passes import common  # noqa: PLC0415
    from onnxscript import optimizer, rewriter  # noqa: PLC0415

    _name(model, signature.prefix)
    model = common.InlinePass()(model).model
    for _ in range(2):
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_should_fold)
        model = rewriter.rewrite(model)
    # Equal initializers are not merged here: every new adapter has zeros for all of its B, and each is its own.
    steps: list[Any] = [
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ]
    for step in steps:
        step(model)
    _narrow(model, products, ir)
    _name_sizes(model, signature)
    return model


def _should_fold(node: Any) -> bool | None:
    """None leaves it to the optimizer."""
    if KEPT in node.metadata_props:
        return False
    # Folded, an adapter's matrix would lose its name.
    if any(part in (value.name or "") for value in node.inputs if value is not None for part in _LORA):
        return False
    return None


def _name(model: Any, prefix: str) -> None:
    """Without what the way in which the model was called put before its parameters' names."""
    for value in list(model.graph.initializers.values()):
        if value.name.startswith(prefix):
            value.name = value.name.removeprefix(prefix)
    for node in model.graph:
        for key in _TALK:
            node.metadata_props.pop(key, None)
        if _SCOPES in node.metadata_props:
            node.metadata_props[_SCOPES] = node.metadata_props[_SCOPES].replace(f"'{prefix}", "'")


def _narrow(model: Any, products: Mapping[str, Product], ir: Any) -> None:
    """Codes of four bits and fewer, which torch has no type for, two to a byte."""
    for layer, product in products.items():
        for name, bits in product.narrow.items():
            value = model.graph.initializers.get(f"{layer}.{name}")
            if value is None or bits != 4:
                continue
            codes = value.const_value.numpy().astype(np.uint8).astype(ml_dtypes.uint4)
            value.const_value = ir.Tensor(codes, dtype=ir.DataType.UINT4, name=value.name)
            value.type = ir.TensorType(ir.DataType.UINT4)


def _name_sizes(model: Any, signature: Signature) -> None:
    """The names that were given to free dimensions; torch numbers them by its own lights."""
    import onnx_ir as ir  # noqa: PLC0415

    fixed = []
    for value in (*model.graph.inputs, *model.graph.outputs):
        named = signature.axes.get(value.name or "", {})
        if value.shape is None or not named:
            continue
        sizes = [size if isinstance(size, int) else named.get(axis, size) for axis, size in enumerate(value.shape)]
        value.shape = ir.Shape(sizes)
        fixed += [f"axis {axis} of {value.name}" for axis, name in named.items() if isinstance(sizes[axis], int)]
    if fixed:
        raise ModelError(
            f"the model's code fixes {', '.join(fixed)}; name the free dimensions with "
            f"dynamic={{input: {{axis: name}}}}, or give dynamic=False"
        )
