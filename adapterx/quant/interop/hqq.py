"""hqq checkpoints (Badri and Shaji, Half-Quadratic Quantization, 2023), as its library and transformers write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from adapterx.errors import FormatError, UnsupportedQuantization
from adapterx.quant.interop.source import FLOATS, Layer, Source, Tensors, finite, names_with, source_of, stored
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor
_PARTS = (
    *("W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float"),
    *("quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    *("channel_wise", "optimize", "round_zero"),
)
# Codes in one element of W_q, whose part of the rows is the further down the lower its bits.
_PER_ELEMENT = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def read_hqq(files: Tensors, config: Mapping[str, Any]) -> Source:
    """The layers of an hqq checkpoint.

    ``W_q`` are rows of one group each, of which the first half lies in the high bits, the second in the low (4 bits; 2
    bits: quarters; 3 bits: tenths, in int32); ``scale`` and ``zero`` ``[groups, 1]`` are floats, and so are the zero
    points here. A group that runs over the end of a weight's row becomes smaller ones.

    Raises:
        FormatError: tensors that do not belong together
        UnsupportedQuantization: ``axis=0``, whose groups run across rows, or scales that are quantized
    """
    layers = {name: _layer(files, name) for name in names_with(files, ".W_q")}
    return source_of(files, layers, _PARTS)


def _layer(files: Tensors, name: str) -> Layer:
    if _number(files, f"{name}.axis") != 1:
        raise UnsupportedQuantization(
            f"{files.folder}: {name}: groups along axis=0 cannot be held; quantize with axis=1"
        )
    for flag in ("quant_scale", "quant_zero", "view_as_float"):
        if f"{name}.{flag}" in files.tensors and _number(files, f"{name}.{flag}"):
            raise UnsupportedQuantization(f"{files.folder}: {name}: {flag} cannot be held; quantize without it")
    bits = _number(files, f"{name}.nbits")
    if bits not in _PER_ELEMENT:
        raise UnsupportedQuantization(
            f"{files.folder}: {name}: {bits} bits; {', '.join(map(str, _PER_ELEMENT))} can be held"
        )
    stored(files, f"{name}.shape", torch.int64, torch.int32, shape=(2,))
    outputs, inputs = (int(size) for size in files.read(f"{name}.shape"))
    rows, group = _grid(files, name, outputs * inputs)
    part = -(-rows // _PER_ELEMENT[bits])
    stored(files, f"{name}.W_q", torch.int32 if bits == 3 else torch.uint8, shape=(part, group))
    for each in ("scale", "zero"):
        stored(files, f"{name}.{each}", *FLOATS, shape=(rows, 1))

    def read() -> QuantWeight:
        codes = _unpacked(files.read(f"{name}.W_q"), bits)[:rows].reshape(outputs, inputs)
        own = math.gcd(group, inputs)
        first = torch.arange(outputs * inputs // own) * own // group
        scales, zeros = (
            finite(files, f"{name}.{each}", files.read(f"{name}.{each}"))[first, 0].reshape(outputs, inputs // own)
            for each in ("scale", "zero")
        )
        return QuantWeight(codes=codes, scales=scales, group=own, bits=bits, zeros=zeros)

    return Layer((outputs, inputs), read)


def _grid(files: Tensors, name: str, weights: int) -> tuple[int, int]:
    """Groups, and weights in each."""
    group = _number(files, f"{name}.group_size") if f"{name}.group_size" in files.tensors else 0
    rows, _ = stored(files, f"{name}.scale", *FLOATS, shape=(None, 1))
    # group_size is not stored where a group is a whole row.
    group = group or weights // rows
    if weights < 1 or group < 1 or group * rows != weights:
        raise FormatError(f"{files.folder}: {name}.scale: {rows} groups of {group} do not make {weights} weights")
    return rows, group


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    count = _PER_ELEMENT[bits]
    return torch.cat([(packed >> (bits * place)) & (2**bits - 1) for place in reversed(range(count))]).to(torch.uint8)


def _number(files: Tensors, name: str) -> int:
    met = files.tensors.get(name)
    if met is None or met.shape not in ((), (1,)):
        raise FormatError(f"{files.folder}: {name}: expected one number, got {'none' if met is None else met.shape}")
    return int(files.read(name))
