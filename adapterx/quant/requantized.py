"""requantized: changed weights in the codes of a weight that is there already, on its grid or one of its kind."""

from __future__ import annotations

import dataclasses

import torch

from adapterx.quant.affine import codes_of, grid_of, grouped, ungrouped
from adapterx.quant.codebook import nearest, scale_for, table
from adapterx.quant.scheme import Scheme
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor


def requantized(weight: Tensor, like: QuantWeight) -> QuantWeight:
    """``weight`` ``[N, K]``, as it acts on the layer's own inputs, in the bits, groups and format of ``like``.

    Each group keeps its scale and zero point, or gets those that take in all of it, whichever leaves the smaller error:
    methods have searched the first, and a change may have outgrown it. Scales that are quantized themselves stay.

    Example:
        >>> from adapterx.quant.rtn import RTN, rtn
        >>> held = rtn(torch.randn(4, 64), RTN())
        >>> torch.equal(requantized(held.dequantized(), held).codes, held.codes)
        True
    """
    values = weight.to(torch.float32)
    if like.pre_scale is not None:
        values = values / like.pre_scale
    if like.order is not None:
        values = values[:, like.order]
    groups = grouped(values, like.group)
    codes, scales, zeros = _nearest(groups, like, like.scales.unsqueeze(-1), _zeros_of(like))
    if like.double is None:
        wide = _nearest(groups, like, *_own_grid(groups, like))
        better = _errors(groups, like, wide) < _errors(groups, like, (codes, scales, zeros))
        codes, scales = torch.where(better, wide[0], codes), torch.where(better, wide[1], scales)
        zeros = torch.where(better, wide[2], zeros)
    kept = None if like.zeros is None else zeros.squeeze(-1).to(like.zeros.dtype)
    return dataclasses.replace(
        like,
        codes=ungrouped(codes, values.shape[1]).to(torch.uint8),
        scales=scales.squeeze(-1),
        zeros=kept,
    )


def _zeros_of(like: QuantWeight) -> Tensor:
    if like.zeros is None:
        return torch.full_like(like.scales, 2.0 ** (like.bits - 1)).unsqueeze(-1)
    return like.zeros.to(torch.float32).unsqueeze(-1)


def _own_grid(groups: Tensor, like: QuantWeight) -> tuple[Tensor, Tensor]:
    if like.is_affine:
        return grid_of(groups, Scheme(bits=like.bits, group_size=like.group, symmetric=like.zeros is None))
    absmax = groups.abs().amax(-1, keepdim=True)
    if like.codebook is None:
        scale = scale_for(absmax, like.format)
    else:
        scale = absmax / like.codebook.abs().max()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.zeros_like(scale)


def _nearest(groups: Tensor, like: QuantWeight, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if like.is_affine:
        return codes_of(groups, scale, zero, like.bits), scale, zero
    if like.codebook is None:
        return nearest(groups / scale, like.format).to(torch.float32), scale, zero
    values, order = torch.sort(like.codebook)
    places = torch.bucketize(groups / scale, (values[1:] + values[:-1]) / 2)
    return order[places].to(torch.float32), scale, zero


def _errors(groups: Tensor, like: QuantWeight, found: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    codes, scale, zero = found
    if like.is_affine:
        levels = codes - zero
    else:
        values = table(like.format).to(codes.device) if like.codebook is None else like.codebook
        levels = values[codes.long()]
    return (levels * scale - groups).square().sum(-1, keepdim=True)
