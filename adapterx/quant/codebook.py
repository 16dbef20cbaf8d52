"""The formats whose codes stand for values of a table: NF4, FP4, float8 and the elements of MX."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import MappingProxyType
from typing import Literal

import torch

Rounding = Literal["even", "nearest", "floor", "dither"]


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Args:
        bits: of a code
        table: values of the codes 0, 1, ...; NaN where a code stands for none
        power_of_two: the scale of a block is a power of two (OCP Microscaling Formats 1.0), else any float32
    """

    bits: int
    table: tuple[float, ...]
    power_of_two: bool = False

    @property
    def largest(self) -> float:
        """The largest finite value of the table."""
        return max(value for value in self.table if math.isfinite(value))


def _minifloat(exponent: int, mantissa: int, *, finite: str = "all") -> tuple[float, ...]:
    """Values of a float of ``1 + exponent + mantissa`` bits; ``finite`` says which codes at the top are none.

    "all": every code is a number (OCP MX elements); "fn": only the last mantissa at the top exponent is NaN (E4M3FN);
    "ieee": the top exponent is infinity and NaN (E5M2); "fnuz": no negative zero, whose code is NaN, and a bias that is
    one more.
    """
    bias = 2 ** (exponent - 1) - 1 + (finite == "fnuz")
    values: list[float] = []
    for code in range(2 ** (exponent + mantissa)):
        high, low = code >> mantissa, code & (2**mantissa - 1)
        value = (low / 2**mantissa) * 2.0 ** (1 - bias) if high == 0 else (1 + low / 2**mantissa) * 2.0 ** (high - bias)
        top = high == 2**exponent - 1
        if (finite == "fn" and top and low == 2**mantissa - 1) or (finite == "ieee" and top):
            value = float("inf") if finite == "ieee" and low == 0 else float("nan")
        values.append(value)
    negative = [-value for value in values]
    if finite == "fnuz":
        negative[0] = float("nan")
    return (*values, *negative)


def _fixed(bits: int) -> tuple[float, ...]:
    """Two's complement with ``bits - 2`` bits behind the point."""
    half = 2 ** (bits - 1)
    return tuple(((code + half) % (2 * half) - half) / 2 ** (bits - 2) for code in range(2 * half))


# Quantiles of a normal distribution with an exact zero (Dettmers et al., arXiv 2305.14314, appendix E).
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# The order of bitsandbytes' codes, which is ONNX Runtime's (MatMulBnb4): sign in the top bit.
_FP4_HALF = (0.0, 5.208333333e-03, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
_FP4 = (*_FP4_HALF, *(-value for value in _FP4_HALF))

FORMATS = MappingProxyType(
    {
        "nf4": Format(4, _NF4),
        "fp4": Format(4, _FP4),
        "fp4_e2m1": Format(4, _minifloat(2, 1)),
        "float8_e4m3fn": Format(8, _minifloat(4, 3, finite="fn")),
        "float8_e5m2": Format(8, _minifloat(5, 2, finite="ieee")),
        "float8_e4m3fnuz": Format(8, _minifloat(4, 3, finite="fnuz")),
        "float8_e5m2fnuz": Format(8, _minifloat(5, 2, finite="fnuz")),
        "mxfp8_e4m3": Format(8, _minifloat(4, 3, finite="fn"), power_of_two=True),
        "mxfp8_e5m2": Format(8, _minifloat(5, 2, finite="ieee"), power_of_two=True),
        "mxfp6_e3m2": Format(6, _minifloat(3, 2), power_of_two=True),
        "mxfp6_e2m3": Format(6, _minifloat(2, 3), power_of_two=True),
        "mxfp4": Format(4, _minifloat(2, 1), power_of_two=True),
        "mxint8": Format(8, _fixed(8), power_of_two=True),
        # Not OCP's, but of the same kind, as Neural Compressor and microxcaling have them.
        "mxint4": Format(4, _fixed(4), power_of_two=True),
        "mxint2": Format(2, _fixed(2), power_of_two=True),
    }
)


@functools.cache
def _sorted_table(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(values in order, their codes, whether a tie below goes up)`` without what is not finite."""
    table = torch.tensor(FORMATS[name].table, dtype=torch.float64)
    codes = torch.nonzero(torch.isfinite(table)).flatten()
    # Of +0 and -0 only the first: a stable sort leaves its code in front.
    values, order = torch.sort(table[codes], stable=True)
    codes = codes[order]
    kept = torch.cat([torch.ones(1, dtype=torch.bool), values[1:] != values[:-1]])
    values, codes = values[kept], codes[kept]
    return values, codes.to(torch.uint8), (codes & 1) == 0


def table(name: str) -> torch.Tensor:
    """float32 ``[2**bits]``: the values of the codes of format ``name``."""
    return torch.tensor(FORMATS[name].table, dtype=torch.float32)


def nearest(values: torch.Tensor, name: str) -> torch.Tensor:
    """Codes, uint8, of the table's values nearest to ``values``; a tie goes to the even code (IEEE 754), too large a
    value to the largest, with its sign: the one more that integers have below zero is left unused, as in microxcaling.

    Example:
        >>> nearest(torch.tensor([0.0, 2.6, -99.0]), "mxfp4").tolist()
        [0, 5, 15]
    """
    numbers, codes, even = (part.to(values.device) for part in _sorted_table(name))
    middles = (numbers[1:] + numbers[:-1]) / 2
    largest = FORMATS[name].largest
    wide = values.to(torch.float64).clamp(-largest, largest)
    index = torch.bucketize(wide, middles)
    # bucketize puts a tie below; where the code below is odd and the one above even, it belongs above.
    above = torch.clamp(index + 1, max=len(numbers) - 1)
    tie = (index < len(middles)) & (wide == middles[torch.clamp(index, max=len(middles) - 1)])
    index = torch.where(tie & ~even[index] & even[above], above, index)
    return codes[index]


def codes_of(values: torch.Tensor, name: str, rounding: Rounding = "even") -> torch.Tensor:
    """Codes, uint8, of ``values`` in the table, which are cut off at its largest.

    Args:
        values: already divided by their scales
        name: of the format
        rounding: "even" is `nearest`; "nearest" takes ties away from zero; "floor" is towards zero; "dither" goes up
            or down by chance, in proportion, with a seed of its own: the same values give the same codes
    """
    if rounding == "even":
        return nearest(values, name)
    steps = table(name).to(values.device)
    steps = torch.unique(steps[torch.isfinite(steps) & (steps >= 0)])
    size = values.abs().clamp(max=float(steps[-1]))
    below = torch.bucketize(size, steps, right=True) - 1
    above = (below + 1).clamp(max=len(steps) - 1)
    part = (size - steps[below]) / (steps[above] - steps[below]).clamp(min=1e-30)
    if rounding == "floor":
        up = torch.zeros_like(part, dtype=torch.bool)
    elif rounding == "nearest":
        up = part >= 0.5
    else:
        chance = torch.Generator(device=values.device).manual_seed(0)
        up = torch.rand(part.shape, generator=chance, device=values.device) < part
    return nearest(torch.where(up, steps[above], steps[below]) * values.sign(), name)


def scale_for(absmax: torch.Tensor, name: str) -> torch.Tensor:
    """The scale of groups whose largest magnitude is ``absmax``; 1 where that is 0.

    Powers of two follow OCP Microscaling Formats 1.0, 6.3: the exponent of the largest element, less that of the
    largest value of the format; the others put the largest element on the largest value.
    """
    form = FORMATS[name]
    if form.power_of_two:
        top = math.floor(math.log2(form.largest))
        scale = torch.exp2((torch.floor(torch.log2(absmax)) - top).clamp(-127, 127))
    else:
        scale = absmax / form.largest
    return torch.where(absmax == 0, torch.ones_like(scale), scale)
