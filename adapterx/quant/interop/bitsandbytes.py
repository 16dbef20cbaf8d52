"""bitsandbytes checkpoints: NF4 and FP4 (Dettmers et al., arXiv 2305.14314) and LLM.int8 (arXiv 2208.07339)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from adapterx.errors import FormatError, UnsupportedQuantization
from adapterx.json_text import json_object
from adapterx.quant.codebook import table
from adapterx.quant.interop.source import Layer, Source, Tensors, finite, names_with, source_of, stored
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor
_STATE = ".weight.quant_state.bitsandbytes__"
_FORMATS = ("nf4", "fp4")
_PARTS = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    *(f"weight.quant_state.bitsandbytes__{form}" for form in _FORMATS),
    "SCB",
    "weight_format",
)
# bitsandbytes' own constant for 1 / 127.
_INT8_STEP = 7.874015718698502e-3


def read_bitsandbytes(files: Tensors, config: Mapping[str, Any]) -> Source:
    """The layers of a bitsandbytes checkpoint.

    4 bits: ``weight`` holds two codes a byte, the first in the high half, row after row; ``absmax`` a scale for each
    ``blocksize`` of them, which may run over the end of a row, and then groups here are smaller. Nested scales are a
    table's values times scales plus an offset, which no grid is: they are multiplied out, exactly. 8 bits: ``SCB``
    holds each row's largest magnitude. That LLM.int8 also rounds its inputs, all but outliers, is its kernel's doing
    and not in the checkpoint; here inputs stay as they are.

    Raises:
        FormatError: tensors that do not belong together
        UnsupportedQuantization: another data type, or int8 rows in the order of a kernel
    """
    layers: dict[str, Layer] = {}
    for form in _FORMATS:
        for name in names_with(files, _STATE + form):
            layers[name] = _four_bits(files, name, form)
    for name in names_with(files, ".SCB"):
        layers[name] = _eight_bits(files, name)
    return source_of(files, layers, _PARTS)


def _eight_bits(files: Tensors, name: str) -> Layer:
    outputs, inputs = stored(files, f"{name}.weight", torch.int8, shape=(None, None))
    stored(files, f"{name}.SCB", torch.float32, shape=(outputs,))
    form = files.read(f"{name}.weight_format") if f"{name}.weight_format" in files.tensors else torch.zeros(())
    if form.numel() != 1 or float(form) != 0:
        raise UnsupportedQuantization(
            f"{files.folder}: {name}.weight_format: rows in the order of a kernel, not row by row"
        )

    def read() -> QuantWeight:
        codes = (files.read(f"{name}.weight").to(torch.int16) + 128).to(torch.uint8)
        scales = finite(files, f"{name}.SCB", files.read(f"{name}.SCB")) * _INT8_STEP
        return QuantWeight(codes=codes, scales=scales.unsqueeze(1), group=inputs, bits=8)

    return Layer((outputs, inputs), read)


def _four_bits(files: Tensors, name: str, form: str) -> Layer:
    state = _state(files, name, form)
    (outputs, inputs), block = state["shape"], state["blocksize"]
    blocks = -(-outputs * inputs // block)
    packed = files.tensors.get(f"{name}.weight")
    if packed is None or packed.size != -(-outputs * inputs // 2):
        raise FormatError(f"{files.folder}: {name}.weight does not hold {outputs * inputs} codes of 4 bits")
    nested = f"{name}.weight.nested_absmax" in files.tensors
    stored(files, f"{name}.weight.absmax", torch.uint8 if nested else torch.float32, shape=(blocks,))
    stored(files, f"{name}.weight.quant_map", torch.float32, shape=(16,))
    if nested:
        stored(files, f"{name}.weight.nested_quant_map", torch.float32, shape=(256,))
        stored(files, f"{name}.weight.nested_absmax", torch.float32, shape=(-(-blocks // state["nested_blocksize"]),))

    def read() -> QuantWeight:
        data = files.read(f"{name}.weight").contiguous().view(torch.uint8).flatten()
        codes = torch.stack([data >> 4, data & 15], dim=-1).flatten()[: outputs * inputs].reshape(outputs, inputs)
        group = math.gcd(block, inputs)
        first = torch.arange(outputs * inputs // group) * group
        scales = _absmax(files, name, state)[first // block].reshape(outputs, inputs // group)
        values = finite(files, f"{name}.weight.quant_map", files.read(f"{name}.weight.quant_map"))
        own = not torch.equal(values, table(form))
        return QuantWeight(
            codes=codes,
            scales=scales,
            group=group,
            bits=4,
            format="codebook" if own else form,
            codebook=values if own else None,
        )

    return Layer((outputs, inputs), read)


def _absmax(files: Tensors, name: str, state: Mapping[str, Any]) -> Tensor:
    """float32, one a block."""
    absmax = files.read(f"{name}.weight.absmax")
    if absmax.dtype == torch.float32:
        return finite(files, f"{name}.weight.absmax", absmax)
    values = files.read(f"{name}.weight.nested_quant_map")[absmax.long()]
    scales = files.read(f"{name}.weight.nested_absmax")[torch.arange(len(values)) // state["nested_blocksize"]]
    return finite(files, f"{name}.weight.nested_absmax", values * scales + state["nested_offset"])


def _state(files: Tensors, name: str, form: str) -> dict[str, Any]:
    key = name + _STATE + form
    stored(files, key, torch.uint8, shape=(None,))
    told = json_object(bytes(files.read(key).tolist()), where=f"{files.folder}: {key}", depth=4)
    shape = told.get("shape")
    sizes = [told.get("blocksize"), told.get("nested_blocksize", 256), *(shape if isinstance(shape, list) else [0])]
    if len(sizes) != 4 or not all(type(size) is int and 0 < size < 1 << 31 for size in sizes):
        raise FormatError(f"{files.folder}: {key}: expected blocksize and a shape of two, got {told!r:.120}")
    if not isinstance(told.get("nested_offset", 0.0), float | int):
        raise FormatError(f"{files.folder}: {key}: nested_offset is {told['nested_offset']!r:.40}, expected a number")
    return {"nested_blocksize": 256, "nested_offset": 0.0, **told}
