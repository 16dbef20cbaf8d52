"""Lowered products: the ONNX operators that multiply floats ``[..., K]`` by a quantized weight, without loss.

Each maker gives a `Product`: the constants that go into the file, and the operators over them. ONNX Runtime's
``MatMulNBits`` knows 2, 4 and 8 bits and blocks of powers of two from 16 to 256; all other widths and groups are
written in the next of these, with scales and zero points repeated, which changes no value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch.nn.functional import pad

from adapterx.errors import OptionError
from adapterx.quant.codebook import table
from adapterx.quant.packing import pack
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor
Tensors = Mapping[str, Tensor]
Format = Literal["matmulnbits", "qdq"]

_SMALLEST_BLOCK, _LARGEST_BLOCK = 16, 256
# Codes of a quantizer's own kernels: MatMulBnb4's quant_type.
_BNB4 = {"fp4": 0, "nf4": 1}
_FLOAT8 = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
}
# Marks nodes over constants that have to stay nodes: folded, the file would hold floats.
KEPT = "ai.adapterx.kept"


@dataclasses.dataclass(frozen=True, slots=True)
class Lowering:
    """How weights are written.

    Args:
        format: "matmulnbits" (ONNX Runtime's operator) or "qdq" (DequantizeLinear and MatMul, standard operators, which
            ONNX Runtime makes the other of)
        exact: products in float32: those of ``MatMulNBits`` are then what torch computes, to rounding
        accuracy_level: of ``MatMulNBits``; 4 rounds inputs to int8 by block, three times faster. 0 is float32

    Raises:
        OptionError: a format or level that does not exist
    """

    format: Format = "matmulnbits"
    exact: bool = False
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.format not in ("matmulnbits", "qdq"):
            raise OptionError(f'format={self.format!r} does not exist; choose "matmulnbits" or "qdq"')
        if self.accuracy_level not in range(5):
            raise OptionError(f"accuracy_level={self.accuracy_level!r} does not exist; ONNX Runtime has 0 to 4")
        if self.format == "qdq" and self.accuracy_level != 4:
            raise OptionError(
                "accuracy_level is MatMulNBits's; of format='qdq' the session decides, with its option "
                "session.qdq_matmulnbits_accuracy_level. exact=True writes what no session rounds"
            )

    @property
    def level(self) -> int:
        """The accuracy level that is written."""
        return 0 if self.exact else self.accuracy_level


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Product:
    """``x`` ``[..., K]`` times a weight.

    Args:
        became: the operators in words, for the table of an export
        tensors: constants, by the names that they have beneath the layer's
        apply: float32 ``x`` and the constants -> ``[..., N]``
        narrow: of a constant of bytes, the bits that ONNX holds each in
        rounds: rounds ``x`` by plain operators, which nothing but a name tells from those of the model
    """

    became: str
    tensors: Tensors
    apply: Callable[[Tensor, Tensors], Tensor]
    narrow: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rounds: bool = False


def width_of(bits: int) -> int:
    """The next width that ``MatMulNBits`` has a kernel for."""
    return next(width for width in (2, 4, 8) if bits <= width)


def block_of(quantized: QuantWeight) -> int | None:
    """The largest block, a power of two from 16 to 256, that never spans two groups; None where there is none."""
    inputs, group = quantized.shape[1], quantized.group
    if group < inputs:
        block = math.gcd(group, _LARGEST_BLOCK)
        return block if block >= _SMALLEST_BLOCK else None
    # One group to a row: any block will do, and the last may reach beyond the row.
    block = math.gcd(inputs, _LARGEST_BLOCK)
    return block if block >= 2 * _SMALLEST_BLOCK else min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, _power_above(inputs)))


def weight_product(quantized: QuantWeight, lowering: Lowering) -> Product:
    """The product with the weight alone: neither ``pre_scale`` nor ``order`` nor a rounded input is in it."""
    if not quantized.is_affine:
        return _table_product(quantized, lowering)
    if quantized.zeros is not None and quantized.zeros.is_floating_point():
        return _float_zeros(quantized, lowering)
    if lowering.format == "qdq" or block_of(quantized) is None:
        return _dequantized(quantized, lowering)
    return _nbits(quantized, lowering.level)


def repeated(grid: Tensor, group: int, block: int, inputs: int) -> Tensor:
    """Of ``[N, G]``, a value a group, ``[N, ceil(inputs / block)]``, a value a block."""
    starts = torch.arange(0, inputs, block, device=grid.device)
    return grid[:, torch.clamp(starts // group, max=grid.shape[1] - 1)].contiguous()


def _nbits(quantized: QuantWeight, accuracy_level: int) -> Product:
    rows, inputs = quantized.shape
    block = block_of(quantized)
    assert block is not None, "the caller has asked"
    width = width_of(quantized.bits)
    blocks = -(-inputs // block)
    codes = pad(quantized.codes, (0, blocks * block - inputs))
    tensors = {
        "qweight": pack(codes, width).reshape(rows, blocks, block * width // 8),
        "scales": repeated(quantized.scales, quantized.group, block, inputs),
    }
    zeros = _whole_zeros(quantized)
    if zeros is not None:
        tensors["qzeros"] = pack(repeated(zeros, quantized.group, block, inputs), width)
    attributes = {"K": inputs, "N": rows, "bits": width, "block_size": block, "accuracy_level": accuracy_level}

    def apply(x: Tensor, held: Tensors) -> Tensor:
        operands = [x, held["qweight"], held["scales"], held.get("qzeros")]
        return _symbolic("com.microsoft::MatMulNBits", operands, attributes, shape=(*x.shape[:-1], rows), version=1)

    return Product(f"MatMulNBits, {width} bits, block {block}", tensors, apply)


def _whole_zeros(quantized: QuantWeight) -> Tensor | None:
    """Zero points, bytes; None where the middle of the codes is that of the container, too."""
    if quantized.zeros is not None:
        return quantized.zeros
    if quantized.bits == width_of(quantized.bits):
        return None
    return torch.full_like(quantized.scales, 2 ** (quantized.bits - 1), dtype=torch.uint8)


def _dequantized(quantized: QuantWeight, lowering: Lowering) -> Product:
    """``DequantizeLinear`` along axis 0 of ``[K, N]``, which ONNX Runtime makes MatMulNBits of where the block allows,

    with inputs rounded to int8. Behind a Transpose it leaves it as it is, and unpacks the weight at every call.
    """
    zeros = quantized.zeros
    if zeros is None:
        zeros = torch.full_like(quantized.scales, 2 ** (quantized.bits - 1), dtype=torch.uint8)
    narrow = {} if quantized.bits > 4 else {"qweight": 4, "qzeros": 4}
    made = _blocked(quantized, quantized.codes, zeros, kind=f"{4 if narrow else 8} bits", turned=lowering.exact)
    return dataclasses.replace(made, narrow=narrow)


def _blocked(
    quantized: QuantWeight, codes: Tensor, zeros: Tensor | None, *, kind: str, turned: bool = False
) -> Product:
    """``DequantizeLinear`` of ``[K, N]``; ``turned``: of ``[N, K]``."""
    inputs = quantized.shape[1]
    block = block_of(quantized) or quantized.group
    per_channel = quantized.scales.shape[1] == 1 and zeros is None
    # Blocks have to divide what they divide up; zeros are put behind the inputs, too.
    padding = 0 if per_channel else -inputs % block
    laid = (lambda matrix: matrix.contiguous()) if turned else _turned
    tensors = {"qweight": laid(pad(codes.view(torch.uint8), (0, padding))).view(codes.dtype)}
    for name, grid in (("scales", quantized.scales), ("qzeros", zeros)):
        if grid is not None:
            tensors[name] = (
                grid[:, 0].contiguous() if per_channel else laid(repeated(grid, quantized.group, block, inputs))
            )
    attributes = {"axis": 1 - turned} if per_channel else {"axis": int(turned), "block_size": block}

    def apply(x: Tensor, held: Tensors) -> Tensor:
        operands = [held["qweight"], held["scales"], held.get("qzeros")]
        shape = held["qweight"].shape
        weight = _symbolic("DequantizeLinear", operands, attributes, shape=tuple(shape), version=21)
        return torch.matmul(pad(x, (0, padding)) if padding else x, weight.T if turned else weight)

    return Product(f"DequantizeLinear, {kind}, {'a column' if per_channel else f'block {block}'}", tensors, apply)


def _float_zeros(quantized: QuantWeight, lowering: Lowering) -> Product:
    """Zero points with fractions: whole ones, and the rest as a product of rank ``G`` with the sums of the groups.

    ``(c - z) s = (c - w) s + (w - z) s``, and the last is the same for all inputs of a group. ONNX Runtime has float
    zero points itself, for 2 and 4 bits only, and 80 times slower.
    """
    zeros, group = quantized.zeros, quantized.group
    assert zeros is not None, "the caller has looked"
    whole = zeros.round().clamp(0, 2**quantized.bits - 1)
    inner = weight_product(dataclasses.replace(quantized, zeros=whole.to(torch.uint8)), lowering)
    groups, padding = zeros.shape[1], -quantized.shape[1] % group
    rest = _turned((whole - zeros) * quantized.scales)

    def apply(x: Tensor, held: Tensors) -> Tensor:
        sums = pad(x, (0, padding)) if padding else x
        sums = sums.reshape(*sums.shape[:-1], groups, group).sum(-1)
        return inner.apply(x, held) + torch.matmul(sums, held["zero_rest"])

    return Product(
        f"{inner.became} + zeros of rank {groups}", {**inner.tensors, "zero_rest": rest}, apply, inner.narrow
    )


def _table_product(quantized: QuantWeight, lowering: Lowering) -> Product:
    values = table(quantized.format) if quantized.codebook is None else quantized.codebook.cpu()
    if quantized.format in _BNB4 and block_of(quantized) is not None and lowering.format == "matmulnbits":
        return _bnb4(quantized)
    if (whole := _as_integers(quantized, values)) is not None:
        return weight_product(whole, lowering)
    for name, dtype in _FLOAT8.items():
        if (codes := _as_float8(quantized, values, name)) is not None:
            return _blocked(quantized, codes.view(dtype), None, kind=name)
    return _looked_up(quantized, values)


def _bnb4(quantized: QuantWeight) -> Product:
    """``MatMulBnb4``: codes of the flattened weight, the high half of a byte first."""
    rows, inputs = quantized.shape
    block = block_of(quantized)
    assert block is not None, "the caller has asked"
    padding = -inputs % block
    flat = pad(quantized.codes, (0, padding)).flatten()
    scales = repeated(quantized.scales, quantized.group, block, inputs)
    tensors = {"qweight": (flat[0::2] << 4) | flat[1::2], "scales": scales.flatten()}
    attributes = {"K": inputs + padding, "N": rows, "block_size": block, "quant_type": _BNB4[quantized.format]}

    def apply(x: Tensor, held: Tensors) -> Tensor:
        x = pad(x, (0, padding)) if padding else x
        operands: list[Tensor | None] = [x, held["qweight"], held["scales"]]
        return _symbolic("com.microsoft::MatMulBnb4", operands, attributes, shape=(*x.shape[:-1], rows), version=1)

    return Product(f"MatMulBnb4 {quantized.format}, block {block}", tensors, apply)


def _as_integers(quantized: QuantWeight, values: Tensor) -> QuantWeight | None:
    """The same weight with 8-bit codes, where the table's values are whole numbers of a power of two.

    E2M1, say, is 0, 1, 2, 3, 4, 6, 8, 12 halves; scales are divided by a power of two, which is exact.
    """
    finite = values[torch.isfinite(values)]
    for power in range(8):
        whole = finite * 2.0**power
        if bool((whole == whole.round()).all()) and -128 <= float(whole.min()) <= float(whole.max()) <= 127:
            codes = (torch.nan_to_num(values) * 2.0**power + 128).to(torch.uint8)
            return dataclasses.replace(
                quantized,
                codes=codes.to(quantized.codes.device)[quantized.codes.long()],
                scales=quantized.scales * 2.0**-power,
                bits=8,
                format="int",
                codebook=None,
                double=None,
            )
    return None


def _as_float8(quantized: QuantWeight, values: Tensor, name: str) -> Tensor | None:
    """The codes in float8 ``name``, where that has every value of the table."""
    if quantized.format == name:
        return quantized.codes
    eights = values.to(_FLOAT8[name])
    finite = torch.isfinite(values)
    if not torch.equal(eights.to(torch.float32)[finite], values[finite]):
        return None
    return eights.view(torch.uint8).to(quantized.codes.device)[quantized.codes.long()]


def _looked_up(quantized: QuantWeight, values: Tensor) -> Product:
    """Any other table: looked up once, when the session is opened."""
    rows, inputs = quantized.shape
    group, groups = quantized.group, quantized.scales.shape[1]
    codes = pad(quantized.codes, (0, groups * group - inputs)).reshape(rows, groups, group)
    tensors = {"qweight": codes, "scales": quantized.scales.unsqueeze(-1), "codebook": torch.nan_to_num(values)}
    narrow = {} if quantized.bits > 4 else {"qweight": 4}

    def apply(x: Tensor, held: Tensors) -> Tensor:
        shape = (rows, groups, group)
        kept = {KEPT: "weight"}
        codes = torch.onnx.ops.symbolic(
            "Cast", [held["qweight"]], {"to": 6}, dtype=torch.int32, shape=shape, version=21, metadata_props=kept
        )
        found = torch.onnx.ops.symbolic(
            "Gather", [held["codebook"], codes], {}, dtype=torch.float32, shape=shape, version=13, metadata_props=kept
        )
        weight = (found * held["scales"]).flatten(1)[:, :inputs]
        return torch.matmul(x, weight.T)

    return Product(f"Gather, {quantized.bits} bits, group {group}", tensors, apply, narrow)


def _symbolic(
    operator: str, operands: list[Tensor | None], attributes: Mapping[str, int], *, shape: tuple[int, ...], version: int
) -> Tensor:
    while operands[-1] is None:
        operands.pop()
    made: Tensor = torch.onnx.ops.symbolic(
        operator, operands, dict(attributes), dtype=torch.float32, shape=shape, version=version
    )
    return made


def _turned(matrix: Tensor) -> Tensor:
    return matrix.T.contiguous()


def _power_above(number: int) -> int:
    return 1 << (number - 1).bit_length()
