"""Levels: the values that the weights of each group may take, for methods that choose codes one column at a time or try
several ranges. An even grid or a table, alike.
"""

from __future__ import annotations

import dataclasses

import torch

from adapterx.quant.affine import codes_of, double_quantized, grid_between, searched_grid
from adapterx.quant.codebook import FORMATS, nearest, scale_for, table
from adapterx.quant.rtn import as_weight
from adapterx.quant.scheme import Scheme
from adapterx.quant.weight import DoubleScales, QuantWeight

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """Of groups of weights.

    Args:
        scheme: says what lies between
        scale: float32 ``[N, G]``
        zero: float32 ``[N, G]``, the code of zero; without meaning for a table
        double: what ``scale`` was rounded to, where the scheme asks for that
    """

    scheme: Scheme
    scale: Tensor
    zero: Tensor
    double: DoubleScales | None = None

    def codes(self, weights: Tensor, group: int | slice = slice(None)) -> Tensor:
        """The nearest codes, float32: of ``weights`` ``[N, G, group]``, or ``[N]`` all in the one ``group``."""
        scale, zero = self._beside(weights, group)
        if self.scheme.format != "int":
            return nearest(weights / scale, self.scheme.format).to(torch.float32)
        return codes_of(weights, scale, zero, self.scheme.bits)

    def values(self, codes: Tensor, group: int | slice = slice(None)) -> Tensor:
        """What ``codes`` stand for; shapes as in `codes`."""
        scale, zero = self._beside(codes, group)
        if self.scheme.format != "int":
            return table(self.scheme.format).to(codes.device)[codes.long()] * scale
        return (codes - zero) * scale

    def nearest(self, weights: Tensor) -> Tensor:
        """The values nearest to ``weights`` ``[N, G, group]``."""
        return self.values(self.codes(weights))

    def weight(self, codes: Tensor, *, order: Tensor | None = None, pre_scale: Tensor | None = None) -> QuantWeight:
        """The `QuantWeight` of ``codes`` ``[N, K]``."""
        codes, scheme = codes.to(torch.uint8), self.scheme
        if scheme.format == "int":
            return as_weight(codes, self.scale, self.zero, scheme, double=self.double, order=order, pre_scale=pre_scale)
        return QuantWeight(
            codes=codes,
            scales=self.scale,
            group=scheme.groups_of(codes.shape[1])[0],
            bits=FORMATS[scheme.format].bits,
            format=scheme.format,
            double=self.double,
            order=order,
            pre_scale=pre_scale,
        )

    def doubled(self) -> Levels:
        """With the scales rounded, where the scheme asks for that; ``scale`` must be of the whole weight."""
        if self.scheme.double is None:
            return self
        double = double_quantized(self.scale, self.scheme.double)
        return dataclasses.replace(self, scale=double.values(), double=double)

    def _beside(self, like: Tensor, group: int | slice) -> tuple[Tensor, Tensor]:
        scale, zero = self.scale[:, group], self.zero[:, group]
        return (scale.unsqueeze(-1), zero.unsqueeze(-1)) if like.ndim > scale.ndim else (scale, zero)


def levels_of(groups: Tensor, scheme: Scheme, *, keep: Tensor | float = 1.0) -> Levels:
    """The levels that reach over all of ``groups`` ``[N, G, group]``, or over the part ``keep`` of their range.

    Args:
        groups: a short last one filled with zeros
        scheme: with ``mse``, the best of many ranges is searched for, and ``keep`` is not looked at
        keep: at most 1; a number, or one for each group, ``[N, G, 1]``
    """
    if scheme.format != "int":
        scale = scale_for(groups.abs().amax(-1, keepdim=True) * keep, scheme.format)
        return Levels(scheme, scale.squeeze(-1), torch.zeros_like(scale).squeeze(-1))
    if scheme.mse:
        scale, zero = searched_grid(groups, scheme)
    else:
        low = groups.amin(-1, keepdim=True).clamp(max=0) * keep
        high = groups.amax(-1, keepdim=True).clamp(min=0) * keep
        scale, zero = grid_between(low, high, scheme)
    return Levels(scheme, scale.squeeze(-1), zero.squeeze(-1))
