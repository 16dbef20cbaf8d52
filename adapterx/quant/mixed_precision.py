"""Mixed precision: some layers compute in half, between casts (Micikevicius et al., arXiv 1710.03740)."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from adapterx.errors import ModelError, OptionError
from adapterx.quant.linear import is_linear, linear_weight

Tensor = torch.Tensor
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclasses.dataclass(frozen=True, slots=True)
class HalfPrecision:
    """Weights, inputs and products in ``dtype``: torch.float16 or torch.bfloat16.

    Raises:
        OptionError: another dtype
    """

    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float16, torch.bfloat16):
            raise OptionError(f"{self.dtype} is not a half precision; torch.float16 and torch.bfloat16 are")


class HalfLinear(nn.Linear):
    """A linear layer in half: inputs are cast to its weight's dtype, results back to that of the inputs."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K]`` -> ``[..., N]``, in the dtype of ``input``."""
        return nn.functional.linear(input.to(self.weight.dtype), self.weight, self.bias).to(input.dtype)


class HalfConv1d(nn.Conv1d):
    """A convolution in half, between casts."""

    def forward(self, input: Tensor) -> Tensor:
        """``[n, d_in, t]`` -> ``[n, d_out, t']``, in the dtype of ``input``."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class HalfConv2d(nn.Conv2d):
    """A convolution in half, between casts."""

    def forward(self, input: Tensor) -> Tensor:
        """``[n, d_in, h, w]`` -> ``[n, d_out, h', w']``, in the dtype of ``input``."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class HalfConv3d(nn.Conv3d):
    """A convolution in half, between casts."""

    def forward(self, input: Tensor) -> Tensor:
        """``[n, d_in, d, h, w]`` -> ``[n, d_out, d', h', w']``, in the dtype of ``input``."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


_HALVES = (HalfLinear, HalfConv1d, HalfConv2d, HalfConv3d)


def takes_half(module: nn.Module) -> bool:
    """Whether ``module`` has a form in half: a float linear layer, or a convolution of one to three dimensions."""
    return (is_linear(module) or type(module) in _CONVS) and not isinstance(module, _HALVES)


def half(module: nn.Module, method: HalfPrecision, *, name: str = "a layer") -> nn.Module:
    """A layer like ``module`` that computes in ``method.dtype``; ``module`` is left as it is.

    Raises:
        ModelError: weights that are not finite, or that overflow in that dtype; names ``name``
    """
    weight = linear_weight(module) if is_linear(module) else module.weight
    assert isinstance(weight, Tensor), "takes_half says that it has one"
    narrow = weight.detach().to(method.dtype)
    bad = int((~torch.isfinite(narrow)).sum())
    if bad:
        raise ModelError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite in {method.dtype}")
    bias = module.bias
    layer = _like(module, isinstance(bias, Tensor)).to(device=weight.device, dtype=method.dtype)
    with torch.no_grad():
        layer.weight.copy_(narrow)  # type: ignore[operator]
        if isinstance(bias, Tensor):
            layer.bias.copy_(bias)  # type: ignore[operator]
    return layer.train(module.training)


def _like(module: nn.Module, bias: bool) -> nn.Module:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kind = {nn.Conv1d: HalfConv1d, nn.Conv2d: HalfConv2d, nn.Conv3d: HalfConv3d}[type(module)]
        return kind(
            module.in_channels,
            module.out_channels,
            module.kernel_size,  # type: ignore[arg-type]
            stride=module.stride,  # type: ignore[arg-type]
            padding=module.padding,  # type: ignore[arg-type]
            dilation=module.dilation,  # type: ignore[arg-type]
            groups=module.groups,
            bias=bias,
            padding_mode=module.padding_mode,
        )
    outputs, inputs = linear_weight(module).shape
    return HalfLinear(inputs, outputs, bias=bias)
