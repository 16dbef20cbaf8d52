"""Codes in 32-bit words, as GPTQ's and AWQ's kernels read them."""

from __future__ import annotations

import torch

from adapterx.quant.packing import unpack

Tensor = torch.Tensor

# AutoAWQ puts column 8i + _AWQ[j] of a row into the j-th nibble of word i.
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def streamed(words: Tensor, bits: int) -> Tensor:
    """Codes, uint8 ``[rows, 32 * n // bits]``, of int32 ``[rows, n]``: one stream of bits along a row, low bits first.

    Codes of 3, 5, 6 and 7 bits lie across the borders of words.

    Example:
        >>> streamed(torch.tensor([[0b1_010_001, 0, 0]], dtype=torch.int32), 3)[0, :3].tolist()
        [1, 2, 1]
    """
    data = words.contiguous().view(torch.uint8)
    if bits in (1, 2, 4, 8):
        return unpack(data, bits, data.shape[1] * 8 // bits)
    # Eight codes are `bits` whole bytes.
    data = data[:, : data.shape[1] // bits * bits].reshape(len(data), -1, bits).to(torch.int64)
    value = sum(data[..., place] << (8 * place) for place in range(bits))
    assert isinstance(value, Tensor), "bits is not 0"
    codes = torch.stack([(value >> (bits * place)) & (2**bits - 1) for place in range(8)], dim=-1)
    return codes.flatten(1).to(torch.uint8)


def fields(words: Tensor, bits: int) -> Tensor:
    """Codes, uint8 ``[rows, n * (32 // bits)]``, of int32 ``[rows, n]``: as many whole codes as a word takes, low bits
    first, and the rest of its bits unused (Neural Compressor's 3 bits are ten codes a word).
    """
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes: Tensor = ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(1)


def interleaved(words: Tensor) -> Tensor:
    """4-bit codes, uint8 ``[rows, 8 * n]``, of AWQ's int32 ``[rows, n]``.

    Example:
        >>> interleaved(torch.tensor([[0x75316420]], dtype=torch.int32)).tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    nibbles = streamed(words, 4).reshape(len(words), -1, 8)
    found = torch.empty_like(nibbles)
    found[..., list(_AWQ)] = nibbles
    return found.flatten(1)
