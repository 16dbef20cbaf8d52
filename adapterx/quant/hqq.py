"""HQQ: half-quadratic quantization (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models",
Mobius Labs 2023). No data is looked at.

The zero points, which may have fractions, are fitted so that the error ``|W - Q(W)|**p`` with ``p < 1``, which a few
outliers hardly move, becomes small: alternately the errors are shrunk (a generalized soft threshold), and the zero
points take the mean of what is left. The scales stay those of the range.
"""

from __future__ import annotations

import dataclasses

import torch

from adapterx.errors import OptionError
from adapterx.quant.affine import codes_of, grouped
from adapterx.quant.rtn import finite, on_grid
from adapterx.quant.scheme import DoubleScheme, Scheme
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class HQQ:
    """Half-quadratic quantization, in ``scheme``; the defaults are those of the authors' package.

    Args:
        scheme: integers and not symmetric, since a zero point is what is fitted
        quant_zero: the zero points are rounded to 8 bits, over the whole layer
        quant_scale: the scales are rounded to 8 bits, by ``scale_group``
        scale_group: scales that share a scale
        lp_norm: ``p``
        beta: of the first shrinking; larger shrinks less
        kappa: by how much ``beta`` grows at each step
        iters: steps at most; it stops when the mean error no longer falls
        round_zero: begin with whole zero points; None is the package's rule, at 4 bits only

    Raises:
        OptionError: a scheme without zero points
    """

    scheme: Scheme = dataclasses.field(default_factory=lambda: Scheme(bits=4, group_size=64, symmetric=False))
    quant_zero: bool = False
    quant_scale: bool = False
    scale_group: int = 128
    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iters: int = 20
    round_zero: bool | None = None

    def __post_init__(self) -> None:
        scheme = self.scheme
        wrong = [
            f"{name}={value!r}"
            for name, value, good in (
                ("symmetric", scheme.symmetric, not scheme.symmetric),
                ("format", scheme.format, scheme.format == "int"),
                ("mse", scheme.mse, not scheme.mse),
            )
            if not good
        ]
        if wrong:
            raise OptionError(
                f"HQQ fits zero points, which {', '.join(wrong)} leaves no room for; take "
                f"Scheme(bits={scheme.bits}, group_size={scheme.group_size}, symmetric=False), or RTN or GPTQ"
            )


def hqq(weight: Tensor, method: HQQ, *, name: str = "a layer") -> QuantWeight:
    """``weight`` ``[N, K]`` in codes with fitted zero points, float32 ``[N, G]``.

    Raises:
        ModelError: NaN or infinity among the weights
        OptionError: a group that does not fit; both name ``name``

    Example:
        >>> weight = torch.tensor([[0.1, 0.2, 0.9, 0.25]])
        >>> hqq(weight, HQQ(Scheme(bits=2, group_size=-1, symmetric=False))).codes.tolist()
        [[0, 0, 3, 1]]
    """
    weight = finite(weight, name)
    scheme = method.scheme
    inputs = weight.shape[1]
    group, _ = scheme.groups_of(inputs, name=name)
    groups, there = grouped(weight, group), grouped(torch.ones_like(weight[:1]), group)
    low = torch.where(there > 0, groups, torch.inf).amin(-1, keepdim=True)
    high = torch.where(there > 0, groups, -torch.inf).amax(-1, keepdim=True)
    scale = (high - low) / (2**scheme.bits - 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = -low / scale
    if scheme.bits == 4 if method.round_zero is None else method.round_zero:
        zero = torch.round(zero)
    zero = _fitted(groups, there, scale, zero, method)
    if method.quant_zero:
        zero = _rounded(zero)
    if method.quant_scale:
        scheme = dataclasses.replace(scheme, double=DoubleScheme(8, method.scale_group, symmetric=False))
    return on_grid(weight, scale.squeeze(-1), zero.squeeze(-1), scheme)


def _fitted(groups: Tensor, there: Tensor, scale: Tensor, zero: Tensor, method: HQQ) -> Tensor:
    """The zero points ``[N, G, 1]`` after the alternation; ``there`` is 0 where a short last group was filled."""
    count, beta, best = there.sum(-1, keepdim=True), method.beta, float("inf")
    elements = float(count.sum()) * len(groups)
    for _ in range(method.iters):
        codes = codes_of(groups, scale, zero, method.scheme.bits)
        error = (groups - (codes - zero) * scale) * there
        size = error.abs()
        # Zero to a negative power is infinite, and the threshold then keeps the zero, as it should.
        kept = torch.sign(error) * torch.relu(size - size.pow(method.lp_norm - 1) / beta)
        zero = ((codes - (groups - kept) / scale) * there).sum(-1, keepdim=True) / count
        beta *= method.kappa
        mean = float(size.sum()) / elements
        if mean >= best:
            break
        best = mean
    return zero


def _rounded(zero: Tensor) -> Tensor:
    """``zero`` on a grid of 256 values from its smallest to its largest."""
    low, high = zero.amin(), zero.amax()
    step = (high - low) / 255
    return zero if step == 0 else torch.round((zero - low) / step) * step + low
