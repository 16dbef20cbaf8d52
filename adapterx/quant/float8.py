"""Float8: weights and inputs as E4M3 or E5M2 (Micikevicius et al., FP8 Formats for Deep Learning, arXiv 2209.05433)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch

from adapterx.errors import OptionError
from adapterx.quant.activation_grid import ranges_of
from adapterx.quant.blocks import Block
from adapterx.quant.codebook import FORMATS, nearest, scale_for
from adapterx.quant.linear import linear_weight
from adapterx.quant.rtn import finite
from adapterx.quant.weight import Activation, Output, QuantWeight

Tensor = torch.Tensor
Scaling = Literal["arbitrary", "power_of_two", "unit"]


@dataclasses.dataclass(frozen=True, slots=True)
class Float8:
    """Weights, and inputs where ``activation`` is given, in an eight-bit float.

    Args:
        format: "float8_e4m3fn", "float8_e5m2", or either's "fnuz"
        activation: "static" takes the scale from calibration, "tensor" and "token" find it at each call; None leaves
            the inputs
        per_channel: a scale for each row of a weight, else one for all
        scaling: the largest value becomes the format's largest ("arbitrary"), that scale rounded up to a power of two,
            or 1, which cuts off what does not fit
        output: what results are rounded to; None leaves them

    Raises:
        OptionError: not a float8; a scaling other than "arbitrary" with inputs whose scale is found at each call
    """

    format: str = "float8_e4m3fn"
    activation: Literal["static", "tensor", "token"] | None = "static"
    per_channel: bool = False
    scaling: Scaling = "arbitrary"
    output: Output | None = None

    def __post_init__(self) -> None:
        known = [name for name in FORMATS if name.startswith("float8")]
        if self.format not in known:
            raise OptionError(f"{self.format!r} is no eight-bit float; known are {', '.join(known)}")
        if self.activation in ("tensor", "token") and self.scaling != "arbitrary":
            raise OptionError(f"scaling={self.scaling!r} needs a static activation, not one per {self.activation}")


def float8(weight: Tensor, method: Float8, *, name: str = "a layer") -> QuantWeight:
    """``weight`` ``[N, K]`` in an eight-bit float; the inputs' scale is found at each call, or they are left.

    Raises:
        ModelError: NaN or infinity among the weights
    """
    weight = finite(weight, name)
    absmax = weight.abs().amax(-1, keepdim=True) if method.per_channel else weight.abs().amax().reshape(1, 1)
    scale = _scale(absmax, method).expand(len(weight), 1).contiguous()
    activation = None
    if method.activation in ("tensor", "token"):
        activation = Activation(format=method.format, per=method.activation)
    return QuantWeight(
        codes=nearest(weight / scale, method.format),
        scales=scale,
        group=weight.shape[1],
        bits=8,
        format=method.format,
        activation=activation,
        output=method.output,
    )


def float8_static(block: Block, layers: Mapping[str, Float8]) -> dict[str, QuantWeight]:
    """The layers of a block, the scale of their inputs from the largest that the float block gave them."""
    ranges = ranges_of(block, layers)
    found = {}
    for name, method in layers.items():
        low, high = ranges[name]
        scale = _scale(torch.maximum(high, -low), method)
        weight = float8(linear_weight(block.module.get_submodule(name)), method, name=name)
        activation = Activation(format=method.format, per="static", scale=scale)
        found[name] = dataclasses.replace(weight, activation=activation)
    return found


def _scale(absmax: Tensor, method: Float8) -> Tensor:
    if method.scaling == "unit":
        return torch.ones_like(absmax)
    scale = scale_for(absmax, method.format)
    return scale if method.scaling == "arbitrary" else torch.exp2(torch.ceil(torch.log2(scale)))
