"""Read what a session must know of a model before ONNX Runtime opens it: its graph, its manifest, its folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # protobuf ships no types

from adapterx.adapter import Adapter
from adapterx.errors import ModelError, OptionError
from adapterx.external_data import check_external_data, external_tensors
from adapterx.manifest import KEY, Manifest, manifest_of
from adapterx.port_dtype import AdapterDtype, check, in_dtype
from adapterx.runtime.injection import with_ports

FOLDER_OPTION = "session.model_external_initializers_file_folder_path"

ModelLike: TypeAlias = str | os.PathLike[str] | bytes | onnx.ModelProto


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that has been looked at but not opened.

    Args:
        where: what messages call it
        model: what ONNX Runtime gets: a path, so that it maps external weights, or the bytes
        graph: the proto without external weights
        manifest: what the model says of its adapters
        folder: where external data lies, ``None`` when there is none
    """

    where: str
    model: str | bytes
    graph: onnx.ModelProto
    manifest: Manifest
    folder: Path | None


def read_source(
    model: ModelLike,
    *,
    folder: str | None = None,
    adapters: Sequence[Adapter] = (),
    adapter_dtype: AdapterDtype | None = None,
) -> ModelSource:
    """Look at a model: parse the graph, check its external data, find its manifest, or give it one.

    Args:
        model: a path, the bytes of a model, or a ``ModelProto`` (which is not changed)
        folder: where the external data of bytes lies
        adapters: what a model without ports gets ports for
        adapter_dtype: of these ports at linear layers, in place of that of their activations

    Raises:
        ModelError: no such file, no ONNX model, no manifest, external data that may not be read, or bytes whose
            external data lies who knows where.
        MismatchError: ``adapters`` have sites that a model without ports has no operation for.
        OptionError: no such element type, or ports of another in the model.
    """
    # Whether ports are inputs, only the model tells.
    check(adapter_dtype, as_inputs=True)
    source = _read(model, folder, adapters, adapter_dtype)
    odd = [site for site in source.manifest.sites if in_dtype(site, adapter_dtype) != site]
    if odd:
        raise OptionError(
            f"{source.where} has ports already, and that of {odd[0].name} takes {odd[0].dtype} ({len(odd)} such); "
            f"extract or inject it with adapter_dtype={adapter_dtype!r}, or leave adapter_dtype out"
        )
    return source


def _read(
    model: ModelLike, folder: str | None, adapters: Sequence[Adapter], adapter_dtype: AdapterDtype | None
) -> ModelSource:
    if isinstance(model, (bytes, onnx.ModelProto)):
        return _from_memory(model, folder, adapters, adapter_dtype)
    path = Path(model)
    if not path.is_file():
        raise ModelError(f"{path}: no such model file")
    graph = _parsed(path.read_bytes(), str(path))
    if adapters and not _has_ports(graph):
        return _injected(path, adapters, adapter_dtype, str(path))
    manifest = _manifest(graph, str(path))
    check_external_data(graph, path.parent, ignore=_ports(manifest), model_file=path)
    return ModelSource(str(path), str(path), graph, manifest, path.parent)


def _injected(
    model: Path | onnx.ModelProto, adapters: Sequence[Adapter], adapter_dtype: AdapterDtype | None, where: str
) -> ModelSource:
    graph, folder = with_ports(model, adapters, adapter_dtype=adapter_dtype)
    return ModelSource(where, graph.SerializeToString(), graph, _manifest(graph, where), folder)


def _has_ports(graph: onnx.ModelProto) -> bool:
    return any(entry.key == KEY for entry in graph.metadata_props)


def _from_memory(
    model: bytes | onnx.ModelProto,
    folder: str | None,
    adapters: Sequence[Adapter],
    adapter_dtype: AdapterDtype | None,
) -> ModelSource:
    where = "the model in memory"
    try:
        content = model if isinstance(model, bytes) else model.SerializeToString()
    except ValueError as error:
        raise ModelError(f"{where} cannot be serialized ({error}); save it and give its path") from None
    graph = model if isinstance(model, onnx.ModelProto) else _parsed(content, where)
    if adapters and folder is None and not _has_ports(graph):
        return _injected(graph, adapters, adapter_dtype, where)
    manifest = _manifest(graph, where)
    outside = [tensor for tensor in external_tensors(graph) if tensor.location not in _ports(manifest)]
    if outside and folder is None:
        raise ModelError(
            f"{where}: tensor {outside[0].name!r} lies in the file {outside[0].location!r}, and bytes have no folder; "
            f"give the model's path, or session_options with {FOLDER_OPTION!r}"
        )
    if folder is not None:
        check_external_data(outside, Path(folder))
    return ModelSource(where, content, graph, manifest, Path(folder) if folder is not None else None)


def _parsed(content: bytes, where: str) -> onnx.ModelProto:
    try:
        graph: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except DecodeError:
        raise ModelError(f"{where} is no ONNX model: {len(content)} bytes that do not parse") from None
    if not graph.HasField("graph"):
        raise ModelError(f"{where} is no ONNX model: {len(content)} bytes without a graph")
    return graph


def _manifest(graph: onnx.ModelProto, where: str) -> Manifest:
    manifest = manifest_of({entry.key: entry.value for entry in graph.metadata_props}, where=where)
    if manifest is None:
        raise ModelError(
            f"{where} has no ports for adapters; run `adapterx extract` on an export with an adapter inside, "
            "`adapterx inject` on one without, and open the model that it writes; or give a path and adapters together"
        )
    return manifest


def _ports(manifest: Manifest) -> frozenset[str]:
    location = manifest.location if manifest.port == "external" else None
    return frozenset([location] if location is not None else [])
