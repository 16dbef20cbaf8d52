"""Models whose adapters are graph inputs: one ONNX Runtime session for all, swapping is feeding other memory."""

from __future__ import annotations

from collections.abc import Mapping

from adapterx.adapter import Adapter
from adapterx.errors import ModelError
from adapterx.runtime.inference import Host, device_of, ort, ort_values
from adapterx.runtime.ports import graph_inputs, port_arrays
from adapterx.runtime.resident import Resident
from adapterx.runtime.source import ModelSource


class FedModel:
    """One session; an adapter is a dict of feeds.

    Raises:
        ModelError: ONNX Runtime cannot load the model, or it lacks a port that its manifest names.
    """

    def __init__(self, source: ModelSource, host: Host) -> None:
        self._manifest = source.manifest
        self._session = host.open(source.model, where=source.where)
        self._device = device_of(self._session)
        inputs = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        lost = sorted(graph_inputs(source.manifest) - {node.name for node in inputs})
        if lost:
            raise ModelError(
                f"{source.where} has no input {lost[0]!r}, which its manifest names ({len(lost)} such); "
                "extract the model again, and optimize it before the extraction if at all"
            )

    def tensors(self, adapter: Adapter | None) -> Mapping[str, ort.OrtValue]:
        """What is fed for a fitted adapter, on the session's device; for the base often nothing."""
        return ort_values(port_arrays(adapter, self._manifest), device=self._device)

    def session(self, _: Resident) -> ort.InferenceSession:
        """The one session."""
        return self._session
