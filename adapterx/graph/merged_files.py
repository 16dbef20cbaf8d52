"""Data files with merged weights in them: everything else is copied as it is, nothing is in memory whole."""

from __future__ import annotations

import dataclasses
import errno
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from adapterx.adapter import Array
from adapterx.ahead import ahead
from adapterx.atomic import copy_around
from adapterx.base_weight import WEIGHT
from adapterx.errors import ModelError
from adapterx.graph.load import LOCATION
from adapterx.graph.merge_edits import Edit
from adapterx.graph.stored import packed_dtype
from adapterx.kinds.merged_rows import Loss, merged_rows
from adapterx.merge_table import MergeRow
from adapterx.progress import progress
from adapterx.weight_rows import row_blocks, row_span

_ALIGNMENT = 64


def write_merged(model: ir.Model, edits: Sequence[Edit], path: Path, stage: Path) -> tuple[list[MergeRow], set[str]]:
    """Compute every edit. Weights that lie in data files are written to copies of them in ``stage``.

    Args:
        model: whose values the edits name; its tensors then point at the copies
        edits: what is rewritten
        path: where the model will be
        stage: where to write for now

    Returns:
        A row for each edit, and the locations of the copies.

    Raises:
        ModelError: merged numbers do not fit their type.
        OSError: no permission, disk full.
    """
    by_file: dict[Path | None, list[Edit]] = defaultdict(list)
    for edit in edits:
        by_file[_file(edit.sources[edit.ref.tensors[WEIGHT]])].append(edit)
    rows = [_in_memory(edit) for edit in by_file.pop(None, [])]
    names = _locations(model, [file for file in by_file if file is not None], path)
    total = sum(file.stat().st_size for file in names)
    with progress(f"merging into {path.name}", total) as advance:
        for file, members in by_file.items():
            assert file is not None, "it was taken out"
            members.sort(key=lambda edit: _offset(edit.sources[edit.ref.tensors[WEIGHT]]))
            rows += _rewrite(model, members, _Copy(file, stage, names[file]), advance)
    return rows, set(names.values())


def _file(tensor: ir.TensorProtocol) -> Path | None:
    return Path(tensor.base_dir) / tensor.location if isinstance(tensor, ir.ExternalTensor) else None


def _offset(tensor: ir.TensorProtocol) -> int:
    return (tensor.offset or 0) if isinstance(tensor, ir.ExternalTensor) else 0


def _locations(model: ir.Model, files: Sequence[Path], path: Path) -> dict[Path, str]:
    """A name beside ``path`` for the copy of each file: never one that has another content there."""
    known: dict[Path, str] = {}
    for value in _initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            known[Path(tensor.base_dir) / tensor.location] = str(tensor.meta.get(LOCATION, tensor.location))
    wanted = {file: known[file] if len(files) > 1 else f"{path.name}.data" for file in files}
    kept = {name for file, name in known.items() if file not in wanted}
    sources = {file.resolve() for file in known}
    found = {}
    for file, name in wanted.items():
        while name in kept or (path.parent / name).resolve() in sources:
            name = str(Path(name).with_name(f"{path.stem}.{Path(name).name}"))  # noqa: PLW2901 - looked for until free
        found[file] = name
        kept.add(name)
    return found


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


# -- Weights inside the model -----------------------------------------------------------------------------------------


def _in_memory(edit: Edit) -> MergeRow:
    tensors = {name: _bytes(tensor) for name, tensor in edit.sources.items()}
    results = {name: bytearray(content) for name, content in tensors.items()}

    def write(name: str, span: slice, content: Array) -> None:
        results[name][span] = content.reshape(-1).view(np.uint8).data

    row = _merge(edit, lambda name, span: tensors[name][span], write)
    for name, content in results.items():
        _hold(edit.targets[name], edit.sources[name], content)
    return row


def _bytes(tensor: ir.TensorProtocol) -> memoryview:
    return memoryview(tensor.tobytes())


def _hold(target: ir.Value, source: ir.TensorProtocol, content: bytearray) -> None:
    """Let ``target`` be ``content``, with the type and shape of ``source``."""
    shape = tuple(int(dim) for dim in source.shape.numpy())
    array = np.frombuffer(content, packed_dtype(source.dtype))
    if source.dtype.bitwidth < 8:
        target.const_value = ir.PackedTensor(array, source.dtype, shape=ir.Shape(shape), name=target.name)
    else:
        target.const_value = ir.Tensor(array.reshape(shape), source.dtype, name=target.name)


_Read = Callable[[str, slice], memoryview]
_Write = Callable[[str, slice, Array], None]


def _merge(edit: Edit, read: _Read, write: _Write) -> MergeRow:
    """Read and write one weight block by block; names are those of ``edit.ref``. Reading is in another thread."""
    roles = {name: role for role, name in edit.ref.tensors.items()}
    nbytes = {role: edit.sources[name].nbytes for name, role in roles.items()}
    loss = Loss() if edit.ref.quantized else None

    def merged(rows: slice) -> dict[str, tuple[slice, Array]]:
        spans = {name: row_span(edit.ref, role, nbytes[role], rows) for name, role in roles.items()}
        held = {name: np.frombuffer(read(name, span), _dtype(edit, name)) for name, span in spans.items()}
        result = merged_rows(edit.ref, rows, edit.merger, held.__getitem__, keep_grid=edit.keep_grid, loss=loss)
        return {name: (spans[name], content) for name, content in result.items()}

    try:
        for block in ahead(merged, row_blocks(edit.ref, nbytes)):
            for name, (span, content) in block.items():
                write(name, span, content)
    except ValueError as fault:
        raise ModelError(f"{edit.site}: {fault}") from None
    return _row(edit, loss)


def _dtype(edit: Edit, name: str) -> np.dtype[np.generic]:
    return packed_dtype(edit.sources[name].dtype)


def _row(edit: Edit, loss: Loss | None) -> MergeRow:
    tensor = edit.ref.tensors[WEIGHT]
    if loss is None:
        return MergeRow(edit.site, tensor, edit.sources[tensor].dtype.numpy().name)
    kind = f"{'' if edit.ref.signed else 'u'}int{edit.ref.bits}"
    apart = (
        f" in blocks of {edit.ref.block_size}" if edit.ref.block_size else " by channel" * (edit.ref.axis is not None)
    )
    return MergeRow(edit.site, tensor, kind + apart, loss.change, loss.rms, loss.largest)


# -- Weights in data files --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Room:
    """Where the tensors of an edit go in the copy: by name, the first byte; what lies elsewhere is held in memory."""

    first: Mapping[str, int]
    held: Mapping[str, bytearray]


@dataclasses.dataclass(frozen=True, slots=True)
class _Copy:
    """A data file and where its copy goes: ``stage / location``."""

    source: Path
    stage: Path
    location: str


def _rewrite(model: ir.Model, edits: Sequence[Edit], file: _Copy, advance: Callable[[int], object]) -> list[MergeRow]:
    source, target = file.source, file.stage / file.location
    target.parent.mkdir(parents=True, exist_ok=True)
    end = source.stat().st_size
    rooms, holes = [], []
    for edit in edits:
        first: dict[str, int] = {}
        held: dict[str, bytearray] = {}
        for name, tensor in edit.sources.items():
            if _file(tensor) != source:
                held[name] = bytearray(_bytes(tensor))
            elif edit.targets[name].const_value is tensor and edit.targets[name].name == name:
                first[name] = _offset(tensor)
                holes.append((first[name], first[name] + tensor.nbytes))
            else:
                first[name] = end = end + -end % _ALIGNMENT
                end += tensor.nbytes
        rooms.append(_Room(first, held))
    with source.open("rb", buffering=0) as origin, copy_around(source, target, holes, advance=advance) as copy:
        rows = [_into(edit, room, origin, copy, advance) for edit, room in zip(edits, rooms, strict=True)]
    _point_at(model, file)
    for edit, room in zip(edits, rooms, strict=True):
        for name, first_byte in room.first.items():
            _lie(edit.targets[name], edit.sources[name], file, first_byte)
        for name, content in room.held.items():
            _hold(edit.targets[name], edit.sources[name], content)
    return rows


def _into(edit: Edit, room: _Room, origin: FileIO, copy: BinaryIO, advance: Callable[[int], object]) -> MergeRow:
    originals = {name: memoryview(bytes(content)) for name, content in room.held.items()}
    buffers: dict[str, memoryview] = {}

    def read(name: str, span: slice) -> memoryview:
        if name in originals:
            return originals[name][span]
        size = span.stop - span.start
        # What came of a block is in arrays of its own when the next one is read. The first is the largest.
        buffer = buffers.setdefault(name, memoryview(bytearray(size)))[:size]
        origin.seek(_offset(edit.sources[name]) + span.start)
        done = 0
        while done < size:
            got = origin.readinto(buffer[done:])
            if not got:
                raise OSError(errno.EIO, "the file became shorter while it was read", str(origin.name))
            done += got
        return buffer

    def write(name: str, span: slice, content: Array) -> None:
        raw = content.reshape(-1).view(np.uint8).data
        if name in room.held:
            room.held[name][span] = raw
            return
        copy.seek(room.first[name] + span.start)
        copy.write(raw)
        advance(len(raw))

    return _merge(edit, read, write)


def _point_at(model: ir.Model, file: _Copy) -> None:
    """Let the tensors that were not rewritten be read from the copy."""
    for value in _initializers(model):
        if value.const_value is not None and _file(value.const_value) == file.source:
            _lie(value, value.const_value, file, _offset(value.const_value))


def _lie(target: ir.Value, source: ir.TensorProtocol, file: _Copy, first: int) -> None:
    target.const_value = ir.ExternalTensor(
        file.location,
        first,
        source.nbytes,
        source.dtype,
        shape=ir.Shape(source.shape.numpy()),
        name=target.name or "",
        base_dir=str(file.stage),
    )
