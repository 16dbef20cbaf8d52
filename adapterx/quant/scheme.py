"""Scheme: how the weights of one layer are written down."""

from __future__ import annotations

import dataclasses

from adapterx.errors import OptionError, nearest
from adapterx.quant.codebook import FORMATS


@dataclasses.dataclass(frozen=True, slots=True)
class DoubleScheme:
    """How the scales themselves are quantized (Dettmers et al., QLoRA, arXiv 2305.14314, section 3).

    Args:
        bits: 2 to 8
        group_size: scales that share a scale of their own, along the whole of ``[N, G]`` row by row
        symmetric: whether zero is in the middle; else the scales' mean is taken off first
    """

    bits: int = 8
    group_size: int = 256
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise OptionError(f"double_quant_bits={self.bits!r} is not supported; scales take 2 to 8 bits")
        if self.group_size < 1:
            raise OptionError(f"double_quant_group_size={self.group_size!r} is not a number of scales; for example 256")


@dataclasses.dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights ``[N, K]`` of one layer are written: their codes, and which of them share a scale.

    Args:
        bits: of a code, 1 to 8; decided by ``format`` where that is not "int"
        group_size: elements of a row that share a scale; -1 is the whole row, and the last group of a row may be
            shorter
        symmetric: the middle code is zero; else each group has a zero point
        format: "int", or a name of `codebook.FORMATS`: "nf4", "fp4", "float8_e4m3fn", "mxfp4", ...
        full_range: symmetric only: the scale is ``absmax / 2**(bits - 1)``, with the sign that lets the largest value
            be a code
        mse: search the scale, by group, that leaves the least squared error
        double: quantize the scales, too

    Raises:
        OptionError: a width, group size or format that does not exist

    Example:
        >>> Scheme(bits=4, group_size=-1).groups_of(100)
        (100, 1)
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    format: str = "int"
    full_range: bool = False
    mse: bool = False
    double: DoubleScheme | None = None

    def __post_init__(self) -> None:
        if self.format != "int":
            if self.format not in FORMATS:
                raise OptionError(f"no weight format {self.format!r}{nearest(self.format, ['int', *FORMATS])}")
            object.__setattr__(self, "bits", FORMATS[self.format].bits)
        if not 1 <= self.bits <= 8:
            raise OptionError(f"bits={self.bits!r} is not supported; weights take 1 to 8 bits")
        if self.group_size != -1 and self.group_size < 1:
            raise OptionError(f"group_size={self.group_size!r} is not a number of weights; -1 is a whole row")

    def groups_of(self, inputs: int, *, name: str = "a layer") -> tuple[int, int]:
        """``(group, groups)`` for rows of ``inputs`` weights.

        Raises:
            OptionError: a group larger than a row; ``name`` says of which layer
        """
        if self.group_size > inputs:
            raise OptionError(
                f"group_size={self.group_size} does not fit {name}, which has {inputs} inputs; give it a smaller "
                f"group_size, or -1 for its whole row, with set_local"
            )
        group = inputs if self.group_size == -1 else self.group_size
        return group, -(-inputs // group)
