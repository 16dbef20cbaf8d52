"""Bound: an adapter bound to a session once, to be run many times."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adapterx.runtime.inference import ort
from adapterx.runtime.resident import Resident, Runnable
from adapterx.runtime.signature import Signature


class _Binding:
    """One adapter's tensors bound to one ONNX Runtime session."""

    def __init__(self, session: ort.InferenceSession, resident: Resident) -> None:
        self.session = session
        self._tensors = resident.tensors
        self._fed: frozenset[str] = frozenset()
        self._io = session.io_binding()
        self._bind_tensors()

    def _bind_tensors(self) -> None:
        for name, value in self._tensors.items():
            self._io.bind_ortvalue_input(name, value)

    def run(self, outputs: list[str], feeds: Mapping[str, Any], run_options: ort.RunOptions | None) -> list[Any]:
        if not feeds.keys() >= self._fed:
            # What an earlier run overrode and this one does not must fall back to the model's default.
            self._io.clear_binding_inputs()
            self._bind_tensors()
        self._fed = frozenset(feeds)
        for name, value in feeds.items():
            # bind_cpu_input knows only required inputs, not initializers that may be overridden.
            held = value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(value)
            self._io.bind_ortvalue_input(name, held)
        # An output keeps the tensor of the last run, and ONNX Runtime would write into it again: the caller has it.
        self._io.clear_binding_outputs()
        for name in outputs:
            self._io.bind_output(name)
        self.session.run_with_iobinding(self._io, run_options)
        results: list[Any] = self._io.copy_outputs_to_cpu()
        return results


class Bound:
    """A session with one adapter in place; made by :meth:`AdapterSession.bind`.

    It pins its adapter: unloading or reloading the name changes nothing here until :meth:`rebind`. Threads that share
    one bound object take turns, so that no run sees another's feeds; for runs side by side, give each thread its own.
    """

    def __init__(
        self, model: Runnable, signature: Signature, find: Callable[[str | None], Resident], adapter: str | None
    ) -> None:
        self._model, self._signature, self._find = model, signature, find
        self._turn = threading.Lock()
        self._kept: weakref.WeakKeyDictionary[Resident, _Binding] = weakref.WeakKeyDictionary()
        self._resident = find(adapter)
        self._binding = self._bound(self._resident)

    def rebind(self, adapter: str | None) -> None:
        """Run ``adapter`` from now on; ``None`` is the base. One that was bound here before comes back in microseconds.

        Raises:
            UnknownAdapter: the session has no adapter of that name; nothing has changed then.
        """
        resident = self._find(adapter)
        with self._turn:
            self._binding = self._bound(resident)
            self._resident = resident

    def run(
        self, output_names: Sequence[str] | None, feeds: Mapping[str, Any], run_options: ort.RunOptions | None = None
    ) -> list[Any]:
        """As :meth:`AdapterSession.run`, with the bound adapter. The results belong to the caller.

        Raises:
            FeedError: feeds or output names that do not fit the model.
        """
        outputs, checked = self._signature.checked_outputs(output_names), self._signature.checked_feeds(feeds)
        with self._turn:
            return self._binding.run(outputs, checked, run_options)

    def _bound(self, resident: Resident) -> _Binding:
        session = self._model.session(resident)
        binding = self._kept.get(resident)
        if binding is None or binding.session is not session:
            # Where each adapter has a session of its own, keeping more than one here would outwit the limit on them.
            for other in [key for key, kept in self._kept.items() if kept.session is not session]:
                del self._kept[other]
            binding = self._kept[resident] = _Binding(session, resident)
        return binding
