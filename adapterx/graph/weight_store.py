"""Where the tensors of a rewritten model go while it is rewritten: into memory, or one by one into a new data file."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from adapterx.adapter import Array
from adapterx.atomic import replacing
from adapterx.graph.load import LOCATION

_FROM_BYTES = 1024
_ALIGNMENT = 4096
_STEP = 32 << 20


class WeightStore:
    """Makes initializers whose content goes to a data file at once, so that no two weights are in memory together.

    Args:
        file: open for writing, or ``None`` to hold everything in memory
        path: where the model will find the file
    """

    def __init__(self, file: BinaryIO | None, path: Path) -> None:
        self._file, self._path = file, path

    def initializer(
        self, graph: ir.Graph, name: str, array: Array, *, dtype: ir.DataType | None = None, shape: tuple[int, ...] = ()
    ) -> ir.Value:
        """A new initializer of ``graph``, under ``name`` made unique.

        Args:
            graph: that will hold it
            name: what it should be called
            array: its content; for a type of less than a byte the packed bytes
            dtype: where the array does not tell
            shape: of a packed tensor
        """
        unique, count = name, 1
        while unique in graph.initializers:
            unique, count = f"{name}_{count}", count + 1
        found = dtype or ir.DataType.from_numpy(array.dtype)
        dims = shape or array.shape
        value = ir.Value(name=unique, type=ir.TensorType(found), shape=ir.Shape(dims))
        value.const_value = self._held(np.ascontiguousarray(array), found, dims, unique)
        graph.register_initializer(value)
        return value

    def _held(self, array: Array, dtype: ir.DataType, dims: tuple[int, ...], name: str) -> ir.TensorProtocol:
        if self._file is not None and array.nbytes >= _FROM_BYTES:
            return self._written(array.reshape(-1).view(np.uint8).data, dtype, dims, name)
        if dtype.bitwidth < 8:
            return ir.PackedTensor(array, dtype, shape=ir.Shape(dims), name=name)
        return ir.Tensor(array, dtype=dtype, name=name)

    def _written(
        self, content: memoryview | Iterator[bytes], dtype: ir.DataType, dims: tuple[int, ...], name: str
    ) -> ir.ExternalTensor:
        assert self._file is not None, "there is a file"
        first = self._file.tell() + -self._file.tell() % _ALIGNMENT
        self._file.seek(first)
        for piece in [content] if isinstance(content, memoryview) else content:
            self._file.write(piece)
        length = self._file.tell() - first
        folder = str(self._path.parent)
        return ir.ExternalTensor(
            self._path.name, first, length, dtype, shape=ir.Shape(dims), name=name, base_dir=folder
        )

    def take_over(self, model: ir.Model, *, but: Collection[str]) -> None:
        """Bring every other weight of ``model`` into the file too, but those in files named in ``but``."""
        if self._file is None:
            return
        for value in [value for graph in model.graphs() for value in graph.initializers.values()]:
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING or value.is_graph_input():
                continue
            dims = tuple(int(dim) for dim in tensor.shape.numpy())
            name = str(value.name)
            if isinstance(tensor, ir.ExternalTensor):
                ours = Path(tensor.base_dir) / tensor.location == self._path
                if not ours and str(tensor.meta.get(LOCATION, tensor.location)) not in but:
                    value.const_value = self._written(_pieces(tensor), tensor.dtype, dims, name)
            elif tensor.nbytes >= _FROM_BYTES:
                value.const_value = self._written(memoryview(tensor.tobytes()), tensor.dtype, dims, name)


@contextlib.contextmanager
def weight_store(model: ir.Model, path: Path, stage: Path) -> Iterator[WeightStore]:
    """A store beside ``path``, in ``stage`` for now: a data file where ``model`` has any, else memory.

    Args:
        model: whose external tensors still point at their source folder
        path: where the model will be
        stage: where to write for now
    """
    sources = {
        (Path(tensor.base_dir) / tensor.location).resolve()
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    if not any(source.exists() for source in sources):
        yield WeightStore(None, stage / path.name)
        return
    name = f"{path.name}.data"
    while (path.parent / name).resolve() in sources:
        name = f"{path.stem}.{name}"
    with replacing(stage / name) as file:
        yield WeightStore(file, stage / name)
    if not (stage / name).stat().st_size:
        (stage / name).unlink()


def _pieces(tensor: ir.ExternalTensor) -> Iterator[bytes]:
    left = tensor.nbytes
    with (Path(tensor.base_dir) / tensor.location).open("rb", buffering=0) as source:
        source.seek(tensor.offset or 0)
        while left:
            piece = source.read(min(_STEP, left))
            if not piece:
                raise OSError(f"{source.name} became shorter while it was read")
            left -= len(piece)
            yield piece
