"""QuantWeight: a frozen quantized weight, from which every method's result, every reader and every export goes."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from adapterx.errors import MismatchError
from adapterx.quant.codebook import Rounding, table

Tensor = torch.Tensor
Per = Literal["tensor", "token", "static", "block"]
Output = Literal["bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Activation:
    """How a layer rounds its inputs before it multiplies them.

    Args:
        format: "int8" (symmetric), "uint8" (zero point), or a name of `codebook.FORMATS` ("float8_e4m3fn", ...)
        per: "tensor" and "token" find the scale at each call; "static" has it from calibration; "block" is MX's block
            of ``group`` inputs
        scale: float32 scalar, static only
        zero: integer scalar in the range of ``format``, static only; None is 0
        group: inputs of a block
        rounding: to codes of a table; "dither" has no ONNX form
    """

    format: str = "int8"
    per: Per = "token"
    scale: Tensor | None = None
    zero: Tensor | None = None
    group: int = 32
    rounding: Rounding = "even"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DoubleScales:
    """Scales ``[N, G]`` that are quantized themselves: ``value = (codes - zero) * scale + offset``, by group of the
    flattened scales.

    Args:
        codes: uint8 ``[N, G]``
        scale: float32 ``[groups]``
        offset: float32 ``[groups]``, what was taken off first
        zero: the code of zero
        bits: of a code
        group: scales that share a scale
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    zero: int
    bits: int
    group: int

    def values(self) -> Tensor:
        """float32 ``[N, G]``."""
        flat = self.codes.flatten().to(torch.float32) - self.zero
        index = torch.arange(len(flat), device=flat.device) // self.group
        return (flat * self.scale[index] + self.offset[index]).reshape(self.codes.shape)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class QuantWeight:
    """The weight ``[N, K]`` of a linear layer as codes: ``(code - zero) * scale``, or ``table[code] * scale``.

    The layer that it stands for is ``y = act(x * pre_scale)[..., order] @ values.T``. Nothing else is needed to compute
    it, so this is what is saved, exported, and trained upon.

    Args:
        codes: uint8 ``[N, K]``, one a byte
        scales: float32 ``[N, G]``, ``G = ceil(K / group)``; may be negative; those of ``double``, where that is given
        group: codes of a row that share a scale
        bits: of a code
        zeros: uint8 or float32 ``[N, G]``; None is the middle code, ``2**(bits - 1)``. Affine only
        format: "int" (affine), a name of `codebook.FORMATS`, or "codebook" with a table of one's own
        codebook: float32 ``[2**bits]``, only with format "codebook"
        pre_scale: float32 ``[K]``, what the inputs are multiplied by first (AWQ, SmoothQuant); None is 1
        order: int64 ``[K]``: the input behind each column of codes (GPTQ's act_order); None is 0, 1, ...
        activation: how the inputs are rounded; None leaves them
        output: "bfloat16" or "float16": what the layer's results are rounded to, in their own dtype; None leaves them
        double: the scales' own codes

    Raises:
        MismatchError: shapes that do not belong together
    """

    codes: Tensor
    scales: Tensor
    group: int
    bits: int
    zeros: Tensor | None = None
    format: str = "int"
    codebook: Tensor | None = None
    pre_scale: Tensor | None = None
    order: Tensor | None = None
    activation: Activation | None = None
    double: DoubleScales | None = None
    output: Output | None = None

    def __post_init__(self) -> None:
        rows, inputs = self.codes.shape
        grid = (rows, -(-inputs // self.group))
        faults = [
            f"{name} is {tuple(tensor.shape)}, expected {shape}"
            for name, tensor, shape in (
                ("scales", self.scales, grid),
                ("zeros", self.zeros, grid),
                ("pre_scale", self.pre_scale, (inputs,)),
                ("order", self.order, (inputs,)),
                ("codebook", self.codebook, (2**self.bits,)),
            )
            if tensor is not None and tuple(tensor.shape) != shape
        ]
        if faults:
            raise MismatchError(f"codes are ({rows}, {inputs}) in groups of {self.group}: " + "; ".join(faults))
        if (self.format == "codebook") != (self.codebook is not None):
            raise MismatchError(
                f"format {self.format!r}, codebook {'given' if self.codebook is not None else 'missing'}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        rows, inputs = self.codes.shape
        return rows, inputs

    @property
    def is_affine(self) -> bool:
        """Whether a code is a number on an even grid, not an index into a table."""
        return self.format == "int"

    def values(self) -> Tensor:
        """float32 ``[N, K]``, columns in the order of the codes;

        Not what the layer multiplies by where ``pre_scale`` or ``order`` is given.
        """
        if self.is_affine:
            levels = self.codes.to(torch.float32)
            levels = levels - (
                2.0 ** (self.bits - 1) if self.zeros is None else self._by_column(self.zeros.to(torch.float32))
            )
        else:
            codebook = table(self.format) if self.codebook is None else self.codebook
            levels = codebook.to(self.codes.device)[self.codes.long()]
        return levels * self._by_column(self.scales)

    def dequantized(self) -> Tensor:
        """float32 ``[N, K]``:

        The weight that acts on the layer's own inputs, with ``order`` undone and ``pre_scale`` multiplied in.
        """
        values = self.values()
        if self.order is not None:
            values = torch.empty_like(values).index_copy_(1, self.order, values)
        return values if self.pre_scale is None else values * self.pre_scale

    def _by_column(self, grid: Tensor) -> Tensor:
        return grid.repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]
