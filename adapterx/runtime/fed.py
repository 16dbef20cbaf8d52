"""Models whose adapters are graph inputs: one ONNX Runtime session for all, swapping is feeding other memory."""

from __future__ import annotations

from collections.abc import Mapping

from adapterx.adapter import Adapter, Array
from adapterx.errors import ModelError, OptionError
from adapterx.manifest import Manifest
from adapterx.runtime.inference import Host, device_of, ort, ort_values, quiet_options
from adapterx.runtime.kernels import KernelMode, Kernels, register_kernels
from adapterx.runtime.options import copied, entry
from adapterx.runtime.ports import graph_inputs, mask_columns, port_arrays
from adapterx.runtime.resident import Resident
from adapterx.runtime.source import FOLDER_OPTION, ModelSource

_DISABLED = "optimization.disable_specified_optimizers"
_FUSION = "FuseFp16InitializerToFp32NodeTransformer"


class FedModel:
    """One session; an adapter is a dict of feeds.

    Raises:
        ModelError: ONNX Runtime cannot load the model, or it lacks a port that its manifest names.
        MissingDependency, OptionError: as :func:`~adapterx.runtime.kernels.register_kernels`.
    """

    def __init__(self, source: ModelSource, host: Host, *, kernels: KernelMode) -> None:
        self._manifest = source.manifest
        options = _options(source, host) or quiet_options()
        self._kernels = register_kernels(options, providers=host.names(), mode=kernels)
        self._session = host.open(source.model, where=source.where, options=options)
        self._device = device_of(self._session)
        inputs = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        lost = sorted(graph_inputs(source.manifest) - {node.name for node in inputs})
        if lost:
            raise ModelError(
                f"{source.where} has no input {lost[0]!r}, which its manifest names ({len(lost)} such); "
                "extract the model again, and optimize it before the extraction if at all"
            )

    @property
    def kernels(self) -> Kernels | None:
        """The library that runs every LowRankAdd; it reads nothing that a mask leaves out."""
        return self._kernels

    @property
    def device(self) -> tuple[str, int]:
        """Where the session's first provider has its memory."""
        return self._device

    def resident(self, adapter: Adapter | None, generation: int) -> Resident:
        """A fitted adapter with what is fed for it, on the session's device; for the base often nothing."""
        arrays = port_arrays(adapter, self._manifest)
        return Resident(adapter, generation, self.values(arrays), arrays, mask_columns(arrays, self._manifest))

    def values(self, arrays: Mapping[str, Array]) -> Mapping[str, ort.OrtValue]:
        """Arrays on the session's device."""
        return ort_values(arrays, device=self._device)

    def session(self, _: Resident) -> ort.InferenceSession:
        """The one session."""
        return self._session


def _options(source: ModelSource, host: Host) -> ort.SessionOptions | None:
    """The host's options, with the folder of a model in memory that has external data."""
    options = _safe_options(source.manifest, host)
    from_memory = isinstance(source.model, bytes) and source.folder is not None
    if from_memory and entry(host.session_options, FOLDER_OPTION) is None:
        options = copied(options)
        options.add_session_config_entry(FOLDER_OPTION, str(source.folder))
    return options


def _safe_options(manifest: Manifest, host: Host) -> ort.SessionOptions | None:
    """The host's options; without one optimizer where an old ONNX Runtime would lose float16 adapters.

    Before 1.30 it takes the default of a float16 input for a constant, and either folds it in, so that what is fed
    is ignored without a word, or crashes the process (microsoft/onnxruntime#32143, #32405). Whatever the activations
    are: casts of ours are taken for its own. It does so with no other element type.
    """
    major, minor = (int(part) for part in ort.__version__.split(".")[:2])
    taken = {site.dtype_of(port) for site in manifest.sites for port in site.ports}
    if (major, minor) >= (1, 30) or not manifest.optional or "float16" not in taken:
        return host.session_options
    options = host.session_options
    if options is None:
        options = quiet_options()
        options.add_session_config_entry(_DISABLED, _FUSION)
    all_of_them = options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    if all_of_them and _FUSION not in (entry(options, _DISABLED) or "").split(";"):
        raise OptionError(
            f"onnxruntime {ort.__version__} would ignore float16 adapters, or crash, under all its optimizations; "
            f"install 1.30, or call session_options.add_session_config_entry({_DISABLED!r}, {_FUSION!r})"
        )
    return options
