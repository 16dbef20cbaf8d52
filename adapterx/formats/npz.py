"""``.npz``: a zip archive of npy arrays, as ``numpy.savez`` writes it. `docs/formats.md` says what we take of it.

numpy has no bfloat16: such a tensor is stored as two-byte voids (``<V2``), which is what ``numpy.savez`` makes of an
``ml_dtypes.bfloat16`` array too. ``array.view(ml_dtypes.bfloat16)`` brings it back.
"""

from __future__ import annotations

import os
import re
import struct
from typing import Any

import ml_dtypes
import numpy as np

from adapterx.adapter import Adapter, Array
from adapterx.atomic import atomic_write
from adapterx.errors import FormatError
from adapterx.formats.detect import PICKLE_ADVICE
from adapterx.formats.dtypes import NAMES
from adapterx.formats.file_bytes import FileBytes
from adapterx.formats.tensor_table import TensorTable, tensors_to_write
from adapterx.formats.zip_members import archive, content, members
from adapterx.limits import Limits

_MAGIC = b"\x93NUMPY"
_BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
_DESCR = {np.dtype(np.float32): "<f4", np.dtype(np.float16): "<f2", _BFLOAT16: "<V2"}

# numpy itself evaluates this text as Python; every writer spells it like this.
_HEADER = re.compile(
    r"\{\s*'descr':\s*'([^']{2,8})',\s*'fortran_order':\s*(True|False),\s*'shape':\s*\(([0-9L, ]{0,200})\),?\s*\}\s*"
)
_NUMBERS = re.compile(r"[<>|=]?(?:f[248]|[iu][1248]|b1)")
_ALIGNMENT = 64
_ADVICE = "The file is broken: download or export it again."

# A zip archive counts its bytes in 32 bits.
_LARGEST = 2**32 - 2


def read(file: FileBytes, limits: Limits) -> TensorTable:
    """The arrays of an npz file: views of the file's one buffer where they are stored, inflated copies otherwise.

    Raises:
        FormatError: see :func:`adapterx.formats.zip_members.members`; a member that is no npy array, holds objects,
            or says another size than it has.
    """
    where = str(file.path)
    data = file.whole()
    arrays: dict[str, Array] = {}
    for member in members(data, where=where, limits=limits):
        if member.name.endswith(".pkl"):
            raise FormatError(f"{where}: {PICKLE_ADVICE}")
        if not member.name.endswith(".npy"):
            raise FormatError(f"{where}: the member {member.name!r} is no .npy array; {_ADVICE}")
        name = member.name.removesuffix(".npy")
        arrays[name] = _array(content(data, member, where), f"{where}: {name}", limits)
    return TensorTable(where, arrays)


def write(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write ``adapter``, uncompressed; equal adapters give equal bytes.

    Raises:
        FormatError: an element type that npz cannot hold (float8), over 4 GB, or a rank of 0.
    """
    pieces: list[tuple[str, list[memoryview | bytes]]] = []
    total = 0
    for name, array in tensors_to_write(adapter.sites, str(path)):
        descr = _DESCR.get(array.dtype)
        if descr is None:
            raise FormatError(f"{path}: {name} is {array.dtype}, which npz cannot hold; write .safetensors")
        total += array.nbytes + 4 * len(name) + 512
        pieces.append((f"{name}.npy", [_npy_header(descr, array), array.reshape(-1).view(np.uint8).data]))
    if total > _LARGEST or len(pieces) >= 0xFFFF:
        raise FormatError(f"{path}: {len(pieces)} tensors in {total:,} bytes are too much for npz; write .safetensors")
    atomic_write(path, archive(pieces, alignment=_ALIGNMENT))


def _npy_header(descr: str, array: Array) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {array.shape}, }}".encode()
    padding = -(len(_MAGIC) + 4 + len(text) + 1) % _ALIGNMENT
    text += b" " * padding + b"\n"
    return _MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text


def _array(data: memoryview, where: str, limits: Limits) -> Array:
    """The array that the bytes of an npy file are, as a read-only view."""
    if bytes(data[:6]) != _MAGIC or len(data) < 12:
        raise FormatError(f"{where}: expected an npy array, it begins with {bytes(data[:6])!r}; {_ADVICE}")
    wide = data[6] >= 2
    (length,) = struct.unpack_from("<I" if wide else "<H", data, 8)
    start = (12 if wide else 10) + length
    match = _HEADER.fullmatch(bytes(data[start - length : start]).decode("latin-1")) if length <= 4096 else None
    if match is None:
        raise FormatError(f"{where}: its npy header is not that of a plain array; {_ADVICE}")
    descr, fortran, sizes = match.groups()
    shape = tuple(int(size.strip(" L")) for size in sizes.split(",") if size.strip(" L"))
    if len(shape) > limits.ndim:
        raise FormatError(f"{where}: it has {len(shape)} dimensions, at most {limits.ndim} are read")
    dtype = _dtype(descr, where)
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if expected != len(data) - start or not expected:
        raise FormatError(
            f"{where}: shape {shape} of {descr} takes {expected:,} bytes, there are {max(len(data) - start, 0):,}"
        )
    array: Array = np.ndarray(shape, dtype, buffer=data, offset=start, order="F" if fortran == "True" else "C")
    array.flags.writeable = False
    return array


def _dtype(descr: str, where: str) -> np.dtype[Any]:
    if descr.endswith("V2") and descr[0] in "<|":
        return _BFLOAT16
    if "O" in descr:
        raise FormatError(f"{where}: it holds Python objects, which are code; nothing was read")
    if not _NUMBERS.fullmatch(descr):
        raise FormatError(f"{where}: its element type is {descr!r}, expected one of {NAMES}")
    return np.dtype(descr)
