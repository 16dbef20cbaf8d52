"""torchao checkpoints in safetensors: each weight is several tensors, and JSON that says of which kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapterx.errors import FormatError, UnsupportedQuantization
from adapterx.json_text import json_object
from adapterx.quant.interop.source import FLOATS, Layer, Source, Tensors, finite, stored
from adapterx.quant.weight import Activation, Per, QuantWeight

Tensor = torch.Tensor
_KINDS = ("IntxUnpackedToInt8Tensor", "Int8Tensor", "Float8Tensor")
_FLOAT8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}


def read_torchao(files: Tensors, config: Mapping[str, Any]) -> Source:
    """The layers of a torchao checkpoint: ``IntxUnpackedToInt8Tensor``, ``Int8Tensor`` and ``Float8Tensor``.

    ``<module>._weight_qdata`` ``[N, K]``, ``_weight_scale`` and ``_weight_zero_point`` ``[N, G]``; codes are signed
    there, and counted from the lowest here. Inputs that torchao rounds when the layer runs are rounded here, too, by
    token or whole: its symmetric int8 grid has steps of ``absmax / 127.5``, ours of ``absmax / 127``.

    Raises:
        FormatError: tensors that do not belong together, or metadata that is no JSON
        UnsupportedQuantization: another kind of tensor, or another rounding of the inputs
    """
    layers: dict[str, Layer] = {}
    taken: set[str] = set()
    for name, text in files.metadata.items():
        if not text.startswith("{") or not name.endswith(".weight"):
            continue
        told = json_object(text.encode(), where=f"{files.folder}: {name} (metadata)", depth=12)
        if told.get("_type") in ("Tensor", None):
            continue
        parts = {part: _part(files, name, part) for part in _parts(files, name, told)}
        layers[name.removesuffix(".weight")] = _layer(files, name, told, parts)
        taken |= set(parts.values())
    if not layers:
        raise FormatError(
            f"{files.folder}: its config says torchao, and the metadata of its files name no quantized weight"
        )
    return Source(layers, {name: name for name in files.tensors if name not in taken})


def _layer(files: Tensors, name: str, told: Mapping[str, Any], parts: Mapping[str, str]) -> Layer:
    kind, data = told["_type"], told.get("_data")
    if kind not in _KINDS:
        raise UnsupportedQuantization(
            f"{files.folder}: {name} is torchao's {kind!r:.60}; {', '.join(_KINDS)} can be held"
        )
    if not isinstance(data, dict) or not {"qdata", "scale"} <= parts.keys():
        raise FormatError(f"{files.folder}: {name}: expected _data, qdata and scale in its metadata")
    integers = () if kind == "Float8Tensor" else (torch.int8,)
    outputs, inputs = stored(files, parts["qdata"], *(integers or _FLOAT8), shape=(None, None))
    scales, group = _scales(files, name, data, parts, (outputs, inputs))
    activation = _activation(files, name, data, parts)

    def read() -> QuantWeight:
        wide = _wide(files, parts["scale"], scales)
        if kind == "Float8Tensor":
            raw = files.read(parts["qdata"])
            finite(files, parts["qdata"], raw)
            codes, form = raw.view(torch.uint8), _FLOAT8[raw.dtype]
            return QuantWeight(codes=codes, scales=wide, group=group, bits=8, format=form, activation=activation)
        bits = _bits(files, name, data) if kind == "IntxUnpackedToInt8Tensor" else 8
        middle = 2 ** (bits - 1)
        signed = files.read(parts["qdata"]).to(torch.int16) + middle
        if int(signed.min()) < 0 or int(signed.max()) >= 2**bits:
            raise FormatError(f"{files.folder}: {parts['qdata']}: codes beyond {bits} bits")
        return QuantWeight(
            codes=signed.to(torch.uint8),
            scales=wide,
            group=group,
            bits=bits,
            zeros=_zeros(files, parts.get("zero_point"), scales, middle),
            activation=activation,
        )

    return Layer((outputs, inputs), read)


def _wide(files: Tensors, name: str, grid: tuple[int, int]) -> Tensor:
    scales = finite(files, name, files.read(name))
    return scales.reshape(-1, 1).expand(grid).contiguous() if scales.numel() == 1 else scales.reshape(grid).contiguous()


def _zeros(files: Tensors, name: str | None, grid: tuple[int, int], middle: int) -> Tensor | None:
    if name is None:
        return None
    zeros = files.read(name)
    wide = finite(files, name, zeros) + middle
    wide = wide.reshape(-1, 1).expand(grid) if wide.numel() == 1 else wide.reshape(grid)
    if bool((wide == middle).all()):
        return None
    is_code = not zeros.is_floating_point() and float(wide.min()) >= 0 and float(wide.max()) < 2 * middle
    return wide.to(torch.uint8).contiguous() if is_code else wide.contiguous()


def _scales(
    files: Tensors, name: str, data: Mapping[str, Any], parts: Mapping[str, str], shape: tuple[int, int]
) -> tuple[tuple[int, int], int]:
    """The grid ``(N, G)`` and the group, after checking that blocks lie within rows."""
    block = data.get("block_size")
    rows, inputs = shape
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise FormatError(f"{files.folder}: {name}: block_size is {block!r:.40}, expected two numbers")
    whole = block == [rows, inputs]
    if (block[0] != 1 and not whole) or inputs % block[1]:
        raise UnsupportedQuantization(
            f"{files.folder}: {name}: blocks of {block} in {list(shape)}; parts of rows can be held"
        )
    grid = (rows, inputs // block[1])
    for part in ("scale", "zero_point"):
        if part in parts:
            met = files.tensors[parts[part]]
            count = met.size // met.dtype.itemsize
            kinds = FLOATS if part == "scale" else (torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS)
            if met.dtype not in kinds or count != (1 if whole else grid[0] * grid[1]):
                raise FormatError(
                    f"{files.folder}: {parts[part]}: {met.dtype} {list(met.shape)} for groups {list(grid)}"
                )
    return grid, block[1]


def _bits(files: Tensors, name: str, data: Mapping[str, Any]) -> int:
    target = data.get("target_dtype")
    told = str(target.get("_data") if isinstance(target, dict) else target).removeprefix("torch.")
    if told not in {f"int{bits}" for bits in range(1, 9)}:
        raise UnsupportedQuantization(f"{files.folder}: {name}: target_dtype {told[:40]!r}; int1 to int8 can be held")
    return int(told.removeprefix("int"))


def _activation(files: Tensors, name: str, data: Mapping[str, Any], parts: Mapping[str, str]) -> Activation | None:
    token = data.get("activation_quantization")
    if token is not None:
        told = token.get("_data") if isinstance(token, dict) else token
        if str(told).lower() != "int8_asym_per_token":
            raise UnsupportedQuantization(f"{files.folder}: {name}: activation_quantization={told!r:.60}")
        return Activation(format="uint8", per="token")
    kwargs = data.get("act_quant_kwargs")
    if kwargs is None:
        return None
    inner = kwargs.get("_data") if isinstance(kwargs, dict) else None
    if not isinstance(inner, dict) or inner.get("reduce_range") or "act_quant_scale" in parts:
        raise UnsupportedQuantization(f"{files.folder}: {name}: act_quant_kwargs={kwargs!r:.200}")
    granularity, mapping = (_named(inner.get(key)) for key in ("granularity", "mapping_type"))
    per: Per | None = {"PerRow": "token", "PerToken": "token", "PerTensor": "tensor"}.get(granularity)  # type: ignore[assignment]
    if per is None:
        raise UnsupportedQuantization(f"{files.folder}: {name}: inputs are rounded by {granularity!r:.40}")
    if "float8_dtype" in inner:
        form = _named(inner["float8_dtype"]).removeprefix("torch.")
        if form not in _FLOAT8.values() or inner.get("hp_value_lb") or inner.get("hp_value_ub"):
            raise UnsupportedQuantization(f"{files.folder}: {name}: act_quant_kwargs={kwargs!r:.200}")
        return Activation(format=form, per=per)
    return Activation(format="uint8" if mapping == "ASYMMETRIC" else "int8", per=per)


def _named(value: object) -> str:
    """The name in ``{"_type": "PerRow", "_data": {...}}`` or ``{"_type": ..., "_data": "SYMMETRIC"}``."""
    if isinstance(value, dict):
        inner = value.get("_data")
        return inner if isinstance(inner, str) else str(value.get("_type"))
    return str(value)


def _parts(files: Tensors, name: str, told: Mapping[str, Any]) -> list[str]:
    parts = told.get("_tensor_data_names", ["qdata", "scale"])
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise FormatError(f"{files.folder}: {name}: _tensor_data_names is {parts!r:.60}, expected names")
    return parts


def _part(files: Tensors, name: str, part: str) -> str:
    """``m._weight_qdata``, which before torchao 0.15 was ``m.weight:qdata``."""
    module = name.removesuffix(".weight")
    for known in (f"{module}._weight_{part}", f"{name}:{part}"):
        if known in files.tensors:
            return known
    raise FormatError(f"{files.folder}: {module}._weight_{part} is missing")
