"""``.onnx_adapter``: ONNX Runtime's adapter file, one flatbuffer. `docs/formats.md` has its schema.

The reader checks each offset and length before it follows it, which the reading half of the flatbuffers package does
not; ONNX Runtime before 1.24.4 reads past the end of files whose dims lie.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator

import numpy as np

from adapterx.adapter import Adapter, Array
from adapterx.atomic import Buffer, atomic_write
from adapterx.errors import FormatError
from adapterx.formats.dtypes import BY_DTYPE, BY_ONNX, NAMES
from adapterx.formats.file_bytes import Bytes, FileBytes
from adapterx.formats.quantized import decoded
from adapterx.formats.tensor_table import TensorTable, tensors_to_write
from adapterx.limits import Limits

IDENTIFIER = b"TORT"
FORMAT_VERSION = 1

# Our own files: says that the matrices lie rank first, and that model_version is made of a base fingerprint.
WRITTEN_BY_ADAPTERX = 0x41583031

# Of a table of four fields of four bytes: its own size, that of the table, and where the fields are in it.
_VTABLE = struct.pack("<6H", 12, 20, 4, 8, 12, 16)
_LARGEST = 2**31 - 1
_ALIGNMENT = 64
# The number of int8 in ``onnx.TensorProto.DataType``: codes, beside which a file has their scales.
_INT8 = 3
_ADVICE = "The file is broken: download or export it again."


def read(file: FileBytes, limits: Limits) -> TensorTable:
    """The parameters of an ``.onnx_adapter`` file, as views of the file's one buffer.

    Raises:
        FormatError: another identifier or version, an offset or length that leaves the file, dims that do not match
            the data, a name twice, or bytes that nothing refers to at the end.
    """
    where = str(file.path)
    found = file.head(8)[4:]
    if found != IDENTIFIER:
        raise FormatError(f"{where}: expected the identifier {IDENTIFIER!r} of an .onnx_adapter file, got {found!r}")
    buffer = _Buffer(file.whole(), where)
    root = buffer.table(buffer.follow(0))
    version = buffer.int32(root, 0)
    if version != FORMAT_VERSION:
        raise FormatError(f"{where}: its format version is {version}, only {FORMAT_VERSION} is known")
    adapter_version, model_version = buffer.int32(root, 1), buffer.int32(root, 2)
    arrays: dict[str, Array] = {}
    for name, array in _parameters(buffer, root, limits):
        if name in arrays:
            raise FormatError(f"{where}: {name} is there twice; which one holds cannot be known")
        arrays[name] = array
    buffer.refuse_trailing()
    ours = adapter_version == WRITTEN_BY_ADAPTERX
    metadata = {"model_version": str(model_version)} if ours and model_version else {}
    return TensorTable(where, decoded(arrays, where=where), metadata, "rank_first" if ours else "by_shape")


def write(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write ``adapter`` so that ONNX Runtime's ``LoraAdapter`` loads it; equal adapters give equal bytes.

    Raises:
        FormatError: an element type or a size (2 GB) that the format cannot hold, or a rank of 0.
    """
    write_tensors(
        tensors_to_write(adapter.sites, str(path)), path, fingerprint=adapter.metadata.get("base_fingerprint", "")
    )


def write_tensors(named: Iterable[tuple[str, Array]], path: str | os.PathLike[str], *, fingerprint: str) -> None:
    """Write tensors as they are: those of an adapter, or the inputs of a model, codes and their scales included.

    Args:
        named: floats and int8, each with elements
        path: where
        fingerprint: of the base model, ``""`` where it is unknown

    Raises:
        FormatError: they are larger than the format can hold.
    """
    tensors, version = list(named), model_version(fingerprint)
    tables, starts, size = _tables(tensors, version)
    if size > _LARGEST:
        raise FormatError(f"{path}: an .onnx_adapter file holds at most 2 GB, this takes {size:,}; write .safetensors")
    atomic_write(path, _pieces(tables, starts, tensors))


def _pieces(tables: bytes, starts: list[int], tensors: list[tuple[str, Array]]) -> Iterator[Buffer]:
    yield tables
    end = len(tables)
    for start, (_, array) in zip(starts, tensors, strict=True):
        yield bytes(start - 4 - end) + struct.pack("<I", array.nbytes)
        yield array.reshape(-1).view(np.uint8).data
        end = start + array.nbytes
    yield bytes(-end % 4)


def _tables(tensors: list[tuple[str, Array]], version: int) -> tuple[bytes, list[int], int]:
    """Everything in front of the data, where the data of each tensor starts, and the size of the whole file.

    Laid out front to back, since the builder of the flatbuffers package, which goes the other way, holds a second copy
    of all data. A table is the offset back to its vtable and then its fields; what these refer to lies behind it.
    """
    # Identifier; vtable and fields of Adapter; vtable of Parameter, which all share; the vector of parameters.
    head = struct.pack("<I4s", 20, IDENTIFIER) + _VTABLE
    head += struct.pack("<iiiiI", 12, FORMAT_VERSION, WRITTEN_BY_ADAPTERX, version, 16) + _VTABLE
    shared, first = 40, 56 + 4 * len(tensors)
    head += struct.pack("<I", len(tensors))
    head += b"".join(struct.pack("<I", first + 20 * i - (56 + 4 * i)) for i in range(len(tensors)))
    texts, places = _texts(tensors, first + 20 * len(tensors))
    starts, end = [], first + 20 * len(tensors) + len(texts)
    for _, array in tensors:
        # Four bytes of length lie in front of what is aligned.
        start = -(-(end + 4) // _ALIGNMENT) * _ALIGNMENT
        starts.append(start)
        end = start + array.nbytes
    tables = []
    for i, (_, array) in enumerate(tensors):
        at, (name, dims) = first + 20 * i, places[i]
        code = _INT8 if array.dtype == np.int8 else BY_DTYPE[array.dtype].onnx
        data = starts[i] - 4
        # An offset counts from the field that holds it, and has 32 bits; what is too large is refused by its size.
        fields = (at - shared, name - at - 4, dims - at - 8, code, (data - at - 16) & 0xFFFFFFFF)
        tables.append(struct.pack("<iIIiI", *fields))
    return head + b"".join(tables) + texts, starts, end + -end % 4


def _texts(tensors: list[tuple[str, Array]], start: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Names and dims, and where each tensor's two begin, in a file where they start at ``start``."""
    texts, places = bytearray(), []
    for name, array in tensors:
        raw = name.encode()
        text = start + len(texts)
        texts += struct.pack("<I", len(raw)) + raw + b"\0"
        # The numbers, not their count, are aligned to 8 bytes.
        texts += bytes(-(start + len(texts) + 4) % 8)
        places.append((text, start + len(texts)))
        texts += struct.pack(f"<I{array.ndim}q", array.ndim, *array.shape)
    return bytes(texts), places


def model_version(fingerprint: str) -> int:
    """The ``model_version`` of our files for a base model's fingerprint; 0 when there is none.

    The format has room for one integer, so this is a check and no identity.

    Args:
        fingerprint: hex digits, at least 8

    Example:
        >>> model_version("ffffffff00"), model_version("")
        (2147483647, 0)
    """
    try:
        return (int(fingerprint[:8], 16) & 0x7FFFFFFF) or 1
    except ValueError:
        return 0


def _parameters(buffer: _Buffer, root: _Table, limits: Limits) -> Iterator[tuple[str, Array]]:
    vector = buffer.field(root, 3, 4)
    start, count = buffer.vector(buffer.follow(vector), 4) if vector else (0, 0)
    if count > limits.tensors:
        raise FormatError(f"{buffer.where}: it says {count} parameters, at most {limits.tensors} are read")
    taken = 0
    for at in range(start, start + 4 * count, 4):
        name, array = _parameter(buffer, buffer.table(buffer.follow(at)), limits)
        taken += array.nbytes
        if taken > len(buffer.data):
            raise FormatError(f"{buffer.where}: {name} and others share their data; {_ADVICE}")
        yield name, array


def _parameter(buffer: _Buffer, parameter: _Table, limits: Limits) -> tuple[str, Array]:
    name = buffer.text(parameter, 0, limits)
    shown = f"{buffer.where}: {name if name.isprintable() else ascii(name)}"
    dims_at, data_at = buffer.field(parameter, 1, 4), buffer.field(parameter, 3, 4)
    if not dims_at or not data_at:
        raise FormatError(f"{shown} has no {'data' if dims_at else 'dims'}; {_ADVICE}")
    start, ndim = buffer.vector(buffer.follow(dims_at), 8)
    if ndim > limits.ndim:
        raise FormatError(f"{shown} has {ndim} dimensions, at most {limits.ndim} are read")
    dims = struct.unpack_from(f"<{ndim}q", buffer.bytes, start)
    code = buffer.int32(parameter, 2)
    dtype = np.dtype(np.int8) if code == _INT8 else BY_ONNX.get(code)
    if dtype is None:
        raise FormatError(f"{shown} has the ONNX element type {code}, expected {sorted(BY_ONNX)} ({NAMES})")
    data_start, nbytes = buffer.vector(buffer.follow(data_at), 1)
    expected = dtype.itemsize
    for size in dims:
        if size <= 0:
            raise FormatError(f"{shown} has dims {dims}; {_ADVICE}")
        expected *= size
    if expected != nbytes:
        raise FormatError(f"{shown}: dims {dims} of {dtype} take {expected} bytes, its data has {nbytes}; {_ADVICE}")
    return name, np.ndarray(dims, dtype, buffer=buffer.data, offset=data_start)


# A table's position, that of its vtable, and the size of its vtable.
_Table = tuple[int, int, int]


class _Buffer:
    """A flatbuffer in which nothing is followed before it is known to lie inside.

    Positions count from the start of the file. Remembers how far the file has been referred to.
    """

    def __init__(self, data: Bytes, where: str) -> None:
        self.data = data
        self.bytes = data.data
        self.where = where
        self._end = 8

    def claim(self, start: int, size: int) -> int:
        """``start``, once it is sure that ``size`` bytes from there belong to the file."""
        if start < 0 or start + size > len(self.data):
            raise FormatError(
                f"{self.where}: it refers to bytes {start:,} to {start + size:,}, the file has {len(self.data):,}; "
                f"{_ADVICE}"
            )
        self._end = max(self._end, start + size)
        return start

    def follow(self, at: int) -> int:
        """The position that the offset at ``at`` refers to."""
        return at + int(struct.unpack_from("<I", self.bytes, self.claim(at, 4))[0])

    def table(self, at: int) -> _Table:
        """The table at ``at``."""
        (back,) = struct.unpack_from("<i", self.bytes, self.claim(at, 4))
        vtable = self.claim(at - back, 4)
        vtable_size, table_size = struct.unpack_from("<HH", self.bytes, vtable)
        if vtable_size < 4 or vtable_size % 2 or table_size < 4:
            raise FormatError(f"{self.where}: the table at byte {at:,} is malformed; {_ADVICE}")
        self.claim(vtable, vtable_size)
        self.claim(at, table_size)
        return at, vtable, vtable_size

    def field(self, table: _Table, slot: int, size: int) -> int:
        """The position of a field of ``size`` bytes, 0 when the table leaves it out."""
        at, vtable, vtable_size = table
        entry = 4 + 2 * slot
        if entry + 2 > vtable_size:
            return 0
        (offset,) = struct.unpack_from("<H", self.bytes, vtable + entry)
        return self.claim(at + offset, size) if offset else 0

    def int32(self, table: _Table, slot: int) -> int:
        """An integer field; 0 is its default."""
        at = self.field(table, slot, 4)
        return int(struct.unpack_from("<i", self.bytes, at)[0]) if at else 0

    def vector(self, at: int, itemsize: int) -> tuple[int, int]:
        """Position of the first item and number of items."""
        (count,) = struct.unpack_from("<I", self.bytes, self.claim(at, 4))
        return self.claim(at + 4, count * itemsize), int(count)

    def text(self, table: _Table, slot: int, limits: Limits) -> str:
        """A string field."""
        at = self.field(table, slot, 4)
        if not at:
            raise FormatError(f"{self.where}: a parameter has no name; {_ADVICE}")
        start, length = self.vector(self.follow(at), 1)
        if length > limits.name_bytes:
            raise FormatError(f"{self.where}: a name of {length} bytes, at most {limits.name_bytes} are read")
        # The string's terminating zero counts as part of it.
        self.claim(start + length, 1)
        try:
            return self.data[start : start + length].tobytes().decode("utf-8")
        except UnicodeDecodeError:
            raise FormatError(f"{self.where}: the name at byte {start:,} is not UTF-8; {_ADVICE}") from None

    def refuse_trailing(self) -> None:
        """What follows the last thing referred to may only be the zeros of an alignment."""
        rest = self.data[self._end :]
        if len(rest) >= _ALIGNMENT or rest.any() or len(self.data) % 4:
            raise FormatError(
                f"{self.where}: its content ends at byte {self._end:,}, the file has {len(self.data):,}; {_ADVICE}"
            )
