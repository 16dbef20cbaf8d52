"""What of a model's base is quantized, read off the file: for models that others quantized."""

from __future__ import annotations

import math
import os
from pathlib import Path

import onnx_ir as ir

from adapterx.base_weight import WEIGHT, BaseWeight
from adapterx.errors import NoAdaptersFound
from adapterx.graph.bases import Base, find_bases
from adapterx.graph.load import load_model
from adapterx.graph.sites import find
from adapterx.graph.stored import weight_values
from adapterx.graph.targets import is_head
from adapterx.quantization_table import FloatRow, Quantization, QuantizedRow

_WIDE = 4


def quantized_rows(path: str | os.PathLike[str]) -> Quantization:
    """A row for each quantized weight of the model at ``path``; what it was before is counted as float32.

    Raises:
        ModelError: broken, or no ONNX model.
    """
    model = load_model(path)
    values = weight_values(model)
    rows: dict[str, QuantizedRow] = {}
    floats: list[FloatRow] = []
    for base in find_bases(model):
        name = base.name or base.op.name or str(base.op.outputs[0].name)
        if base.weight is None or not base.weight.quantized:
            # What has no name is a part of a layer: of some, codes alone do not give the product.
            floats += [FloatRow(name, base.op.op_type, _reason(base))] if base.name else []
            continue
        tensors = [ir.convenience.get_const_tensor(values[one]) for one in base.weight.tensors.values()]
        after = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        before = _WIDE * math.prod(base.weight.shape)
        row = QuantizedRow(name, base.op.op_type, (base.d_in, base.d_out), _storage(base.weight), before, after)
        rows.setdefault(base.weight.tensors[WEIGHT], row)
    try:
        adapters = len(find(model, where=str(path)).sites)
    except NoAdaptersFound:
        adapters = 0
    return Quantization(Path(path), tuple(rows.values()), tuple(dict.fromkeys(floats)), adapters)


def _reason(base: Base) -> str:
    if base.kind != "linear":
        return "an embedding" if base.kind == "embedding" else "a convolution"
    return "it makes the logits" if is_head(base) else "left float by its method, or as asked for"


def _storage(weight: BaseWeight) -> str:
    if weight.storage != "affine":
        return f"{weight.storage} in blocks of {weight.block_size}"
    apart = (
        f"in blocks of {weight.block_size}" if weight.block_size else "by channel" if weight.axis is not None else ""
    )
    return f"{'' if weight.signed else 'u'}int{weight.bits} {apart}".strip()
