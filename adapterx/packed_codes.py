"""Codes of fewer than eight bits as they are packed into bytes, low bits first (ONNX INT4, MatMulNBits)."""

from __future__ import annotations

import numpy as np

from adapterx.adapter import Array


def unpacked(packed: Array, bits: int, *, signed: bool, length: int) -> Array:
    """Codes of the last axis, one a byte.

    Args:
        packed: uint8 ``[..., bytes]``
        bits: 2, 4 or 8
        signed: codes are two's complement
        length: codes in the last axis; what the last byte holds beyond them is dropped

    Returns:
        int8 or uint8 ``[..., length]``

    Example:
        >>> unpacked(np.array([0xF1], np.uint8), 4, signed=True, length=2)
        array([ 1, -1], dtype=int8)
    """
    raw = packed.view(np.uint8)
    fields = [(raw >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)] if bits < 8 else [raw]
    codes = np.stack(fields, axis=-1).reshape(*raw.shape[:-1], -1)[..., :length]
    if not signed:
        return codes
    # Shifted to the top of the byte and back, the sign fills the bits above.
    return np.asarray((codes << (8 - bits)).view(np.int8) >> (8 - bits))


def repacked(codes: Array, packed: Array, bits: int) -> Array:
    """``codes`` in the bytes of ``packed``; bits of ``packed`` beyond the last code stay as they are.

    Args:
        codes: int8 or uint8 ``[..., length]``
        packed: uint8 ``[..., bytes]`` with room for them
        bits: 2, 4 or 8

    Returns:
        In the shape and dtype of ``packed``.
    """
    whole = unpacked(packed, bits, signed=False, length=packed.shape[-1] * 8 // bits).copy()
    whole[..., : codes.shape[-1]] = codes.view(np.uint8) & ((1 << bits) - 1)
    fields = whole.reshape(*packed.shape, 8 // bits)
    result = fields[..., 0].copy()
    for position in range(1, 8 // bits):
        result |= fields[..., position] << (bits * position)
    return result.view(packed.dtype)
