"""Write a rewritten model beside its weights: data files first, the small graph last, each whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import onnx_ir as ir

from adapterx.atomic import atomic_write, copy_file, replacing
from adapterx.errors import ModelError
from adapterx.graph.load import LOCATION, ModelLike
from adapterx.graph.weights import moved
from adapterx.progress import progress

# Below this a copy costs less than a tenth of a second, and spares the reader the trap of hard links (see `_place`).
LINK_FROM_BYTES = 64 << 20
_INLINE_LIMIT = 1_900_000_000
_EXTERNAL_FROM_BYTES = 1024
_ALIGNMENT = 4096
_FICLONE = 0x40049409  # linux/fs.h


def target_of(model: ModelLike, folder: Path) -> Path:
    """Where what is made of ``model`` goes: into ``folder``, under the model's own file name.

    Raises:
        ModelError: that is the model itself, or ``folder`` is a file.
    """
    path = folder / (Path(model).name if isinstance(model, str | os.PathLike) else "model.onnx")
    if isinstance(model, str | os.PathLike) and path.exists() and path.samefile(model):
        raise ModelError(f"{path} is the model itself; write into another folder")
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder} is a file; expected a folder to write into")
    return path


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write into; when the block ends well its files move to ``folder``, a model after all that it names.

    When the block fails, ``folder`` is as it was, files of an earlier extraction included.
    """
    stage = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=folder))
    try:
        yield stage
        for file in sorted(filter(Path.is_file, stage.rglob("*")), key=lambda file: file.suffix == ".onnx"):
            target = folder / file.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def save_model(
    model: ir.Model,
    path: Path,
    stage: Path,
    *,
    ours: str | None,
    share_weights: bool,
    written: Collection[str] = (),
    beside: Path | None = None,
) -> None:
    """Save ``model`` with all the data files that it names.

    Args:
        model: external tensors still point at their source folder
        path: where the graph will be; data files go beside it under the locations that the model has
        stage: where to write for now
        ours: a location that is not to be written (adapter ports), or ``None``
        share_weights: put inline weights into a data file too, so that several sessions can map one copy of them
        written: locations that are in the stage already
        beside: a folder whose data files the model may go on using, when it is the model's own

    Raises:
        ModelError: two sources for one file name, or a target that is the source.
        OSError: the disk is full, no permission.
    """
    sources = _sources(model, ours)
    for location, source in sources.items():
        if location in written:
            continue
        if (path.parent / location).resolve() == source.resolve():
            if beside is not None and path.parent.resolve() == beside.resolve():
                continue
            raise ModelError(f"{source} is the source's own data file; extract into another folder")
        _place(source.resolve(), stage / location)
    name_as_placed(model)
    if share_weights or sum(tensor.nbytes for tensor in _inline(model)) > _INLINE_LIMIT:
        _externalize(model, stage / _fresh(f"{path.name}.data", sources))
    atomic_write(stage / path.name, ir.to_proto(model).SerializeToString())


def name_as_placed(model: ir.Model) -> None:
    """Let tensors that were read from behind a link point at the file by the name that it has beside the model."""
    for value in _initializers(model):
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and LOCATION in tensor.meta:
            value.const_value = moved(tensor, tensor.meta[LOCATION], str(tensor.base_dir))


def _sources(model: ir.Model, ours: str | None) -> dict[str, Path]:
    """Location -> the file that holds its bytes now."""
    found: dict[str, Path] = {}
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) != ours:
            location = str(tensor.meta.get(LOCATION, tensor.location))
            file = Path(tensor.base_dir) / tensor.location
            if found.setdefault(location, file) != file:
                raise ModelError(f"external data {location!r} comes from two folders: {found[location]} and {file}")
    return found


def _place(source: Path, target: Path) -> None:
    """Bring a data file to ``target``: by copy when it is small, else sharing its blocks or by a second name for it.

    ``onnx.load`` refuses external data that has a second hard link (ONNX Runtime does not mind), so only files for
    which a copy would be felt are linked, and only where they cannot be cloned.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size >= LINK_FROM_BYTES and (_cloned(source, target) or _linked(source, target)):
        return
    copy_file(source, target, description=f"copying {target.name}")


def _cloned(source: Path, target: Path) -> bool:
    """A file of its own that shares the source's blocks, where the file system can (btrfs, xfs)."""
    if sys.platform != "linux":
        return False
    import fcntl  # noqa: PLC0415 - not on every system

    try:
        with source.open("rb") as origin, replacing(target) as copy:
            fcntl.ioctl(copy.fileno(), _FICLONE, origin.fileno())
    except OSError:
        return False
    return True


def _linked(source: Path, target: Path) -> bool:
    try:
        target.hardlink_to(source)
    except OSError:
        # Another file system, or one without hard links, or not our file: copy instead.
        return False
    return True


def _externalize(model: ir.Model, data: Path) -> None:
    """Move inline weights into ``data``, one after another, where there are any worth it."""
    tensors = [value for value in _initializers(model) if _worth(value)]
    if not tensors:
        return
    total = sum(value.const_value.nbytes for value in tensors if value.const_value is not None)
    placed: list[tuple[ir.Value, ir.ExternalTensor]] = []
    with replacing(data) as file, progress(f"writing {data.name}", total) as advance:
        for value in tensors:
            tensor = value.const_value
            assert tensor is not None, "_worth looked at it"
            offset = -file.tell() % _ALIGNMENT + file.tell()
            file.seek(offset)
            raw = tensor.tobytes()
            file.write(raw)
            advance(len(raw))
            external = ir.ExternalTensor(
                data.name,
                offset,
                len(raw),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=data.parent,
            )
            placed.append((value, external))
    for value, external in placed:
        value.const_value = external


def _worth(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.dtype == ir.DataType.STRING:
        return False
    return tensor.nbytes >= _EXTERNAL_FROM_BYTES and not value.is_graph_input()


def _fresh(name: str, taken: dict[str, Path]) -> str:
    while name in taken:
        name = f"{name}.inline"
    return name


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _inline(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    return (tensor for tensor in _tensors(model) if not isinstance(tensor, ir.ExternalTensor))


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for value in _initializers(model):
        if value.const_value is not None:
            yield value.const_value
    for graph in model.graphs():
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    yield attribute.as_tensor()
