"""Models whose adapters are external initializers: one ONNX Runtime session per adapter, the base weights shared.

Each session maps the base's data file, and pages of a file are shared by all who map it, processes included. That
holds only while ONNX Runtime does not repack them, hence ``session.disable_prepacking``.

Except where that would change the numbers: ONNX Runtime multiplies block-quantized weights with activations rounded to
8 bits (``accuracy_level`` 4, the default of what it fuses from DequantizeLinear and MatMul) only after repacking them.
Such a base costs each session a copy of its weights, and gives what it gives alone. Who knows better sets the option.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

import onnx

from adapterx.adapter import Adapter, Array, tensor_name
from adapterx.errors import ModelError, OptionError
from adapterx.runtime.base_tensors import BaseTensors
from adapterx.runtime.inference import Host, ort, ort_values
from adapterx.runtime.kept import coded, exported_codes
from adapterx.runtime.kernels import KernelMode, Kernels, register_kernels
from adapterx.runtime.options import copied, entry
from adapterx.runtime.ports import port_arrays
from adapterx.runtime.relocation import relocate
from adapterx.runtime.resident import Resident
from adapterx.runtime.source import FOLDER_OPTION, ModelSource
from adapterx.site import LOW_RANK

_PREPACKING = "session.disable_prepacking"


class _Slot:
    """Where the session of one resident is kept: ``None`` before its first run and after eviction."""

    def __init__(self) -> None:
        self.building = threading.Lock()
        self.session: ort.InferenceSession | None = None
        self.used = 0


class BakedModels:
    """One session per adapter (the base counts as one), made on first use, the least recently used dropped first.

    A run holds the session that it uses, and so does a bound object: a dropped session lives until they let go.

    Args:
        source: a model in external mode
        host: providers and options of each session
        limit: sessions kept
        kernels: whether each is to have the compiled kernels

    Raises:
        ModelError: the graph lacks an initializer that its manifest names.
        OptionError: a limit below 1, or options that cannot be copied.
        MissingDependency, OptionError: as :func:`~adapterx.runtime.kernels.register_kernels`.
    """

    def __init__(self, source: ModelSource, host: Host, *, limit: int, kernels: KernelMode) -> None:
        if limit < 1:
            raise OptionError(f"max_sessions must be 1 or more; got {limit}")
        self._source = dataclasses.replace(source, model=b"")
        # Every initializer must be there in each session, whatever the manifest calls optional.
        self._manifest = dataclasses.replace(source.manifest, optional=False)
        self._ports, self._skeleton, self._folder = _dissected(source)
        tensors = BaseTensors(source.graph, source.folder, source.where)
        self._exported = exported_codes(source.manifest.kept, source.manifest.sites, tensors.tensor)
        self._host, self._limit = host, limit
        self._repacks = _counts_otherwise_when_repacked(source.graph)
        self._mode = kernels
        self._kernels = register_kernels(self._options(), providers=host.names(), mode=kernels)
        self._slots: weakref.WeakKeyDictionary[Resident, _Slot] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._clock = itertools.count(1)

    def resident(self, adapter: Adapter | None, generation: int) -> Resident:
        """Nothing is fed."""
        return Resident(adapter, generation, {})

    def values(self, _: Mapping[str, Array]) -> Mapping[str, ort.OrtValue]:
        """Nothing is fed."""
        return {}

    @property
    def kernels(self) -> Kernels | None:
        """The library that every session has, if any."""
        return self._kernels

    def session(self, resident: Resident, /) -> ort.InferenceSession:
        """The resident's session; built when it is not there, by one thread while others wait for it."""
        slot = self._slots.get(resident)
        if slot is None:
            with self._lock:
                slot = self._slots.setdefault(resident, _Slot())
        slot.used = next(self._clock)
        session = slot.session
        if session is not None:
            return session
        with slot.building:
            session = slot.session or self._built(resident.adapter)
            slot.session = session
        self._evict(slot)
        return session

    def _evict(self, newest: _Slot) -> None:
        with self._lock:
            others = [slot for slot in self._slots.values() if slot.session is not None and slot is not newest]
            others.sort(key=lambda slot: slot.used, reverse=True)
            dropped = []
            for slot in others[self._limit - 1 :]:
                dropped.append(slot.session)
                slot.session = None
        # Taking a session down takes milliseconds: it happens here, outside the lock.
        dropped.clear()

    def _built(self, adapter: Adapter | None) -> ort.InferenceSession:
        arrays = port_arrays(adapter, self._manifest)
        codes: dict[str, Array] = {}
        for site, kept in self._manifest.kept.items():
            a, b = (arrays.pop(tensor_name(site, side)) for side in LOW_RANK)
            codes |= coded(kept, a, b, self._exported)
        patch = onnx.ModelProto()
        for name, port in self._ports.items():
            tensor = patch.graph.initializer.add()
            tensor.CopyFrom(_inline(port, codes[name]) if name in codes else _of_shape(port, arrays[name].shape))
        options = self._options()
        register_kernels(options, providers=self._host.names(), mode=self._mode)
        # Applied before optimization, unlike add_initializer, so that nothing is folded over a placeholder.
        values = ort_values(arrays)
        options.add_external_initializers(list(values), list(values.values()))
        # The wire format of two messages, one after the other, is that of the two merged: the lists are joined.
        return self._host.open(self._skeleton + patch.SerializeToString(), where=self._source.where, options=options)

    def _options(self) -> ort.SessionOptions:
        options = copied(self._host.session_options)
        if entry(options, _PREPACKING) is None and not self._repacks:
            options.add_session_config_entry(_PREPACKING, "1")
        if self._folder is not None:
            options.add_session_config_entry(FOLDER_OPTION, str(self._folder))
        return options


def _of_shape(port: onnx.TensorProto, shape: tuple[int, ...]) -> onnx.TensorProto:
    tensor = onnx.TensorProto()
    tensor.CopyFrom(port)
    tensor.ClearField("dims")
    tensor.dims.extend(shape)
    return tensor


def _inline(port: onnx.TensorProto, codes: Array) -> onnx.TensorProto:
    """``codes`` inside the graph: of elements below a byte, ONNX Runtime's Python API makes no values of its own."""
    packed = codes.shape != tuple(port.dims)
    raw = codes.tobytes() if packed else onnx.numpy_helper.from_array(codes).raw_data
    return onnx.TensorProto(name=port.name, data_type=port.data_type, dims=port.dims, raw_data=raw)


def _counts_otherwise_when_repacked(model: onnx.ModelProto) -> bool:
    attributes = {"MatMulNBits": "accuracy_level", "DequantizeLinear": "block_size"}
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        for node in graph.node:
            if any(a.name == attributes.get(node.op_type) and a.i for a in node.attribute):
                return True
            graphs += [inner for a in node.attribute for inner in (*([a.g] if a.HasField("g") else []), *a.graphs)]
    return False


def _dissected(source: ModelSource) -> tuple[dict[str, onnx.TensorProto], bytes, Path | None]:
    """The ports' initializers, the rest of the model as bytes, and the folder of its external data."""
    kept_sites = source.manifest.kept
    wanted = {n for site, names in source.manifest.tensor_names().items() if site not in kept_sites for n in names}
    wanted |= {name for site in kept_sites.values() for name in site.names}
    skeleton = onnx.ModelProto()
    skeleton.CopyFrom(source.graph)
    initializers = list(skeleton.graph.initializer)
    ports = {tensor.name: tensor for tensor in initializers if tensor.name in wanted}
    if lost := sorted(wanted - ports.keys()):
        raise ModelError(
            f"{source.where} has no initializer {lost[0]!r}, which its manifest names ({len(lost)} such); "
            "extract the model again, and optimize it before the extraction if at all"
        )
    kept = onnx.GraphProto(initializer=[tensor for tensor in initializers if tensor.name not in wanted])
    ports = {name: onnx.TensorProto.FromString(tensor.SerializeToString()) for name, tensor in ports.items()}
    skeleton.graph.ClearField("initializer")
    skeleton.graph.initializer.extend(kept.initializer)
    # Shapes that were inferred for one rank are wrong for another; ONNX Runtime infers its own.
    skeleton.graph.ClearField("value_info")
    folder = _relocated(skeleton, source)
    return ports, skeleton.SerializeToString(), folder


def _relocated(skeleton: onnx.ModelProto, source: ModelSource) -> Path | None:
    if source.folder is None:
        return None
    # Checked once more and without exceptions: a manifest could have named a base weight's file as the adapters' own.
    model_file = Path(source.model) if isinstance(source.model, str) else None
    return relocate(skeleton, source.folder, model_file=model_file)
