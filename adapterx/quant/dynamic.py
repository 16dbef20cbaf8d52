"""Dynamic int8: weights in eight bits, and inputs too, on a grid found at each call. No data is looked at."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from adapterx.quant.activation_grid import int8_weight
from adapterx.quant.weight import Activation, QuantWeight


@dataclasses.dataclass(frozen=True, slots=True)
class DynamicInt8:
    """Weights in eight bits, and inputs whose range is found at each call.

    Args:
        per_channel: a scale for each row of a weight, else one for all
        symmetric: the middle code of a weight is zero
        per: one range for a whole input, or one for each token (each row of its last axis)
        activation_symmetric: zero is the middle of the inputs' codes
    """

    per_channel: bool = True
    symmetric: bool = True
    per: Literal["tensor", "token"] = "tensor"
    activation_symmetric: bool = False


def dynamic_int8(weight: torch.Tensor, method: DynamicInt8, *, name: str = "a layer") -> QuantWeight:
    """``weight`` ``[N, K]`` in eight bits, its inputs in eight bits as ONNX DynamicQuantizeLinear rounds them.

    Raises:
        ModelError: NaN or infinity among the weights
    """
    found = int8_weight(weight, per_channel=method.per_channel, symmetric=method.symmetric, name=name)
    # With a range found at each call a symmetric uint8 is int8, and an asymmetric int8 is uint8: the same grid.
    activation = Activation(format="int8" if method.activation_symmetric else "uint8", per=method.per)
    return dataclasses.replace(found, activation=activation)
