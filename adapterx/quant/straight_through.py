"""Fake quantization with gradients: rounding is passed straight through (Bengio et al., arXiv 1308.3432).

What is trained on is what is written afterwards: the grids are `affine`'s, and the codes are the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch

from adapterx.quant.affine import grid_between
from adapterx.quant.scheme import Scheme

Tensor = torch.Tensor


class _OnGrid(torch.autograd.Function):
    """``w = (clamp(round(x / scale + offset) + zero) - zero) * scale``, its gradient as if round were nothing.

    One function and not ten operators: the weights of a block go through it at each of hundreds of steps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, offset: Tensor | None, top: int) -> Tensor:
        wide = x / scale
        rounded = torch.round(wide if offset is None else wide + offset).add_(zero)
        levels = rounded.clamp(0, top)
        inside = levels == rounded
        levels = levels.sub_(zero)
        ctx.save_for_backward(levels, wide, inside, scale)
        ctx.shapes = scale.shape, zero.shape, None if offset is None else offset.shape
        return levels * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        levels, wide, inside, scale = ctx.saved_tensors
        scale_shape, zero_shape, offset_shape = ctx.shapes
        for_x = grad * inside if ctx.needs_input_grad[0] else None
        for_scale = for_zero = for_offset = None
        if ctx.needs_input_grad[1]:
            for_scale = (grad * (levels - wide * inside)).sum_to_size(scale_shape)
        if ctx.needs_input_grad[2]:
            for_zero = (grad * scale * (inside.to(grad.dtype) - 1)).sum_to_size(zero_shape)
        if ctx.needs_input_grad[3]:
            for_offset = (grad * scale * inside).sum_to_size(offset_shape)
        return for_x, for_scale, for_zero, for_offset, None


class _Rounded(torch.autograd.Function):
    """``round(x)``, exactly: ``x + (round(x) - x).detach()`` would be off by a bit, and its code by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004 - the signature is torch's
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004
        return grads[0]


def on_grid_through(groups: Tensor, scale: Tensor, zero: Tensor, *, bits: int, offset: Tensor | None = None) -> Tensor:
    """``groups`` ``[N, G, group]`` as they are when quantized on the grid ``[N, G, 1]``, with gradients for all four.

    ``offset``, shaped as ``groups`` and in codes, is added before rounding. ``zero`` has to be whole.

    Example:
        >>> x = torch.tensor([[[0.26, 9.0]]], requires_grad=True)
        >>> y = on_grid_through(x, torch.tensor(0.5), torch.tensor(8.0), bits=4)
        >>> y.sum().backward(); y.tolist(), x.grad.tolist()
        ([[[0.5, 3.5]]], [[[1.0, 0.0]]])
    """
    found: Tensor = _OnGrid.apply(groups, scale, zero, offset, 2**bits - 1)  # type: ignore[no-untyped-call]
    return found


def grid_through(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """`affine.grid_between`, with gradients for ``low`` and ``high`` through the rounded zero points, too."""
    scale, zero = grid_between(low, high, scheme)
    if scheme.symmetric:
        return scale, zero.detach()
    whole: Tensor = _Rounded.apply(-low / scale)  # type: ignore[no-untyped-call]
    return scale, whole
