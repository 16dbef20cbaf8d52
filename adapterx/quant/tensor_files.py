"""TensorFiles: the tensors of a folder of safetensors files, one file or shards with an index, read one at a time.

Headers are parsed here, before anything is allocated for a tensor: the safetensors package takes a name twice, and does
not know which file of a folder it is in.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch

from adapterx.atomic import atomic_write
from adapterx.errors import FormatError
from adapterx.faults import Faults
from adapterx.json_text import json_object
from adapterx.progress import progress

Tensor = torch.Tensor

# Not "model": transformers would open that, find no weight that it knows, and make up the quantized ones.
STEM = "quantized"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SHARD_BYTES = 5 << 30
# A model of 100 GB has headers of some MB; more is no model.
_HEADER_BYTES, _TENSORS, _DIMENSIONS = 100 << 20, 1_000_000, 8
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_ADVICE = "Nothing was changed. Download or save the model again."


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Args:
        file: name of its file in the folder
        dtype: element type
        shape: its shape
        first: where its bytes begin in the file
        size: of its bytes
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class TensorFiles:
    """The tensors of a folder by name; a tensor's bytes are read when it is asked for.

    Args:
        folder: where the files lie
        tensors: by name
        metadata: what the files say of themselves
    """

    folder: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU.

        Raises:
            FormatError: there is none, or the file became shorter
        """
        stored = self.tensors.get(name)
        if stored is None:
            raise FormatError(f"{self.folder}: no tensor {name}; {_ADVICE}")
        data = torch.empty(stored.size, dtype=torch.uint8)
        with (self.folder / stored.file).open("rb", buffering=0) as file:
            file.seek(stored.first)
            left = _bytes_of(data)
            while left:
                count = file.readinto(left)
                if not count:
                    raise FormatError(f"{self.folder / stored.file}: {name}: the file became shorter; {_ADVICE}")
                left = left[count:]
        return data.view(stored.dtype).reshape(stored.shape)


def read_tensor_files(folder: Path) -> TensorFiles:
    """The headers of the safetensors files of ``folder``.

    Raises:
        FormatError: no such file, an index that names files elsewhere or does not agree with them, or a header that is
            broken, too large, or does not account for each byte once; names the file and the tensor
    """
    if not folder.is_dir():
        raise FormatError(f"{folder}: expected the folder of a model, found {'a file' if folder.exists() else 'none'}")
    files = _files(folder)
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for name in files:
        found, told = _header(folder, name)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise FormatError(f"{folder}: {twice[0]} is in {tensors[twice[0]].file} and in {name}; {_ADVICE}")
        tensors |= found
        metadata |= told
    return TensorFiles(folder, MappingProxyType(tensors), MappingProxyType(metadata))


def write_tensor_files(
    tensors: Mapping[str, Tensor], folder: Path, *, metadata: Mapping[str, str], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write ``tensors`` into ``folder``: one file, or where they are more than ``shard_bytes``, shards and their index.

    Raises:
        FormatError: an element type that safetensors does not have
    """
    strange = [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in _CODES]
    if strange:
        raise FormatError(f"{folder}: safetensors cannot hold {', '.join(strange[:5])}")
    shards = _shards(tensors, shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with progress("saving", total) as advance:
        for number, shard in enumerate(shards, 1):
            name = f"{STEM}.safetensors" if len(shards) == 1 else _shard(number, len(shards))
            atomic_write(folder / name, _pieces(shard, metadata, advance))
    if len(shards) > 1:
        files = (_shard(number, len(shards)) for number in range(1, len(shards) + 1))
        placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        atomic_write(folder / f"{STEM}.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True).encode())


def _bytes_of(data: Tensor) -> memoryview:
    """The memory of a uint8 tensor."""
    array: Any = data.numpy()
    return memoryview(array).cast("B")


_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def _shard(number: int, count: int) -> str:
    return f"{STEM}-{number:05}-of-{count:05}.safetensors"


def _shards(tensors: Mapping[str, Tensor], most: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > most:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], advance: Any) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Aligned where all element sizes fall, as the safetensors package writes them.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in ordered:
        tensor = tensors[name]
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in ordered:
        data = tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8)
        yield _bytes_of(data)
        advance(data.numel())


# -- Reading headers ---------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[str]:
    present = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    indices = [name for name in present if name.endswith(".safetensors.index.json")]
    files = [name for name in present if name.endswith(".safetensors")]
    if not files:
        pickled = [name for name in present if name.endswith(PICKLED)]
        advice = f"; {pickled[0]} may run code when it is loaded, and is not; save it as safetensors" if pickled else ""
        raise FormatError(f"{folder}: no .safetensors file{advice}")
    if len(indices) > 1 or (not indices and len(files) > 1):
        raise FormatError(f"{folder}: which of {', '.join(indices or files)} is the model cannot be known; leave one")
    if not indices:
        return files
    path = folder / indices[0]
    placed = json_file(path).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        raise FormatError(f"{path}: expected a weight_map of tensors to files; {_ADVICE}")
    # Names are compared with those of the folder itself: "../x" or "/x" is none of them.
    strangers = sorted(set(placed.values()) - set(files))
    if strangers:
        raise FormatError(f"{path}: {strangers[0]!r:.80} is no .safetensors file of this folder; {_ADVICE}")
    return sorted(set(placed.values()))


def json_file(path: Path) -> dict[str, Any]:
    """The object in a JSON file of at most 100 MB.

    Raises:
        FormatError: not there, too large, or no JSON object
    """
    try:
        if path.stat().st_size > _HEADER_BYTES:
            raise FormatError(f"{path}: {path.stat().st_size:,} bytes of JSON, at most {_HEADER_BYTES:,} are read")
        return json_object(path.read_bytes(), where=str(path), depth=32)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; {_ADVICE}") from None


def _header(folder: Path, name: str) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    path = folder / name
    size = path.stat().st_size
    with path.open("rb") as file:
        start, header = _parsed(path, file, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map strings to strings; {_ADVICE}")
    if len(header) > _TENSORS:
        raise FormatError(f"{path}: the header names {len(header):,} tensors, at most {_TENSORS:,} are read")
    faults = Faults(str(path))
    found: dict[str, StoredTensor] = {}
    for tensor, entry in header.items():
        try:
            found[tensor] = _entry(name, entry, start)
        except ValueError as cause:
            faults.add(tensor, str(cause))
    filled = start
    for tensor, stored in sorted(found.items(), key=lambda named: (named[1].first, named[1].size)):
        if stored.first != filled and not faults.found:
            what = "overlaps the tensor before it" if stored.first < filled else "leaves a hole before it"
            faults.add(tensor, f"{what}: its data begins at {stored.first - start}, expected {filled - start}")
        filled = stored.first + stored.size
        if filled > size and not faults.found:
            faults.add(tensor, f"ends at byte {filled:,}; the file is truncated, it has {size:,}")
    if filled < size and not faults.found:
        faults.add("data", f"{size - filled:,} bytes belong to no tensor")
    faults.refuse("not a sound safetensors file", advice=_ADVICE)
    return found, metadata


def _parsed(path: Path, file: BinaryIO, size: int) -> tuple[int, dict[str, Any]]:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise FormatError(f"{path}: {size} bytes cannot be a safetensors file; {_ADVICE}")
    (length,) = struct.unpack("<Q", prefix)
    if length > _HEADER_BYTES:
        raise FormatError(f"{path}: its header says {length:,} bytes, at most {_HEADER_BYTES:,} are read")
    if 8 + length > size:
        raise FormatError(f"{path}: its header says {length:,} bytes, the file has {size:,}: truncated; {_ADVICE}")
    return 8 + length, json_object(file.read(length), where=f"{path} (header)")


def _entry(file: str, entry: Any, start: int) -> StoredTensor:
    """Raises ValueError with the cause."""
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        code = shape = begin = end = None
    if type(code) is not str or type(shape) is not list:
        raise ValueError("expected dtype, shape and two data_offsets")
    if len(shape) > _DIMENSIONS:
        raise ValueError(f"it has {len(shape)} dimensions, at most {_DIMENSIONS} are read")
    for number in (*shape, begin, end):
        if type(number) is not int or number < 0:
            raise ValueError(f"expected whole numbers that are not negative, got {number!r:.40}")
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise ValueError(f"its element type is {code[:20]!r}, expected one of {', '.join(_DTYPES)}")
    expected = dtype.itemsize * math.prod(shape)
    if end - begin != expected:
        raise ValueError(f"shape {tuple(shape)} of {code} takes {expected:,} bytes, data_offsets give {end - begin:,}")
    return StoredTensor(file, dtype, tuple(shape), start + begin, expected)
