"""Resident: an adapter that a session holds ready, as one value that a run can pin."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from adapterx.adapter import Adapter, Array
from adapterx.runtime.inference import ort
from adapterx.runtime.kernels import Kernels


class Identity(NamedTuple):
    """What a cache of results must be keyed by: names are given again, and equal bytes may be loaded twice."""

    content_hash: str
    generation: int


@dataclasses.dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class Resident:
    """Whoever holds this can run it, whatever is loaded or unloaded meanwhile; the last holder frees it.

    Args:
        adapter: fitted; ``None`` is the base
        generation: counts every load of the session, so that no two are alike
        tensors: the feeds, empty where adapters are not fed
        arrays: the same memory as numpy has it (on other devices the host's copy)
        rank: the columns that it takes in a mask: the most rows of any site
    """

    adapter: Adapter | None
    generation: int
    tensors: Mapping[str, ort.OrtValue]
    arrays: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    rank: int = 0

    @property
    def identity(self) -> Identity:
        """Hash of the content and generation. The hash is computed once, on first use: it costs more than a load."""
        return Identity(self.adapter.content_hash if self.adapter else "", self.generation)


class Runnable(Protocol):
    """A model that can run residents: :class:`~adapterx.runtime.fed.FedModel` or ``BakedModels``."""

    def resident(self, adapter: Adapter | None, generation: int) -> Resident:
        """A fitted adapter, or the base, made ready."""

    def values(self, arrays: Mapping[str, Array]) -> Mapping[str, ort.OrtValue]:
        """Arrays by the names of ports, as they are fed."""

    @property
    def kernels(self) -> Kernels | None:
        """The library that its sessions have, if any."""

    def session(self, resident: Resident, /) -> ort.InferenceSession:
        """The ONNX Runtime session that runs it."""
