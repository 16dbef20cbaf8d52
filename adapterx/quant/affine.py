"""Affine: integer codes on an even grid, by group. The scales, the zero points and the nearest codes."""

from __future__ import annotations

import torch

from adapterx.quant.scheme import DoubleScheme, Scheme
from adapterx.quant.weight import DoubleScales

Tensor = torch.Tensor

# What the scale of a group of nothing but zeros is: any number would do, but it is divided by.
_TINY = 1e-9


def grouped(weight: Tensor, group: int) -> Tensor:
    """``[N, G, group]`` of ``[N, K]``. A shorter last group is filled with zeros, which every grid here contains."""
    padded: Tensor = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group))
    return padded.reshape(len(weight), -1, group)


def ungrouped(groups: Tensor, inputs: int) -> Tensor:
    """``[N, K]`` of ``[N, G, group]``."""
    return groups.flatten(1)[:, :inputs]


def grid_of(groups: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point, float32 ``[N, G, 1]``, that take in all of ``groups`` ``[N, G, group]``.

    Zero is always on the grid. Symmetric grids reach ``absmax`` at ``2**(bits - 1) - 1`` codes above the middle, or
    with ``full_range`` at ``2**(bits - 1)`` below it, with a negative scale where the largest is positive.
    """
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    return grid_between(low, high, scheme)


def grid_between(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point that reach from ``low`` (at most 0) to ``high`` (at least 0)."""
    if not scheme.symmetric:
        scale = (high - low) / (2**scheme.bits - 1)
        scale = torch.where(scale == 0, torch.full_like(scale, _TINY), scale)
        return scale, torch.round(-low / scale)
    half = 2 ** (scheme.bits - 1)
    middle = torch.full_like(low, float(half))
    reach = torch.maximum(high, -low)
    if scheme.full_range or half == 1:
        scale = reach / half
        scale = torch.where(high > -low, -scale, scale)
    else:
        scale = reach / (half - 1)
    return torch.where(scale == 0, torch.full_like(scale, _TINY), scale), middle


def codes_of(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, float32, shaped as ``groups``; ``zero`` may have a fraction."""
    return torch.clamp(torch.round(groups / scale + zero), 0, 2**bits - 1)


def searched_grid(
    groups: Tensor, scheme: Scheme, *, steps: int = 100, shrink: float = 0.8, power: float = 2.4
) -> tuple[Tensor, Tensor]:
    """The grid, among ranges cut down in ``steps`` to ``1 - shrink``, with the least error ``|w - q|**power`` by group.

    A few clipped weights cost less than a coarse grid for all. The power above 2 is GPTQ's (Frantar et al., arXiv
    2210.17323, in its authors' code), and keeps outliers from being given up too soon.
    """
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    best_scale, best_zero = grid_between(low, high, scheme)
    best = torch.full_like(best_scale, float("inf"))
    for step in range(int(shrink * steps)):
        keep = 1 - step / steps
        scale, zero = grid_between(low * keep, high * keep, scheme)
        error = ((codes_of(groups, scale, zero, scheme.bits) - zero) * scale - groups).abs_().pow_(power)
        total = error.sum(-1, keepdim=True)
        better = total < best
        best = torch.where(better, total, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def double_quantized(scales: Tensor, scheme: DoubleScheme) -> DoubleScales:
    """``scales`` ``[N, G]`` as codes of their own; the weights have to be rounded with ``values()`` of the result.

    Asymmetric: the mean of a group is taken off, and the rest is symmetric about zero, as in QLoRA.
    """
    flat = scales.flatten()
    groups = grouped(flat.unsqueeze(0), scheme.group_size)[0]
    count = torch.full((len(groups), 1), scheme.group_size, device=flat.device)
    count[-1] = len(flat) - scheme.group_size * (len(groups) - 1)
    mean = groups.sum(-1, keepdim=True) / count
    offset = torch.zeros_like(mean) if scheme.symmetric else mean
    half = 2 ** (scheme.bits - 1)
    rest = groups - offset
    rest[-1, int(count[-1, 0]) :] = 0
    scale = rest.abs().amax(-1, keepdim=True) / (half - 1)
    scale = torch.where(scale == 0, torch.full_like(scale, _TINY), scale)
    codes = codes_of(rest, scale, torch.full_like(scale, float(half)), scheme.bits)
    return DoubleScales(
        codes=codes.flatten()[: len(flat)].reshape(scales.shape).to(torch.uint8),
        scale=scale.flatten(),
        offset=offset.flatten(),
        zero=half,
        bits=scheme.bits,
        group=scheme.group_size,
    )
