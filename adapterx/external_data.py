"""Is the external data of a model safe to open? Answered from the small graph proto, before anyone reads a weight.

ONNX Runtime before 1.24 follows ``../x`` and absolute paths, ``onnx.load`` refuses what Hugging Face's cache looks
like, and neither names the tensor. So the rule is here, once, for every reader.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
import onnx

from adapterx.errors import ModelError

_SHOWN = 10
_BITS = {
    **dict.fromkeys((onnx.TensorProto.INT4, onnx.TensorProto.UINT4, onnx.TensorProto.FLOAT4E2M1), 4),
    **{getattr(onnx.TensorProto, name): 2 for name in ("INT2", "UINT2") if hasattr(onnx.TensorProto, name)},
}


class ExternalTensor(NamedTuple):
    """Where a tensor's bytes lie: ``length`` bytes from ``offset`` in the file ``location``."""

    name: str
    location: str
    offset: int
    length: int


def check_external_data(
    model: onnx.ModelProto | Iterable[ExternalTensor | tuple[str, str, int, int]],
    folder: Path,
    *,
    ignore: frozenset[str] = frozenset(),
    model_file: Path | None = None,
) -> None:
    """Every external tensor must lie whole in a regular file below the model's folder.

    A location is relative, without ``..``, and its resolved file lies inside ``folder``. One way out is accepted:
    Hugging Face's cache, where the model file and its data file are both links into one directory of blobs.

    Hard links are accepted. Our own extraction hard-links gigabytes instead of copying them, and a hard link cannot
    be told from the file itself, nor be made to a file that its maker could not already name on that filesystem.

    The check looks at names and sizes, and a writer of the folder can change both afterwards: it protects from
    models made by strangers, not from strangers who write to your disk.

    Args:
        model: a graph proto without its weights, or ``(name, location, offset, length)`` rows
        folder: the folder that locations are relative to
        ignore: locations that are allowed not to exist and are not looked at (those of external adapter ports)
        model_file: the model's path as the user gave it, needed only to recognise Hugging Face's cache

    Raises:
        ModelError: naming tensor, file and cause, all faults at once.

    Example:
        >>> check_external_data([("W", "../secret", 0, 4)], Path("."))
        Traceback (most recent call last):
        adapterx.errors.ModelError: external data may not be read:
          W: '../secret' leaves the model's folder
    """
    rows = external_tensors(model) if isinstance(model, onnx.ModelProto) else map(ExternalTensor._make, model)
    files: dict[str, int | str] = {}
    faults: dict[str, str] = {}
    for row in rows:
        if row.location in ignore:
            continue
        if row.location not in files:
            files[row.location] = _size_or_fault(row.location, folder, model_file)
        size = files[row.location]
        fault = size if isinstance(size, str) else _range_fault(row, size)
        if fault:
            faults.setdefault(row.location, f"{row.name}: {row.location!r} {fault}")
    if faults:
        lines = list(faults.values())
        more = [f"and {len(lines) - _SHOWN} more files"] if len(lines) > _SHOWN else []
        raise ModelError("\n  ".join(["external data may not be read:", *lines[:_SHOWN], *more]))


def external_tensors(model: onnx.ModelProto) -> Iterator[ExternalTensor]:
    """All tensors of a model whose bytes lie in another file, subgraphs and functions included.

    Raises:
        ModelError: an offset or length that is no number, or a length that is not that of the tensor's shape.
    """
    return map(_external, external_protos(model))


def external_protos(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensor messages themselves of :func:`external_tensors`, so that a caller can point them elsewhere."""
    return (tensor for tensor in _tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL)


def _external(tensor: onnx.TensorProto) -> ExternalTensor:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    expected = _nbytes(tensor)
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", str(expected)))
    except ValueError:
        raise ModelError(f"{tensor.name}: offset and length of external data must be integers; got {entries}") from None
    if length != expected:
        raise ModelError(
            f"{tensor.name}: external data of {length} bytes, but its shape {list(tensor.dims)} takes {expected}"
        )
    return ExternalTensor(tensor.name, entries.get("location", ""), offset, length)


def _nbytes(tensor: onnx.TensorProto) -> int:
    try:
        bits = _BITS.get(tensor.data_type) or 8 * _itemsize(tensor.data_type)
    except KeyError:
        raise ModelError(f"{tensor.name}: element type {tensor.data_type} cannot lie in external data") from None
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"{tensor.name}: negative dimension in {list(tensor.dims)}")
    return (math.prod(int(dim) for dim in tensor.dims) * bits + 7) // 8


def _itemsize(data_type: int) -> int:
    return int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(data_type)).itemsize)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    # A stack, not recursion: how deep subgraphs nest is the model's choice.
    graphs, nodes = [model.graph], [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            sparse_tensors = [
                *attribute.sparse_tensors,
                *([attribute.sparse_tensor] * attribute.HasField("sparse_tensor")),
            ]
            for sparse in sparse_tensors:
                yield from (sparse.values, sparse.indices)
            graphs.extend([attribute.g] * attribute.HasField("g"))
            graphs.extend(attribute.graphs)


def _size_or_fault(location: str, folder: Path, model_file: Path | None) -> int | str:
    if not location or "\0" in location:
        return "is no file name"
    # A model is written on one system and read on another: what either takes for a way out is one.
    for path in (PurePosixPath(location), PureWindowsPath(location)):
        if path.is_absolute() or path.anchor:
            return "is absolute; it must be relative to the model's folder"
        if ".." in path.parts:
            return "leaves the model's folder"
    file = folder / location
    try:
        real = file.resolve(strict=True)
        info = real.stat()
    except (OSError, RuntimeError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be opened ({error})"
        return f"{reason} in {folder}"
    if not real.is_relative_to(folder.resolve()) and not _same_blobs(file, real, model_file):
        return f"is a link that leaves the model's folder, to {real}"
    if not stat.S_ISREG(info.st_mode):
        return "is not a regular file"
    return info.st_size


def _same_blobs(file: Path, real: Path, model_file: Path | None) -> bool:
    if model_file is None or not (file.is_symlink() and model_file.is_symlink()):
        return False
    return real.parent == model_file.resolve().parent


def _range_fault(row: ExternalTensor, size: int) -> str:
    if row.offset < 0 or row.length < 0:
        return f"has a negative offset or length ({row.offset}, {row.length})"
    end = row.offset + row.length
    return f"is too short: {end} bytes are needed, it has {size}" if end > size else ""
