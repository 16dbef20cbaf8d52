"""Open a model for rewriting: the graph in memory, external weights left where they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from adapterx.errors import ModelError
from adapterx.external_data import check_external_data, external_tensors
from adapterx.graph.quantizer_names import unquantized
from adapterx.graph.view import MICROSOFT, STANDARD
from adapterx.graph.weights import moved
from adapterx.manifest import manifest_of

_SMALL = 1024
_LAYER_NORM_SINCE = 17
LOCATION = "adapterx.location"

ModelLike: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | ir.Model


def load_model(model: ModelLike) -> ir.Model:
    """``model`` as an ``onnx_ir.Model`` of our own: what the caller holds is never changed.

    Args:
        model: a path (external data is checked, not read), a ``ModelProto`` without external data, or an
            ``onnx_ir.Model`` (cloned; its tensors are shared)

    Raises:
        ModelError: not an ONNX model, broken (unsorted, not SSA, unknown operators), newer than the installed
            ``onnx``, or with external data that is missing, short, or outside the model's folder.
    """
    if isinstance(model, ir.Model):
        return model.clone()
    if isinstance(model, onnx.ModelProto):
        first = next(external_tensors(model), None)
        if first is not None:
            raise ModelError(
                f"tensor {first.name!r} lies in external file {first.location!r}, and a ModelProto does not say in "
                "which folder; give the model's path, or load it with its external data"
            )
        return _deserialized(model, "the model", None)
    path = Path(model)
    proto = read_proto(path)
    _refuse_unsafe(proto, path)
    return _deserialized(proto, str(path), path.parent)


def read_proto(path: Path) -> onnx.ModelProto:
    """The graph of a model file, without the weights that lie in other files."""
    if not path.is_file():
        met = "a folder" if path.is_dir() else "no regular file" if path.exists() else "nothing"
        raise ModelError(f"{path}: expected an ONNX file, found {met} there")
    try:
        return onnx.load(path, load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read as an ONNX model ({error})") from None


def _refuse_unsafe(proto: onnx.ModelProto, path: Path) -> None:
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    manifest = manifest_of(metadata, where=str(path))
    ours = frozenset() if manifest is None or manifest.location is None else frozenset({manifest.location})
    check_external_data(proto, path.parent, ignore=ours, model_file=path)


def _deserialized(proto: onnx.ModelProto, where: str, folder: Path | None) -> ir.Model:
    if not proto.HasField("graph"):
        raise ModelError(f"{where} cannot be read as an ONNX model (it has no graph)")
    try:
        _check(proto, where)
    except ModelError:
        reordered = _input_casts_first(proto)
        if reordered is None:
            raise
        _check(reordered, where)
        proto = reordered
    try:
        model = ir.from_proto(proto)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{where} cannot be read as an ONNX model ({error})") from None
    _keep_what_was_said(model, proto)
    if folder is not None:
        ir.external_data.set_base_dir(model.graph, folder)
        _through_links(model, folder)
    return model


def _keep_what_was_said(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Let codes have the metadata of the weight that they stand for.

    Quantizers leave the metadata under the name of the tensor that they took out, where ``onnx_ir`` does not see it.
    """
    said = {info.name: {e.key: e.value for e in info.metadata_props} for info in proto.graph.value_info}
    for name, value in model.graph.initializers.items():
        if (before := unquantized(name)) != name:
            value.metadata_props.update(said.get(before, {}))


def _input_casts_first(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy with the casts of inputs in front, or ``None`` where they are already.

    ONNX Runtime's float16 converter writes them last, which ONNX forbids and ONNX Runtime runs.
    """
    inputs = {value.name for value in proto.graph.input}
    late = {i for i, node in enumerate(proto.graph.node) if node.op_type == "Cast" and node.input[0] in inputs}
    if late == set(range(len(late))):
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.node[:]
    copy.graph.node.extend(proto.graph.node[i] for i in sorted(late))
    copy.graph.node.extend(node for i, node in enumerate(proto.graph.node) if i not in late)
    return copy


def _through_links(model: ir.Model, folder: Path) -> None:
    """Let tensors in linked files (Hugging Face's cache, checked before) read the file behind the link.

    ``onnx_ir`` refuses every link. The name that the model knows the file by is kept in the tensor's ``meta``.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if not isinstance(tensor, ir.ExternalTensor) or not (folder / tensor.location).is_symlink():
                continue
            real = (folder / tensor.location).resolve()
            behind = moved(tensor, real.name, real.parent)
            behind.meta[LOCATION] = str(tensor.location)
            value.const_value = behind


def check_model(model: ir.Model, where: str) -> None:
    """``onnx.checker`` on a model that we made, of any size: weights do not take part."""
    bare = model.clone()
    for graph in bare.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.nbytes > _SMALL:
                dtype = value.const_value.dtype
                value.const_value = ir.Tensor(np.zeros(0, dtype.numpy()), dtype=dtype, name=value.name)
    _check(ir.to_proto(bare), where)


def _check(proto: onnx.ModelProto, where: str) -> None:
    """``onnx.checker`` on the graph alone: it would open external files, by rules that are not ours."""
    known = onnx.defs.onnx_opset_version()
    if _opset(proto) > known:
        raise ModelError(
            f"{where} uses opset {_opset(proto)}; onnx {onnx.__version__} knows opsets up to {known}. "
            "Install a newer onnx, or export for an older opset"
        )
    try:
        with _external_as_empty(proto), _ort_operators_as_theirs(proto):
            onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"{where} is not a valid ONNX model: {str(error).strip()}") from None


def _opset(proto: onnx.ModelProto) -> int:
    return max((entry.version for entry in proto.opset_import if entry.domain in STANDARD), default=1)


@contextlib.contextmanager
def _external_as_empty(proto: onnx.ModelProto) -> Iterator[None]:
    """Empty tensors of the same name and type stand in for external ones."""
    external = [t for graph in _graphs(proto.graph) for t in graph.initializer if t.data_location == t.EXTERNAL]
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in external]
    for tensor in external:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.ClearField("dims")
        tensor.dims.append(0)
    try:
        yield
    finally:
        for tensor, original in zip(external, kept, strict=True):
            tensor.CopyFrom(original)


@contextlib.contextmanager
def _ort_operators_as_theirs(proto: onnx.ModelProto) -> Iterator[None]:
    """ONNX Runtime keeps a few operators in the standard domain that ONNX does not know there; its tools write them."""
    old = _opset(proto) < _LAYER_NORM_SINCE
    theirs = {"SimplifiedLayerNormalization"} | ({"LayerNormalization"} if old else set())
    nodes = [n for graph in _graphs(proto.graph) for n in graph.node if n.op_type in theirs and n.domain in STANDARD]
    imported = any(entry.domain == MICROSOFT for entry in proto.opset_import)
    for node in nodes:
        node.domain = MICROSOFT
    if nodes and not imported:
        proto.opset_import.add(domain=MICROSOFT, version=1)
    try:
        yield
    finally:
        for node in nodes:
            node.domain = ""
        if nodes and not imported:
            del proto.opset_import[-1]


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    graphs = [graph]
    for inner in graphs:
        for node in inner.node:
            for attribute in node.attribute:
                graphs += [attribute.g] * attribute.HasField("g") + list(attribute.graphs)
    return graphs
