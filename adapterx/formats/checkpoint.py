"""Checkpoints of Hugging Face: a folder with ``config.json`` and safetensors files, one or many with an index.

Only headers are read here. ``merge_peft`` reads and writes the tensors, one at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapterx.errors import FormatError
from adapterx.faults import Faults
from adapterx.formats import safetensors
from adapterx.formats.dtypes import BY_SAFETENSORS
from adapterx.formats.file_bytes import FileBytes
from adapterx.formats.safetensors import Header
from adapterx.json_text import json_object
from adapterx.limits import Limits

CONFIG = "config.json"
INDEX_SUFFIX = ".safetensors.index.json"
_SUFFIX = ".safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Weights are copied, never loaded: nothing is allocated for their size.
_LIMITS = Limits(file_bytes=1 << 60, header_bytes=100 << 20, tensors=1_000_000, ndim=8)
_INTEGERS = {
    code: np.dtype(name)
    for code, name in {
        **{"F64": "float64", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"},
        **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    }.items()
}
_TYPES: Mapping[str, np.dtype[Any]] = {**BY_SAFETENSORS, **_INTEGERS}


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Args:
        file: name of its file in the folder
        dtype: element type
        shape: its shape
        first: where its bytes begin in the file
        last: where they end
    """

    file: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    first: int
    last: int


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the headers and the config say.

    Args:
        folder: where it lies
        headers: of each weight file, by its name
        tensors: by name
        config: ``config.json``; empty where there is none
        index: name of the index file, ``""`` where one file holds all
    """

    folder: Path
    headers: Mapping[str, Header]
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    index: str

    def read(self, name: str, rows: slice | None = None) -> np.ndarray[Any, Any]:
        """A tensor, or the part of it that is ``rows`` of its bytes (then flat)."""
        stored = self.tensors[name]
        first, last = (0, stored.last - stored.first) if rows is None else (rows.start, rows.stop)
        with (self.folder / stored.file).open("rb", buffering=0) as file:
            file.seek(stored.first + first)
            array = np.fromfile(file, stored.dtype, (last - first) // stored.dtype.itemsize)
        return array if rows is not None else array.reshape(stored.shape)


def read_checkpoint(folder: Path) -> Checkpoint:
    """The tables of a checkpoint.

    Raises:
        FormatError: no checkpoint, weights in another format, an index that does not agree with its files, or a broken
            header; all at once for one kind of fault.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder}: expected the folder of a checkpoint, found {_met(folder)}")
    present = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    index = [name for name in present if name.endswith(INDEX_SUFFIX)]
    files = [name for name in present if name.endswith(_SUFFIX)]
    if len(index) > 1 or (not index and len(files) > 1):
        raise FormatError(f"{folder}: which of {', '.join(index or files)} is the model cannot be known; leave one")
    if not files:
        pickled = [name for name in present if name.endswith(_PICKLED)]
        advice = f"; {pickled[0]} is a pickle, save the model again with safe_serialization=True" if pickled else ""
        raise FormatError(f"{folder}: no {_SUFFIX} file{advice}")
    config = {} if CONFIG not in present else _object(folder / CONFIG)
    mapped = _weight_map(folder / index[0], present) if index else None
    headers = {name: _header(folder / name) for name in sorted(set(mapped.values()) if mapped else files)}
    tensors = {
        name: StoredTensor(file, dtype, shape, header.start + begin, header.start + end)
        for file, header in headers.items()
        for name, dtype, shape, begin, end in header.entries
    }
    if mapped is not None:
        _refuse_disagreement(folder / index[0], mapped, tensors)
    return Checkpoint(folder, headers, tensors, config, index[0] if index else "")


def header_bytes(tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds ``tensors`` (type and shape) one after another."""
    codes = {dtype: code for code, dtype in _TYPES.items()}
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        table[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _met(path: Path) -> str:
    return "a file" if path.exists() else "nothing there"


def _object(path: Path) -> dict[str, Any]:
    with FileBytes(path, Limits(file_bytes=_LIMITS.header_bytes)) as file:
        return json_object(file.whole().tobytes(), where=str(path))


def _header(path: Path) -> Header:
    # Mapped, only the pages of the header are ever read.
    with FileBytes(path, _LIMITS, mmap=True) as file:
        return safetensors.header(file, _LIMITS, _TYPES)


def _weight_map(path: Path, present: list[str]) -> dict[str, str]:
    mapped = _object(path).get("weight_map")
    if not isinstance(mapped, dict) or not all(isinstance(file, str) for file in mapped.values()):
        raise FormatError(f"{path}: expected a weight_map of names to files")
    missing = sorted(set(mapped.values()) - set(present))
    if missing:
        raise FormatError(f"{path}: the folder lacks {', '.join(missing)}; download the whole checkpoint")
    return mapped


def _refuse_disagreement(path: Path, mapped: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    faults = Faults(str(path))
    for name, file in mapped.items():
        if name not in tensors:
            faults.add(name, f"said to be in {file}, which does not have it")
        elif tensors[name].file != file:
            faults.add(name, f"said to be in {file}, it is in {tensors[name].file}")
    faults.refuse("index and files disagree", advice="Download or save the checkpoint again.")
