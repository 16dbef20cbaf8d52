"""Weights and biases of a model's base, read for the few adapters whose arithmetic they are part of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy knows the name "bfloat16" only after this import)
import numpy as np
import onnx

from adapterx.adapter import Array
from adapterx.base_weight import read_weight
from adapterx.errors import ModelError
from adapterx.external_data import external_tensors
from adapterx.manifest import SiteBase


class BaseTensors:
    """Constants of one model by name; nothing is read before it is asked for, and nothing is kept.

    Args:
        graph: the proto without external weights
        folder: where external data lies
        where: what messages call the model
    """

    def __init__(self, graph: onnx.ModelProto, folder: Path | None, where: str) -> None:
        self._protos = {tensor.name: tensor for tensor in _constants(graph.graph)}
        self._folder, self._where = folder, where

    def weight(self, base: SiteBase) -> Array:
        """The base's weight, ``[d_out, d_in]`` in float32 (a convolution's kernel is part of ``d_in``).

        Raises:
            ValueError: the manifest does not say how it is stored.
        """
        if base.weight is None:
            raise ValueError("the base weight, which its arithmetic needs, cannot be read from this model")
        return read_weight(base.weight, self.tensor).T

    def bias(self, base: SiteBase) -> Array | None:
        """The base's bias, ``[d_out]``, or ``None`` when it has none."""
        return self.tensor(base.bias).reshape(-1) if base.bias else None

    def tensor(self, name: str) -> Array:
        """A constant by name. Elements of less than a byte come as the bytes that they are packed in.

        Raises:
            ModelError: there is no such constant.
        """
        found = self._protos.get(name)
        if found is None:
            raise ModelError(f"{self._where} has no constant {name!r}, which its manifest names; extract it again")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(found.data_type)
        if found.data_location != onnx.TensorProto.EXTERNAL:
            return onnx.numpy_helper.to_array(found)
        [place] = external_tensors(onnx.ModelProto(graph=onnx.GraphProto(initializer=[found])))
        assert self._folder is not None, "a model with external data has a folder"
        with (self._folder / place.location).open("rb", buffering=0) as file:
            file.seek(place.offset)
            raw = np.fromfile(file, np.uint8, place.length)
        whole = place.length == int(np.prod(found.dims)) * np.dtype(dtype).itemsize and "int4" not in str(dtype)
        return raw.view(dtype).reshape(found.dims) if whole else raw


def _constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    graphs = [graph]
    for inner in graphs:
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                graphs += [attribute.g] * attribute.HasField("g") + list(attribute.graphs)
                if node.op_type == "Constant" and attribute.name == "value":
                    named = onnx.TensorProto()
                    named.CopyFrom(attribute.t)
                    named.name = node.output[0]
                    yield named
