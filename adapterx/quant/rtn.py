"""Round to nearest: each weight becomes the nearest code of its group's grid. No data is looked at."""

from __future__ import annotations

import dataclasses

import torch

from adapterx.errors import ModelError
from adapterx.quant.affine import codes_of, double_quantized, grid_of, grouped, searched_grid, ungrouped
from adapterx.quant.codebook import FORMATS, nearest, scale_for, table
from adapterx.quant.scheme import Scheme
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class RTN:
    """Round to nearest, in ``scheme``."""

    scheme: Scheme = dataclasses.field(default_factory=Scheme)


def rtn(weight: Tensor, method: RTN, *, name: str = "a layer") -> QuantWeight:
    """``weight`` ``[N, K]`` in the nearest codes of ``method.scheme``.

    Raises:
        ModelError: NaN or infinity among the weights
        OptionError: a group that does not fit; both name ``name``

    Example:
        >>> found = rtn(torch.tensor([[-8.0, 0.0, 7.0, 3.2]]), RTN(Scheme(bits=4, group_size=-1, symmetric=False)))
        >>> found.dequantized().tolist()
        [[-8.0, 0.0, 7.0, 3.0]]
    """
    weight = finite(weight, name)
    scheme = method.scheme
    group, _ = scheme.groups_of(weight.shape[1], name=name)
    groups = grouped(weight, group)
    if scheme.format != "int":
        return _from_table(groups, weight.shape[1], scheme)
    scale, zero = searched_grid(groups, scheme) if scheme.mse else grid_of(groups, scheme)
    return on_grid(weight, scale.squeeze(-1), zero.squeeze(-1), scheme)


def on_grid(weight: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme) -> QuantWeight:
    """``weight`` ``[N, K]`` in the nearest codes of the grid ``scales``, ``zeros`` ``[N, G]``;

    Doubly quantized scales first, where asked for.
    """
    group, _ = scheme.groups_of(weight.shape[1])
    double = None if scheme.double is None else double_quantized(scales, scheme.double)
    scales = scales if double is None else double.values()
    codes = codes_of(grouped(weight, group), scales.unsqueeze(-1), zeros.unsqueeze(-1), scheme.bits)
    codes = ungrouped(codes, weight.shape[1]).to(torch.uint8)
    return as_weight(codes, scales, zeros, scheme, double=double)


def as_weight(codes: Tensor, scales: Tensor, zeros: Tensor, scheme: Scheme, **rest: object) -> QuantWeight:
    """A `QuantWeight` of ``codes``; zero points are left out where they are the middle, and whole ones become bytes."""
    group, _ = scheme.groups_of(codes.shape[1])
    kept: Tensor | None = zeros
    if scheme.symmetric:
        kept = None
    elif torch.equal(zeros, zeros.round()) and float(zeros.min()) >= 0 and float(zeros.max()) < 2**scheme.bits:
        kept = zeros.to(torch.uint8)
    return QuantWeight(codes=codes, scales=scales, group=group, bits=scheme.bits, zeros=kept, **rest)  # type: ignore[arg-type]


def finite(weight: Tensor, name: str) -> Tensor:
    """``weight`` in float32, none of it NaN or infinite."""
    weight = weight.detach().to(torch.float32)
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise ModelError(f"{name}: {bad} of {weight.numel()} weights are NaN or infinite; mend the checkpoint first")
    return weight


def _from_table(groups: Tensor, inputs: int, scheme: Scheme) -> QuantWeight:
    form = FORMATS[scheme.format]
    scale = scale_for(groups.abs().amax(-1, keepdim=True), scheme.format)
    if scheme.mse and not form.power_of_two:
        scale = _searched(groups, scale, scheme)
    double = None if scheme.double is None else double_quantized(scale.squeeze(-1), scheme.double)
    scales = scale.squeeze(-1) if double is None else double.values()
    codes = ungrouped(nearest(groups / scales.unsqueeze(-1), scheme.format), inputs)
    return QuantWeight(
        codes=codes, scales=scales, group=groups.shape[-1], bits=form.bits, format=scheme.format, double=double
    )


def _searched(groups: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """The scale among 80 between a fifth of ``scale`` and all of it that leaves the least squared error."""
    values = table(scheme.format).to(groups.device)
    best, best_scale = torch.full_like(scale, float("inf")), scale
    for step in range(80):
        tried = scale * (1 - step / 100)
        error = (values[nearest(groups / tried, scheme.format).long()] * tried - groups).square_().sum(-1, keepdim=True)
        best_scale = torch.where(error < best, tried, best_scale)
        best = torch.minimum(best, error)
    return best_scale
