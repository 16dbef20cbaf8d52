"""Static int8: weights and inputs in eight bits, the range of the inputs from calibration (Jacob et al., arXiv
1712.05877).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from adapterx.quant.activation_grid import int8_weight, ranges_of, static_activation
from adapterx.quant.blocks import Block
from adapterx.quant.linear import linear_weight
from adapterx.quant.weight import QuantWeight


@dataclasses.dataclass(frozen=True, slots=True)
class StaticInt8:
    """Weights and inputs in eight bits, with ranges that are fixed.

    Args:
        per_channel: a scale for each row of a weight, else one for all
        symmetric: the middle code of a weight is zero
        format: "uint8" or "int8", of the inputs
        activation_symmetric: zero is the middle of the inputs' codes: 128 for uint8, 0 for int8
    """

    per_channel: bool = True
    symmetric: bool = True
    format: Literal["uint8", "int8"] = "uint8"
    activation_symmetric: bool = False


def static_int8(block: Block, layers: Mapping[str, StaticInt8]) -> dict[str, QuantWeight]:
    """The layers of a block, each with the least and largest input that the float block gave it as its inputs' range.

    Ranges are those of the float model, as with observers: errors of earlier layers do not widen them.
    """
    ranges = ranges_of(block, layers)
    found = {}
    for name, method in layers.items():
        weight = int8_weight(
            linear_weight(block.module.get_submodule(name)),
            per_channel=method.per_channel,
            symmetric=method.symmetric,
            name=name,
        )
        low, high = ranges[name]
        activation = static_activation(low, high, format=method.format, symmetric=method.activation_symmetric)
        found[name] = dataclasses.replace(weight, activation=activation)
    return found
