"""A QuantLinear as JSON and tensors, and back: every number of a stranger's file is checked before it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch

from adapterx.faults import Faults
from adapterx.quant.codebook import FORMATS, Rounding, table
from adapterx.quant.linear import QuantLinear
from adapterx.quant.packing import container, unpack
from adapterx.quant.tensor_files import StoredTensor, TensorFiles
from adapterx.quant.weight import Activation, DoubleScales, Output, Per, QuantWeight

Tensor = torch.Tensor
_FLOATS = {str(kind).removeprefix("torch."): kind for kind in (torch.float32, torch.float16, torch.bfloat16)}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Of one row of one layer: nothing that exists comes near.
_MOST = 1 << 31
_ZEROS = {"middle": None, "codes": torch.uint8, "float": torch.float32}


def record_of(layer: QuantLinear) -> dict[str, Any]:
    """What JSON says of ``layer``; its tensors are those of its ``state_dict``."""
    zeros = layer.qzeros
    activation = None
    if layer.activation_format is not None:
        activation = {
            "format": layer.activation_format,
            "per": layer.activation_per,
            "group": layer.activation_group,
            "rounding": layer.activation_rounding,
        }
    return {
        "shape": [layer.out_features, layer.in_features],
        "bits": layer.bits,
        "group": layer.group,
        "format": layer.format,
        "zeros": "middle" if zeros is None else "float" if zeros.is_floating_point() else "codes",
        "parts": sorted(name for name, tensor in layer.state_dict().items() if tensor is not None),
        "compute_dtype": str(layer.compute_dtype).removeprefix("torch."),
        "activation": activation,
        "double": {"bits": layer.double_bits, "group": layer.double_group} if layer.double_bits else None,
        "output": layer.output,
    }


def check_record(record: object) -> dict[str, Any]:
    """``record`` where it is one.

    Raises:
        ValueError: a field that is missing, of another type, or out of range; says which
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {record!r:.40}")
    known = {"shape", "bits", "group", "format", "zeros", "parts", "compute_dtype", "activation", "double", "output"}
    if strange := sorted(record.keys() ^ known):
        raise ValueError(f"expected the fields {', '.join(sorted(known))}; {strange[0]!r:.40} differs")
    shape, parts = record["shape"], record["parts"]
    if not isinstance(shape, list) or len(shape) != 2 or not all(_is_whole(size, 1, _MOST) for size in shape):
        raise ValueError(f"shape is {shape!r:.60}, expected [outputs, inputs]")
    _whole(record, "bits", 1, 8)
    _whole(record, "group", 1, _MOST)
    _one_of(record, "format", ["int", "codebook", *FORMATS])
    _one_of(record, "zeros", list(_ZEROS))
    _one_of(record, "compute_dtype", list(_FLOATS))
    _one_of(record, "output", [None, *get_args(Output)])
    if record["format"] in FORMATS and record["bits"] != FORMATS[record["format"]].bits:
        raise ValueError(f"{record['format']} has {FORMATS[record['format']].bits} bits, not {record['bits']}")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"parts is {parts!r:.60}, expected a list of names")
    _check_nested(record)
    return record


def stored_layer(files: TensorFiles, name: str, record: Mapping[str, Any]) -> QuantLinear:
    """The layer ``name``, of which ``record`` (checked) tells; nothing larger than its tensors is allocated.

    Raises:
        FormatError: tensors that are missing, of another shape or type, or whose numbers cannot be; all of them
    """
    faults = Faults(str(files.folder))
    expected = _expected(record)
    for part, (dtypes, shape) in expected.items():
        _check_header(faults, f"{name}.{part}", files.tensors.get(f"{name}.{part}"), dtypes, shape)
    _refuse(faults)
    tensors = {part: files.read(f"{name}.{part}") for part in expected}
    for part, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
            faults.add(f"{name}.{part}", "not all of it is finite")
    quantized = _weight(faults, name, record, tensors)
    _refuse(faults)
    assert quantized is not None, "a fault was told otherwise"
    layer = QuantLinear(quantized, tensors.get("bias"), compute_dtype=_FLOATS[record["compute_dtype"]])
    return layer.eval()


def _refuse(faults: Faults) -> None:
    faults.refuse("not a sound quantized model", advice="Nothing was changed. Save or download the model again.")


def _weight(faults: Faults, name: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantWeight | None:
    bits, inputs, group = record["bits"], record["shape"][1], record["group"]
    codes = _codes(faults, f"{name}.qweight", tensors["qweight"], bits, inputs)
    zeros = tensors.get("qzeros")
    if zeros is not None and not zeros.is_floating_point():
        zeros = _codes(faults, f"{name}.qzeros", zeros, bits, -(-inputs // group))
    order = tensors.get("order")
    if order is not None and not torch.equal(order.sort().values, torch.arange(inputs)):
        faults.add(f"{name}.order", f"expected each of the {inputs} inputs once")
    if record["format"] in FORMATS and not bool(torch.isfinite(table(record["format"])[codes.long()]).all()):
        faults.add(f"{name}.qweight", f"codes that stand for no number in {record['format']}")
    double = _double(record["double"], tensors)
    if double is not None and int(double.codes.max()) >= 2**double.bits:
        faults.add(f"{name}.scale_codes", f"codes of {double.bits} bits go up to {int(double.codes.max())}")
    if faults.found:
        return None
    told = record["activation"]
    activation = None
    if told is not None:
        activation = Activation(**told, scale=tensors.get("act_scale"), zero=tensors.get("act_zero"))
    return QuantWeight(
        codes=codes,
        scales=tensors["scales"] if double is None else double.values(),
        group=group,
        bits=bits,
        zeros=zeros,
        format=record["format"],
        codebook=tensors.get("codebook"),
        pre_scale=tensors.get("pre_scale"),
        order=order,
        activation=activation,
        double=double,
        output=record["output"],
    )


def _codes(faults: Faults, name: str, packed: Tensor, bits: int, length: int) -> Tensor:
    codes = unpack(packed, bits, length)
    if int(codes.max()) >= 2**bits:
        faults.add(name, f"codes of {bits} bits go up to {int(codes.max())}, at most {2**bits - 1} is one")
    return codes


def _double(told: Mapping[str, int] | None, tensors: Mapping[str, Tensor]) -> DoubleScales | None:
    if told is None:
        return None
    return DoubleScales(
        codes=tensors["scale_codes"],
        scale=tensors["scale_scale"],
        offset=tensors["scale_offset"],
        zero=2 ** (told["bits"] - 1),
        bits=told["bits"],
        group=told["group"],
    )


# -- What a record says of its tensors ---------------------------------------------------------------------------------

_Kind = tuple[tuple[torch.dtype, ...], tuple[int, ...]]


def _expected(record: Mapping[str, Any]) -> dict[str, _Kind]:
    """Element types and shape of each part of a layer that has ``record``."""
    (rows, inputs), bits, parts = record["shape"], record["bits"], record["parts"]
    groups = -(-inputs // record["group"])
    per_byte, single = 8 // container(bits), (torch.float32,)
    kinds: dict[str, _Kind] = {"qweight": ((torch.uint8,), (rows, -(-inputs // per_byte)))}
    if record["double"] is None:
        kinds["scales"] = (single, (rows, groups))
    else:
        pieces = (-(-rows * groups // record["double"]["group"]),)
        kinds["scale_codes"] = ((torch.uint8,), (rows, groups))
        kinds |= {"scale_scale": (single, pieces), "scale_offset": (single, pieces)}
    if record["zeros"] == "codes":
        kinds["qzeros"] = ((torch.uint8,), (rows, -(-groups // per_byte)))
    elif record["zeros"] == "float":
        kinds["qzeros"] = (single, (rows, groups))
    if record["format"] == "codebook":
        kinds["codebook"] = (single, (2**bits,))
    optional: dict[str, _Kind] = {
        "pre_scale": (single, (inputs,)),
        "order": ((torch.int64,), (inputs,)),
        "bias": ((_FLOATS[record["compute_dtype"]],), (rows,)),
    }
    if record["activation"] is not None and record["activation"]["per"] == "static":
        kinds["act_scale"] = (single, ())
        optional["act_zero"] = ((*_INTEGERS, torch.float32), ())
    return kinds | {part: kind for part, kind in optional.items() if part in parts}


def _check_header(
    faults: Faults, name: str, stored: StoredTensor | None, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    if stored is None:
        faults.add(name, "missing")
    elif stored.dtype not in dtypes or stored.shape != shape:
        told = " or ".join(str(dtype) for dtype in dtypes)
        faults.add(name, f"expected {told} {list(shape)}, got {stored.dtype} {list(stored.shape)}")


def _check_nested(record: Mapping[str, Any]) -> None:
    activation, double, parts = record["activation"], record["double"], record["parts"]
    if activation is not None:
        if not isinstance(activation, dict) or activation.keys() != {"format", "per", "group", "rounding"}:
            raise ValueError(f"activation is {activation!r:.60}, expected format, per, group and rounding")
        _one_of(activation, "format", ["int8", "uint8", *FORMATS])
        _one_of(activation, "per", list(get_args(Per)))
        _one_of(activation, "rounding", list(get_args(Rounding)))
        _whole(activation, "group", 0 if activation["per"] != "block" else 1, _MOST)
    if double is not None:
        if not isinstance(double, dict) or double.keys() != {"bits", "group"}:
            raise ValueError(f"double is {double!r:.60}, expected bits and group")
        _whole(double, "bits", 2, 8)
        _whole(double, "group", 1, _MOST)
    required = set(_expected({**record, "parts": []}))
    allowed = set(_expected({**record, "parts": ["pre_scale", "order", "bias", "act_zero"]}))
    if not required <= set(parts) <= allowed:
        raise ValueError(f"parts are {', '.join(parts)[:200]}; expected {', '.join(sorted(required))} at least")


def _is_whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _whole(record: Mapping[str, Any], key: str, low: int, high: int) -> None:
    if not _is_whole(record[key], low, high):
        raise ValueError(f"{key} is {record[key]!r:.40}, expected a whole number from {low} to {high}")


def _one_of(record: Mapping[str, Any], key: str, known: list[str | None]) -> None:
    if not (record[key] is None or isinstance(record[key], str)) or record[key] not in known:
        raise ValueError(f"{key} is {record[key]!r:.40}, expected one of {', '.join(map(str, known))}")
