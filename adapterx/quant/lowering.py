"""Lowering: the ONNX operators that a quantized weight becomes while torch exports the model."""

from __future__ import annotations

import torch

from adapterx.errors import ModelError
from adapterx.quant.weight import QuantWeight


def emitted(quantized: QuantWeight, x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[..., K]`` times the weight, ``[..., N]``, as ONNX operators."""
    raise ModelError(f"a weight in format {quantized.format!r} has no ONNX form")
