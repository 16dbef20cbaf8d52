"""Rounded inputs: what a layer with a quantized activation multiplies by its weights, computed in float."""

from __future__ import annotations

import torch

from adapterx.errors import OptionError
from adapterx.quant.affine import grouped
from adapterx.quant.codebook import FORMATS, codes_of, scale_for, table
from adapterx.quant.weight import Activation

Tensor = torch.Tensor


def rounded(x: Tensor, activation: Activation) -> Tensor:
    """``x`` ``[..., K]`` as it is after quantizing and dequantizing, in its own dtype.

    Raises:
        OptionError: a format that does not go with ``per``
    """
    wide = x.to(torch.float32)
    if activation.format in FORMATS:
        return _on_table(wide, activation).to(x.dtype)
    if activation.format not in ("int8", "uint8") or activation.per == "block":
        raise OptionError(f"activation {activation.format!r} per {activation.per!r} is not supported")
    scale, zero = _grid(wide, activation)
    low, high = (0, 255) if activation.format == "uint8" else (-128, 127)
    codes = torch.clamp(torch.round(wide / scale) + zero, low, high)
    return ((codes - zero) * scale).to(x.dtype)


def _grid(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    if activation.per == "static":
        if activation.scale is None:
            raise OptionError("a static activation needs the scale that calibration found")
        zero = torch.zeros((), device=x.device) if activation.zero is None else activation.zero.to(torch.float32)
        return activation.scale, zero
    low, high = (
        (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)) if activation.per == "token" else (x.amin(), x.amax())
    )
    # ONNX DynamicQuantizeLinear: zero is always on the grid.
    low, high = low.clamp(max=0), high.clamp(min=0)
    if activation.format == "int8":
        scale = torch.maximum(high, -low) / 127
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return scale, torch.zeros_like(scale)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.clamp(torch.round(-low / scale), 0, 255)


def _on_table(x: Tensor, activation: Activation) -> Tensor:
    values = table(activation.format).to(x.device)
    if activation.per == "static":
        if activation.scale is None:
            raise OptionError("a static activation needs the scale that calibration found")
        return values[codes_of(x / activation.scale, activation.format, activation.rounding).long()] * activation.scale
    if activation.per == "tensor":
        absmax = x.abs().amax()
        groups = x
    elif activation.per == "token":
        absmax = x.abs().amax(-1, keepdim=True)
        groups = x
    else:
        groups = grouped(x.flatten(0, -2), activation.group)
        absmax = groups.abs().amax(-1, keepdim=True)
    scale = scale_for(absmax, activation.format)
    found = values[codes_of(groups / scale, activation.format, activation.rounding).long()] * scale
    return found if activation.per != "block" else found.flatten(1)[:, : x.shape[-1]].reshape(x.shape)
