"""MX: small floats or integers in blocks that share a power of two (OCP Microscaling Formats 1.0; Rouhani et al.,
arXiv 2310.10537).
"""

from __future__ import annotations

import dataclasses

import torch

from adapterx.errors import OptionError
from adapterx.quant.affine import grouped, ungrouped
from adapterx.quant.codebook import FORMATS, Rounding, codes_of, scale_for
from adapterx.quant.rtn import finite
from adapterx.quant.weight import Activation, Output, QuantWeight

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class MX:
    """Weights, and inputs where ``activation`` is given, in blocks that share a power of two.

    Args:
        format: of the weights: "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", ...
        activation: of the inputs; None leaves them
        block: elements along the inputs that share a power of two
        rounding: "even" and "nearest" differ in ties, which "nearest" takes away from zero; "floor" is towards zero;
            "dither" is up or down by chance, with a seed of its own
        output: what results are rounded to; None leaves them

    Raises:
        OptionError: not an MX format
    """

    format: str = "mxfp8_e4m3"
    activation: str | None = "mxfp8_e4m3"
    block: int = 32
    rounding: Rounding = "even"
    output: Output | None = None

    def __post_init__(self) -> None:
        known = [name for name, form in FORMATS.items() if form.power_of_two]
        for name in (self.format, self.activation):
            if name is not None and name not in known:
                raise OptionError(f"{name!r} is no MX format; known are {', '.join(known)}")


def mx(weight: Tensor, method: MX, *, name: str = "a layer") -> QuantWeight:
    """``weight`` ``[N, K]`` in MX blocks along ``K``; the last block of a row may be shorter.

    Raises:
        ModelError: NaN or infinity among the weights

    Example:
        >>> mx(torch.tensor([[8.0, 5.0, 0.6, -9.0]]), MX("mxfp4", None)).dequantized().tolist()
        [[8.0, 4.0, 1.0, -8.0]]
    """
    weight = finite(weight, name)
    groups = grouped(weight, method.block)
    scale = scale_for(groups.abs().amax(-1, keepdim=True), method.format)
    codes = codes_of(groups / scale, method.format, method.rounding)
    activation = None
    if method.activation is not None:
        activation = Activation(format=method.activation, per="block", group=method.block, rounding=method.rounding)
    return QuantWeight(
        codes=ungrouped(codes, weight.shape[1]),
        scales=scale.squeeze(-1),
        group=method.block,
        bits=FORMATS[method.format].bits,
        format=method.format,
        activation=activation,
        output=method.output,
    )
