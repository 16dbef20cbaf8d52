"""A copy of a checkpoint in which some tensors are others: same files, same order, everything else byte for byte."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapterx.atomic import Buffer, atomic_write, copy_around, copy_file, new_folder
from adapterx.formats.checkpoint import CONFIG, INDEX_SUFFIX, Checkpoint, header_bytes
from adapterx.progress import progress

# Weights in other formats, which would still be those of the base.
_NOT_COPIED = (
    *(".safetensors", INDEX_SUFFIX, ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"),
    *(".h5", ".msgpack", ".onnx", ".onnx.data", ".gguf", ".ot", ".tflite"),
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class NewTensor:
    """A tensor that is not copied.

    Args:
        name: where the checkpoint has this name, the tensor takes its place in its file; else it is added
        dtype: element type; that of the one it replaces
        shape: likewise
        pieces: its bytes, in order
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Buffer]]

    @property
    def nbytes(self) -> int:
        """Size of the content."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_copy(base: Checkpoint, tensors: Sequence[NewTensor], target: Path, *, config: Mapping[str, Any]) -> None:
    """Write ``base`` with ``tensors`` in it to the folder ``target``, whole or not at all.

    Args:
        base: what is copied, with the files beside it that are no weights
        tensors: what is new
        target: an empty folder, or nothing
        config: content of ``config.json``; copied as it is where it is that of ``base``

    Raises:
        OSError: no permission, disk full.
    """
    added = [tensor for tensor in tensors if tensor.name not in base.tensors]
    last = list(base.headers)[-1]
    total = sum((base.folder / file).stat().st_size for file in base.headers) + sum(tensor.nbytes for tensor in added)
    with new_folder(target) as stage, progress(f"writing {target.name}", total) as advance:
        for file in base.headers:
            replaced = [t for t in tensors if t.name in base.tensors and base.tensors[t.name].file == file]
            _write_file(base, stage / file, replaced, added if file == last else [], advance)
        if base.index:
            _write_index(base, stage, dict.fromkeys([t.name for t in added], last), sum(t.nbytes for t in added))
        for path in sorted(base.folder.iterdir()):
            if path.is_file() and not path.name.endswith(_NOT_COPIED) and not path.name.startswith("."):
                copy_file(path, stage / path.name, description=f"copying {path.name}")
        if config != base.config:
            atomic_write(stage / CONFIG, json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")


def _write_file(
    base: Checkpoint,
    target: Path,
    replaced: Sequence[NewTensor],
    added: Sequence[NewTensor],
    advance: Callable[[int], object],
) -> None:
    source, header = base.folder / target.name, base.headers[target.name]
    shift, holes, head = 0, [(base.tensors[t.name].first, base.tensors[t.name].last) for t in replaced], b""
    if added:
        table = {name: (dtype, shape) for name, dtype, shape, _, _ in header.entries}
        head = header_bytes({**table, **{t.name: (t.dtype, t.shape) for t in added}}, header.metadata)
        shift = len(head) - header.start
        holes.append((0, header.start))
    with copy_around(source, target, holes, advance=advance, shift=shift) as file:
        file.seek(0)
        file.write(head)
        for tensor in replaced:
            file.seek(base.tensors[tensor.name].first + shift)
            _fill(file.write, tensor, advance)
        file.seek(source.stat().st_size + shift)
        for tensor in added:
            _fill(file.write, tensor, advance)


def _fill(write: Callable[[Buffer], int], tensor: NewTensor, advance: Callable[[int], object]) -> None:
    done = 0
    for piece in tensor.pieces():
        done += write(piece)
        advance(len(piece))
    assert done == tensor.nbytes, f"{tensor.name} is written whole"


def _write_index(base: Checkpoint, stage: Path, added: Mapping[str, str], nbytes: int) -> None:
    if not added:
        copy_file(base.folder / base.index, stage / base.index)
        return
    index = json.loads((base.folder / base.index).read_bytes())
    index["weight_map"] |= added
    total = index.get("metadata", {}).get("total_size")
    if isinstance(total, int):
        index["metadata"]["total_size"] = total + nbytes
    atomic_write(stage / base.index, json.dumps(index, indent=2).encode() + b"\n")
