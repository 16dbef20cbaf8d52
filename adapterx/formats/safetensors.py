"""safetensors files: a length, a JSON header, the bytes of the tensors. `docs/formats.md` says how we use them.

The header is parsed here, because the safetensors package takes duplicate keys (the last one wins), and its numpy
side does not know bfloat16.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from adapterx.adapter import Adapter, Array
from adapterx.atomic import Buffer, atomic_write
from adapterx.errors import FormatError
from adapterx.faults import Faults
from adapterx.formats import quantized
from adapterx.formats.dtypes import BY_DTYPE, BY_SAFETENSORS
from adapterx.formats.file_bytes import FileBytes
from adapterx.formats.finite import all_finite
from adapterx.formats.quantized import Quantization
from adapterx.formats.tensor_table import Layout, TensorTable, tensors_to_write
from adapterx.json_text import json_object
from adapterx.limits import Limits

MARK = "adapterx"
VERSION = "1"

# What an Adapter says of where it lay; another file is another place, and equal adapters shall be equal files.
_NOT_WRITTEN = {"source", "format", "format_version", quantized.KEY, quantized.SHAPES}
_OTHERS = {"I8": "int8", "U8": "uint8", "F64": "float64", "I64": "int64", "I32": "int32"}
_ADVICE = "The file is broken: download or export it again."
_CODES = {np.dtype(name): code for code, name in _OTHERS.items()} | {
    k: kind.safetensors for k, kind in BY_DTYPE.items()
}
# Beside adapters' own types: what codes are stored in, and what some tools write a kohya file's alpha in.
_READ = BY_SAFETENSORS | {code: np.dtype(name) for code, name in _OTHERS.items()}
_Entry = tuple[str, np.dtype[Any], tuple[int, ...], int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """What a file says of its tensors.

    Args:
        start: where the data begins
        entries: name, type, shape, begin and end (from ``start``) of each tensor, in the order of the data
        metadata: what the file says of itself
    """

    start: int
    entries: list[_Entry]
    metadata: Mapping[str, str]


def read(file: FileBytes, limits: Limits) -> TensorTable:
    """The tensors of a safetensors file, as views of the file's one buffer.

    Raises:
        FormatError: the header is no valid JSON, names a tensor twice, or does not account for each byte once.
    """
    found = header(file, limits, _READ)
    start, entries = found.start, found.entries
    kinds = {dtype for _, dtype, _, _, _ in entries}
    finite = len(kinds) == 1 and file.filled == start
    for piece in file.advance(file.size):
        # All tensors of one type: pieces can be checked as they come. The sum of the sizes is known to be whole
        # elements, and so is a piece.
        finite = finite and all_finite(piece.view(next(iter(kinds))))
    data = file.whole()
    arrays: dict[str, Array] = {
        name: np.ndarray(shape, dtype, buffer=data, offset=start + begin) for name, dtype, shape, begin, _ in entries
    }
    ours = found.metadata.get("format") == MARK
    if ours and quantized.KEY in found.metadata:
        arrays, finite = quantized.dequantized(arrays, found.metadata, where=str(file.path)), False
    layout: Layout = "rank_first" if ours else "by_shape"
    return TensorTable(str(file.path), arrays, found.metadata, layout, finite)


def header(file: FileBytes, limits: Limits, types: Mapping[str, np.dtype[Any]] = BY_SAFETENSORS) -> Header:
    """The header, without the data.

    Args:
        file: read as far as the header goes
        limits: number of tensors and dimensions are checked against them
        types: element types that are taken, by their code

    Raises:
        FormatError: as :func:`read`.
    """
    start, raw = _parsed(file, limits)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{file.path}: __metadata__ must map strings to strings; {_ADVICE}")
    if len(raw) > limits.tensors:
        raise FormatError(f"{file.path}: the header names {len(raw)} tensors, at most {limits.tensors} are read")
    return Header(start, _entries(file, raw, limits, types, data_bytes=file.size - start), metadata)


def write(adapter: Adapter, path: str | os.PathLike[str], *, quantize: Quantization | None = None) -> None:
    """Write ``adapter``; equal adapters with equal provenance give equal bytes.

    Args:
        adapter: what to write
        path: replaced if it exists
        quantize: store both matrices of each site as :mod:`adapterx.formats.quantized` says

    Raises:
        FormatError: an element type that the format does not have, or a rank of 0.
    """
    kept = {key: adapter.metadata[key] for key in sorted(adapter.metadata) if key not in _NOT_WRITTEN}
    metadata = {"format": MARK, "format_version": VERSION, **kept}
    tensors = tensors_to_write(adapter.sites, str(path))
    if quantize is not None:
        # Its checks come before its first tensor.
        next(tensors)
        codes, told = quantized.stored(adapter, quantize)
        tensors, metadata = iter(codes.items()), metadata | told
    atomic_write(path, pieces(tensors, metadata))


def pieces(tensors: Iterable[tuple[str, Array]], metadata: Mapping[str, str]) -> Iterator[Buffer]:
    """A safetensors file, piece by piece: the tensors by falling element size, then by name.

    Args:
        tensors: C-contiguous, of types that files of ours have
        metadata: what the file says of itself
    """
    ordered = sorted(tensors, key=lambda named: (-named[1].dtype.itemsize, named[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in ordered:
        code = _CODES[array.dtype]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The data begins at a multiple of 8, so that a mapped file can be used as it lies.
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for _, array in ordered:
        yield array.reshape(-1).view(np.uint8).data


def _parsed(file: FileBytes, limits: Limits) -> tuple[int, dict[str, Any]]:
    """Where the data starts, and the parsed header."""
    prefix = file.head(8)
    if len(prefix) < 8:
        raise FormatError(f"{file.path}: {file.size} bytes cannot be a safetensors file; {_ADVICE}")
    (length,) = struct.unpack("<Q", prefix)
    if length > limits.header_bytes:
        raise FormatError(f"{file.path}: its header says {length:,} bytes, at most {limits.header_bytes:,} are read")
    if 8 + length > file.size:
        raise FormatError(f"{file.path}: its header says {length:,} bytes, the file has {file.size:,}; {_ADVICE}")
    text = file.head(8 + length)[8:]
    return 8 + length, json_object(text, where=f"{file.path} (header)")


def _entries(
    file: FileBytes,
    header: Mapping[str, Any],
    limits: Limits,
    types: Mapping[str, np.dtype[Any]],
    *,
    data_bytes: int,
) -> list[_Entry]:
    """Name, type, shape, begin and end of each tensor, in the order of the data."""
    faults = Faults(str(file.path))
    entries: list[_Entry] = []
    for name, entry in header.items():
        try:
            entries.append((name, *_entry(entry, limits, types)))
        except ValueError as cause:
            faults.add(name, str(cause))
    entries.sort(key=lambda entry: entry[3:])
    filled = 0
    for name, _, _, begin, end in entries:
        if begin != filled and not faults.found:
            what = "overlaps the tensor before it" if begin < filled else "leaves a hole before it"
            faults.add(name, f"{what}: its data begins at {begin}, expected {filled}")
        filled = end
    if not faults.found and filled != data_bytes:
        much = "is truncated" if filled > data_bytes else "has bytes that belong to no tensor"
        faults.add("data", f"the file {much}: the header accounts for {filled:,} bytes, there are {data_bytes:,}")
    faults.refuse("not a sound safetensors file", advice=_ADVICE)
    return entries


def _entry(
    entry: Any, limits: Limits, types: Mapping[str, np.dtype[Any]]
) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Type, shape, begin and end; ValueError with the cause."""
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        code = shape = begin = end = None
    if type(code) is not str or type(shape) is not list:
        raise ValueError("expected dtype, shape and two data_offsets")
    if len(shape) > limits.ndim:
        raise ValueError(f"it has {len(shape)} dimensions, at most {limits.ndim} are read")
    for number in (*shape, begin, end):
        if type(number) is not int or number < 0:
            raise ValueError(f"expected whole numbers that are not negative, got {number!r:.40}")
    dtype = types.get(code)
    if dtype is None:
        raise ValueError(f"its element type is {code[:20]!r}, expected one of {', '.join(types)}")
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if not expected:
        raise ValueError(f"it has no elements, its shape is {tuple(shape)}")
    if end - begin != expected:
        raise ValueError(f"shape {tuple(shape)} of {code} takes {expected} bytes, data_offsets give {end - begin}")
    return dtype, tuple(shape), begin, end
