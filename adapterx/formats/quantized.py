"""Adapter weights in int8 or int4, as our safetensors files hold them: whole numbers and a scale for each row or group.

    value = code * scale        codes are symmetric: -127 ... 127 or -7 ... 7, scales fp32

``int8``: ``<name>`` int8 in the tensor's own shape, ``<name>.scale`` ``[r]``, one scale a rank: both matrices lie with
the rank first, so a rank of ``a`` and one of ``b`` each have the range that they need.

``int4``: ``<name>`` uint8 ``[r, ceil(n / 2)]``, two codes a byte, the low nibble first, in two's complement;
``<name>.scale`` ``[r, ceil(n / 32)]``, one scale for 32 numbers of a rank. ``n`` counts the numbers of a rank, a
convolution's kernel included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from adapterx.adapter import LORA_A, LORA_B, PARTS, Adapter, Array, tensor_name
from adapterx.errors import FormatError, OptionError, nearest
from adapterx.faults import Faults
from adapterx.json_text import json_object
from adapterx.site import LORA_SCALE

Quantization = Literal["int8", "int4"]

# Keys of a file's metadata: which of the two, and as JSON the shapes that codes in bytes do not tell.
KEY, SHAPES = "quantized", "quantized_shapes"
SCALE = ".scale"
GROUP = 32
_GREATEST = {"int8": 127, "int4": 7}
# The two values of each byte.
_PAIRS = np.stack([((np.arange(256) >> shift & 0xF ^ 8) - 8).astype(np.float32) for shift in (0, 4)], axis=-1)
_ADVICE = "Nothing was loaded. Convert the adapter again."


def check(quantize: str | None, kind: str) -> None:
    """Refuse what cannot be written.

    Args:
        quantize: ``None`` is fine
        kind: the format of the file

    Raises:
        OptionError: no such quantization, or another format than ours.
    """
    if quantize is not None and quantize not in _GREATEST:
        known = get_args(Quantization)
        hint = nearest(str(quantize), known)
        raise OptionError(f"quantize={quantize!r} is no option; expected {' or '.join(map(repr, known))}{hint}")
    if quantize is not None and kind != "safetensors":
        raise OptionError(f"quantize={quantize!r} is stored in .safetensors files of adapterx only, not in {kind}")


def stored(adapter: Adapter, quantization: Quantization) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors of a file, by name, and its metadata. Parts other than the two matrices stay as they are.

    Args:
        adapter: of finite values
        quantization: of both matrices of every site
    """
    tensors: dict[str, Array] = {}
    shapes: dict[str, list[int]] = {}
    for name, array in adapter.tensors():
        if not name.endswith((f".{LORA_A}.weight", f".{LORA_B}.weight")):
            tensors[name] = array
            continue
        codes, scale = _codes(array, quantization)
        tensors[name], tensors[name + SCALE] = codes, scale
        if quantization == "int4" and array.shape != (len(codes), 2 * codes.shape[1]):
            shapes[name] = list(array.shape)
    metadata = {KEY: quantization} | ({SHAPES: json.dumps(shapes)} if shapes else {})
    return tensors, metadata


def int8_codes(array: Array) -> tuple[Array, Array]:
    """Codes in the array's shape, and the scale of each of its rows.

    What the codes of a file stand for gives the same codes again.

    Example:
        >>> codes, scale = int8_codes(np.array([[1.0, -2.0], [0.0, 0.0]]))
        >>> codes.tolist(), scale.tolist()
        ([[64, -127], [0, 0]], [0.015748031437397003, 0.0])
    """
    codes, scale = _rounded(array.reshape(len(array), math.prod(array.shape[1:])).astype(np.float32), _GREATEST["int8"])
    return codes.reshape(array.shape), scale


def dequantized(arrays: Mapping[str, Array], metadata: Mapping[str, str], *, where: str) -> dict[str, Array]:
    """The tensors of a quantized file as float32.

    Args:
        arrays: as the file holds them
        metadata: what it says of itself, with :data:`KEY`
        where: its name for messages

    Raises:
        FormatError: another quantization, a scale that is missing or misshapen, or is no fp32: all at once.
    """
    quantization = metadata[KEY]
    if quantization not in _GREATEST:
        raise FormatError(f"{where}: its weights are {quantization[:20]!r}; {' and '.join(_GREATEST)} are read")
    shapes = json_object(metadata.get(SHAPES, "{}").encode(), where=f"{where} ({SHAPES})", depth=3)
    faults = Faults(where)
    found: dict[str, Array] = {}
    for name, array in arrays.items():
        scale = arrays.get(name + SCALE)
        if scale is None:
            if not (name.endswith(SCALE) and name.removesuffix(SCALE) in arrays):
                found[name] = array.astype(np.float32)
            if array.dtype.kind in "iu":
                faults.add(name, f"it is {array.dtype}, and its {name}{SCALE} is missing")
            continue
        try:
            found[name] = _values(array, scale, quantization, shapes.get(name))
        except ValueError as cause:
            faults.add(name, str(cause))
    faults.refuse("not a sound quantized adapter", advice=_ADVICE)
    return found


def decoded(arrays: Mapping[str, Array], *, where: str) -> dict[str, Array]:
    """The tensors of a file that holds the inputs of a model, whose int8 codes become float32.

    Args:
        arrays: as the file holds them; codes have ``<site>.lora_scale.weight`` ``[r, 2]`` beside them
        where: the file's name for messages

    Raises:
        FormatError: scales that do not fit, or that are not beside two matrices of codes: all at once.
    """
    found, faults = dict(arrays), Faults(where)
    ending = tensor_name("", LORA_SCALE)
    for name in (name for name in arrays if name.endswith(ending)):
        scale, site = found.pop(name), name.removesuffix(ending)
        names = [tensor_name(site, side) for side in (LORA_A, LORA_B)]
        codes = [arrays[side] for side in names if side in arrays]
        sound = len(codes) == len(names) and all(one.dtype == np.int8 and one.ndim > 1 for one in codes)
        if not sound or scale.dtype != np.float32 or any(scale.shape != (len(one), len(names)) for one in codes):
            met = f"{scale.dtype} {list(scale.shape)}"
            faults.add(name, f"expected float32 [r, 2] beside two matrices of int8 codes [r, ...]; it is {met}")
            continue
        for column, (side, matrix) in enumerate(zip(names, codes, strict=True)):
            found[side] = np.asarray(matrix * scale[:, column].reshape(-1, *[1] * (matrix.ndim - 1)))
        parts = {tensor_name(site, part) for part in PARTS} & found.keys()
        found |= {part: found[part].astype(np.float32) for part in parts}
    faults.refuse("not a sound quantized adapter", advice=_ADVICE)
    return found


def _codes(array: Array, quantization: str) -> tuple[Array, Array]:
    rank, greatest = len(array), _GREATEST[quantization]
    if quantization == "int8":
        return int8_codes(array)
    rows = array.reshape(rank, -1).astype(np.float32)
    codes, scale = _rounded(_grouped(rows), greatest)
    nibbles = codes.reshape(rank, -1)[:, : rows.shape[1] + rows.shape[1] % 2].view(np.uint8) & 0xF
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scale


def _grouped(rows: Array) -> Array:
    """``[r, groups, 32]``, filled up with zeros where the last group is shorter."""
    rank, width = rows.shape
    if width % GROUP:
        filled = np.zeros((rank, width + -width % GROUP), rows.dtype)
        filled[:, :width] = rows
        rows = filled
    return rows.reshape(rank, -1, GROUP)


def _rounded(values: Array, greatest: int) -> tuple[Array, Array]:
    """Codes and scales of vectors along the last axis; takes ``values`` for its own use."""
    scale = np.maximum(values.max(axis=-1, initial=0), -values.min(axis=-1, initial=0)) / np.float32(greatest)
    # A vector of zeros has the scale 0, and codes of 0; so has one whose scale would be too small to be exact.
    scale[scale < np.finfo(np.float32).tiny] = 0
    values[scale == 0] = 0
    values /= np.where(scale == 0, np.float32(1), scale)[..., None]
    return np.rint(values, out=values).astype(np.int8), scale


def _values(codes: Array, scale: Array, quantization: str, shape: Any) -> Array:
    """Raises ValueError with the cause."""
    expected = np.dtype(np.int8 if quantization == "int8" else np.uint8)
    if codes.dtype != expected or scale.dtype != np.float32 or codes.ndim < 2:
        raise ValueError(f"expected codes of {expected} and scales of float32; got {codes.dtype} and {scale.dtype}")
    if quantization == "int8":
        if scale.shape != (len(codes),):
            raise ValueError(f"expected one scale for each of {len(codes)} ranks; they are {scale.shape}")
        return np.asarray(codes * scale.reshape(-1, *[1] * (codes.ndim - 1)))
    shape = _shape(shape, codes)
    width = math.prod(shape[1:])
    if scale.shape != (len(codes), -(-width // GROUP)):
        raise ValueError(f"expected scales {(len(codes), -(-width // GROUP))} for {shape}; they are {scale.shape}")
    groups = _grouped(_PAIRS[codes].reshape(len(codes), -1)[:, :width])
    return (groups * scale[:, :, None]).reshape(len(codes), -1)[:, :width].reshape(shape)


def _shape(told: Any, codes: Array) -> tuple[int, ...]:
    """The shape of a tensor from that of its bytes, or as the metadata tell it."""
    if told is None:
        return len(codes), 2 * codes.shape[1]
    sizes = told if isinstance(told, list) else []
    whole = len(sizes) > 1 and all(type(size) is int and size > 0 for size in sizes) and sizes[0] == len(codes)
    if not whole or -(-math.prod(sizes[1:]) // 2) != codes.shape[1]:
        raise ValueError(f"its shape {told!r:.60} does not fit {codes.shape} bytes")
    return tuple(sizes)
