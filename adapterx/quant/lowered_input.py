"""Lowered inputs: `rounding.rounded` in operators that ONNX has, value for value."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from adapterx.errors import ModelError
from adapterx.quant.codebook import FORMATS
from adapterx.quant.weight import Activation

Tensor = torch.Tensor

# (exponent bits, mantissa bits) of the formats whose values lie in binades.
_MINIFLOATS = {
    "fp4_e2m1": (2, 1),
    "mxfp4": (2, 1),
    "mxfp6_e3m2": (3, 2),
    "mxfp6_e2m3": (2, 3),
    "float8_e4m3fn": (4, 3),
    "mxfp8_e4m3": (4, 3),
    "float8_e5m2": (5, 2),
    "mxfp8_e5m2": (5, 2),
    "float8_e4m3fnuz": (4, 3),
    "float8_e5m2fnuz": (5, 2),
}
# Bits behind the point.
_FIXED = {"mxint8": 6, "mxint4": 2, "mxint2": 0}
_ROUNDINGS = ("even", "nearest", "floor")
_LOWEST, _HIGHEST = -127, 127  # exponents of MX's scales


def rounded_input(x: Tensor, activation: Activation) -> Tensor:
    """float32 ``x`` as the layer multiplies it, from operators with an ONNX form.

    Raises:
        ModelError: a format that has none
    """
    if activation.format in ("int8", "uint8"):
        return _on_integers(x, activation)
    if activation.format not in (*_MINIFLOATS, *_FIXED) or activation.rounding not in _ROUNDINGS:
        raise ModelError(
            f"inputs in {activation.format!r}, rounded by {activation.rounding!r}, have no ONNX form; only weights do"
        )
    if activation.per == "static":
        assert activation.scale is not None, "a static activation has its scale"
        return _on_values(x / activation.scale, activation) * activation.scale
    if activation.per != "block":
        scale = _scale(_largest(x, activation.per), activation.format)
        return _on_values(x / scale, activation) * scale
    inputs, group = x.shape[-1], activation.group
    blocks = pad(x, (0, -inputs % group)).reshape(*x.shape[:-1], -(-inputs // group), group)
    scale = _scale(blocks.abs().amax(-1, keepdim=True), activation.format)
    return (_on_values(blocks / scale, activation) * scale).flatten(-2)[..., :inputs]


def integers_of(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, as floats, their scale and their zero: ``x`` is about ``(codes - zero) * scale``."""
    low, high = (0.0, 255.0) if activation.format == "uint8" else (-128.0, 127.0)
    if activation.per == "static":
        assert activation.scale is not None, "a static activation has its scale"
        scale = activation.scale
        zero = torch.zeros_like(scale) if activation.zero is None else activation.zero.to(torch.float32)
    elif activation.format == "int8":
        scale = _above_zero(_largest(x, activation.per) / 127)
        zero = torch.zeros_like(scale)
    else:
        axes, kept = _axes(x, activation.per), activation.per == "token"
        least, most = x.amin(axes, keepdim=kept).clamp(max=0), x.amax(axes, keepdim=kept).clamp(min=0)
        scale = _above_zero((most - least) / 255)
        zero = torch.round(-least / scale).clamp(0, 255)
    return (torch.round(x / scale) + zero).clamp(low, high), scale, zero


def _on_integers(x: Tensor, activation: Activation) -> Tensor:
    codes, scale, zero = integers_of(x, activation)
    return (codes - zero) * scale


def _largest(x: Tensor, per: str) -> Tensor:
    return x.abs().amax(_axes(x, per), keepdim=per == "token")


def _axes(x: Tensor, per: str) -> list[int]:
    return [-1] if per == "token" else list(range(x.dim()))


def _above_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _on_values(x: Tensor, activation: Activation) -> Tensor:
    """The nearest values of the format, as `codebook.codes_of` finds them."""
    name = activation.format
    largest = FORMATS[name].largest
    fixed = name in _FIXED
    step = torch.full_like(x, 2.0 ** -_FIXED[name]) if fixed else _steps(x.abs().clamp(max=largest), name)
    size = x.clamp(-largest, largest).abs() / step
    match activation.rounding:
        case "even":
            whole = torch.round(size)
        case "nearest":
            whole = torch.floor(size + 0.5)
        case _:
            whole = torch.floor(size)
    nearest = whole * step
    return torch.where(x < 0, -nearest, nearest).clamp(-largest, largest)


def _steps(magnitude: Tensor, name: str) -> Tensor:
    """Between neighbours: it doubles from binade to binade, and a tie goes to the even multiple of it."""
    exponent, mantissa = _MINIFLOATS[name]
    lowest = 2 - 2 ** (exponent - 1) - name.endswith("fnuz")
    step = torch.full_like(magnitude, 2.0 ** (lowest - mantissa))
    for binade in range(lowest + 1, math.floor(math.log2(FORMATS[name].largest)) + 1):
        step = torch.where(magnitude >= 2.0**binade, 2.0 ** (binade - mantissa), step)
    return step


def _scale(absmax: Tensor, name: str) -> Tensor:
    """`codebook.scale_for`, but for the logarithm: no runtime has an exact one, so its floor is put right after."""
    form = FORMATS[name]
    if not form.power_of_two:
        return _above_zero(absmax / form.largest)
    powers = torch.tensor([2.0**power for power in range(_LOWEST, _HIGHEST + 1)], dtype=torch.float32)
    guess = torch.floor(torch.log2(absmax.clamp(min=2.0**_LOWEST))).clamp(_LOWEST, _HIGHEST - 1)
    place = guess.to(torch.int64) - _LOWEST
    place = place - (powers[place] > absmax).to(torch.int64)
    place = place.clamp(min=0)
    place = place + (powers[place + 1] <= absmax).to(torch.int64)
    place = (place - math.floor(math.log2(form.largest))).clamp(0, _HIGHEST - _LOWEST)
    return torch.where(absmax == 0, torch.ones_like(absmax), powers[place])
