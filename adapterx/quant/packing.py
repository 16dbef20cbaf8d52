"""Codes of fewer than eight bits in bytes, low bits first along the last axis: the bytes of MatMulNBits."""

from __future__ import annotations

import torch


def container(bits: int) -> int:
    """Bits that a code takes in a byte: 1, 2, 4 or 8. ONNX Runtime knows no width between."""
    return next(width for width in (1, 2, 4, 8) if bits <= width)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[..., bytes]`` from codes ``[..., length]``, each in `container(bits)` bits.

    Example:
        >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
        [33, 3]
    """
    width = container(bits)
    per_byte = 8 // width
    padding = -codes.shape[-1] % per_byte
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, padding))
    codes = codes.reshape(*codes.shape[:-1], -1, per_byte)
    packed = torch.zeros(codes.shape[:-1], dtype=torch.uint8, device=codes.device)
    for place in range(per_byte):
        packed |= codes[..., place] << (width * place)
    return packed


def unpack(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The codes, uint8 ``[..., length]``, that `pack` put into ``packed``."""
    width = container(bits)
    if width == 8:
        return packed[..., :length]
    # ONNX has no operators on bytes for what torch's exporter makes of this.
    wide = packed.to(torch.int32) if torch.compiler.is_exporting() else packed
    fields = [((wide >> (width * place)) & (2**width - 1)).to(torch.uint8) for place in range(8 // width)]
    return torch.stack(fields, dim=-1).flatten(-2)[..., :length]
