"""Lowered DoRA: the norm of base plus change, which PEFT computes at each call, known for the time of an export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from adapterx.quant.linear import QuantLinear


@contextlib.contextmanager
def norms_known(model: nn.Module) -> Iterator[None]:
    """Within it, DoRA layers on a `QuantLinear` have their norm as a constant (Liu et al., arXiv 2402.09353).

    It is all that they want of the base's weight, and the file would have to hold that in float for it.
    """
    layers: list[Any] = []
    try:
        for module in model.modules():
            vectors: Any = getattr(module, "lora_magnitude_vector", None) or {}
            base = getattr(module, "base_layer", None)
            if not vectors or not isinstance(base, QuantLinear):
                continue
            owner: Any = module
            for name, layer in vectors.items():
                with torch.no_grad():
                    norm = layer.get_weight_norm(base.quantized.dequantized(), owner.get_delta_weight(name), scaling=1)
                layer.get_weight_norm = lambda *_, norm=norm, **__: norm
                layers.append(layer)
        yield
    finally:
        for layer in layers:
            del layer.get_weight_norm
