"""Residents: the adapters of a session by name, and which of them lie in memory and which in files."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Mapping

from adapterx.adapter import Adapter
from adapterx.errors import OptionError, UnknownAdapter, nearest
from adapterx.runtime.mapped import mapped_resident, resident_nbytes
from adapterx.runtime.resident import Resident, Runnable
from adapterx.runtime.rows import shown


class Residents:
    """Names and what they mean at this moment. Readers take no lock: a change makes a new mapping.

    Beyond its limits, the least recently used adapters are moved into memory-mapped files. They stay loaded, and run
    as before from pages that the system may drop and read again.

    Args:
        model: makes residents
        max_loras: most adapters in memory, ``None`` for any number
        max_bytes: most bytes of adapters in memory, ``None`` for any number

    Raises:
        OptionError: a limit below zero.
    """

    def __init__(self, model: Runnable, *, max_loras: int | None, max_bytes: int | None) -> None:
        for option, limit in (("max_cpu_loras", max_loras), ("max_cpu_bytes", max_bytes)):
            if limit is not None and limit < 0:
                raise OptionError(f"{option} must be 0 or more, or None; got {limit}")
        self._model, self._max_loras, self._max_bytes = model, max_loras, max_bytes
        self._generations, self._clock = itertools.count(1), itertools.count()
        self._writing = threading.Lock()
        self._held: Mapping[str, Resident] = {}
        self._used: dict[int, int] = {}
        self._in_memory: dict[str, int] = {}

    @property
    def held(self) -> Mapping[str, Resident]:
        """What is loaded, in the order of loading; a snapshot that never changes."""
        return self._held

    def find(self, name: str) -> Resident:
        """The resident of that name.

        Raises:
            UnknownAdapter: none has it.
        """
        held = self._held
        try:
            return held[name]
        except (KeyError, TypeError):
            message = f"no adapter {name!r} is loaded{nearest(str(name), held)}; loaded: {shown(held)}"
            raise UnknownAdapter(message) from None

    def used(self, residents: Iterable[Resident]) -> None:
        """Note that a run takes them."""
        for resident in residents:
            self._used[resident.generation] = next(self._clock)

    def load(self, name: str, adapter: Adapter) -> None:
        """Hold a fitted adapter under ``name``, in place of what had the name."""
        # The copies that a port may need are made outside of the lock.
        resident = self._model.resident(adapter, next(self._generations))
        size = resident_nbytes(resident)
        with self._writing:
            self._forget(name)
            self._held = {**self._held, name: resident}
            self._in_memory[name] = size
            self.used([resident])
            self._make_room()

    def unload(self, name: str) -> None:
        """Forget the name.

        Raises:
            UnknownAdapter: none has it.
        """
        with self._writing:
            self.find(name)
            self._forget(name)
            self._held = {other: held for other, held in self._held.items() if other != name}

    @property
    def nbytes(self) -> int:
        """Bytes of the adapters that lie in memory; those in files are not counted."""
        return sum(self._in_memory.values())

    def _forget(self, name: str) -> None:
        self._in_memory.pop(name, None)
        if name in self._held:
            self._used.pop(self._held[name].generation, None)

    def _make_room(self) -> None:
        def is_full() -> bool:
            too_many = self._max_loras is not None and len(self._in_memory) > self._max_loras
            return too_many or (self._max_bytes is not None and self.nbytes > self._max_bytes)

        while self._in_memory and is_full():
            oldest = min(self._in_memory, key=lambda name: self._used.get(self._held[name].generation, 0))
            self._held = {**self._held, oldest: mapped_resident(self._held[oldest], self._model.values)}
            del self._in_memory[oldest]
