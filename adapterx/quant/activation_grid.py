"""Activation grid: eight-bit weights by row or by layer, and the grids of inputs that calibration has seen."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from adapterx.errors import FeedError
from adapterx.quant.affine import grid_of
from adapterx.quant.blocks import Block
from adapterx.quant.rtn import RTN, finite, on_grid, rtn
from adapterx.quant.scheme import Scheme
from adapterx.quant.weight import Activation, QuantWeight

Tensor = torch.Tensor


def int8_weight(weight: Tensor, *, per_channel: bool, symmetric: bool, name: str) -> QuantWeight:
    """``weight`` ``[N, K]`` in eight bits, with one scale a row or one for all rows.

    Raises:
        ModelError: NaN or infinity among the weights
    """
    scheme = Scheme(bits=8, group_size=-1, symmetric=symmetric)
    if per_channel:
        return rtn(weight, RTN(scheme), name=name)
    weight = finite(weight, name)
    scale, zero = grid_of(weight.reshape(1, 1, -1), scheme)
    rows = len(weight)
    return on_grid(weight, scale.reshape(1, 1).repeat(rows, 1), zero.reshape(1, 1).repeat(rows, 1), scheme)


def ranges_of(block: Block, layers: Mapping[str, object]) -> dict[str, tuple[Tensor, Tensor]]:
    """The least and the largest input of each layer over all calls of the float block, zero among them.

    Raises:
        FeedError: NaN or infinity among the inputs
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def sink(name: str, x: Tensor) -> None:
        low, high = (part.to(torch.float32) for part in x.detach().aminmax())
        low, high = low.clamp(max=0), high.clamp(min=0)
        if name in found:
            low, high = torch.minimum(low, found[name][0]), torch.maximum(high, found[name][1])
        found[name] = (low, high)

    block.watch({name: functools.partial(sink, name) for name in layers}, floats=True)
    wrong = [name for name, (low, high) in found.items() if not torch.isfinite(high - low)]
    if wrong:
        raise FeedError(f"{block.name or 'the model'}: calibration gave NaN or infinity to {', '.join(wrong)}")
    return found


def static_activation(low: Tensor, high: Tensor, *, format: str, symmetric: bool) -> Activation:
    """The grid of 256 values from ``low`` (at most 0) to ``high`` (at least 0), as ONNX QuantizeLinear has it.

    Example:
        >>> found = static_activation(torch.tensor(-1.0), torch.tensor(4.1), format="uint8", symmetric=False)
        >>> float(found.scale), int(found.zero)
        (0.019999999552965164, 50)
    """
    if symmetric:
        scale = torch.maximum(high, -low) / 127
        middle = torch.zeros((), device=scale.device)
    else:
        scale = (high - low) / 255
        middle = torch.round(-low / scale) - 128
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    middle = torch.nan_to_num(middle).clamp(-128, 127)
    if format == "int8":
        return Activation(format="int8", per="static", scale=scale, zero=middle.to(torch.int8))
    return Activation(format="uint8", per="static", scale=scale, zero=(middle + 128).to(torch.uint8))
