"""What is in a model for adapters, as plain data: every module with what became of it, every site in numbers."""

from __future__ import annotations

import dataclasses
from typing import Literal

from adapterx.site import AdapterSite, SiteTable

State = Literal["matched", "skipped", "refused"]


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One site in numbers.

    Args:
        site: as ``find_sites`` gives it
        rank: of the adapter that is shown, which for an extracted model need not be the exported one
        nbytes: of all its tensors at this site
        norm: ``||b.T @ a||``, ``None`` where its weights are not at hand or it has no low-rank change
        base_norm: of the base weight, ``None`` where it cannot be read
        parts: norms of what the adapter holds here beside the two matrices, by name
    """

    site: AdapterSite
    rank: int
    nbytes: int
    norm: float | None = None
    base_norm: float | None = None
    parts: tuple[tuple[str, float], ...] = ()

    @property
    def relative(self) -> float | None:
        """``norm`` as a part of ``base_norm``, ``None`` where either is missing."""
        return self.norm / self.base_norm if self.norm is not None and self.base_norm else None


@dataclasses.dataclass(frozen=True, slots=True)
class Module:
    """A module of the checkpoint whose operation an adapter can act on.

    Args:
        name: its path
        state: ``matched`` has a site, ``skipped`` has none, ``refused`` has an adapter that cannot be taken
        storage: how its quantized weight is stored, ``""`` for floats
        rows: its sites; several where several adapters are active at once
        why: the reason of a refusal
    """

    name: str
    state: State
    storage: str = ""
    rows: tuple[Row, ...] = ()
    why: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Survey:
    """What is in a model for adapters.

    Args:
        model: name of the file
        ports: how weights come into an extracted model, in words; ``""`` for an exported one
        adapter: name of the adapter that was given, ``""`` where none was
        sites: as ``find_sites`` gives them
        modules: every module with a name, in graph order
        refused: one line for each thing that belongs to an adapter and cannot be taken
        nameless: how many base operations have neither a site nor a name
        elsewhere: sites of the same adapter that other files of the export hold
    """

    model: str
    ports: str
    adapter: str
    sites: SiteTable
    modules: tuple[Module, ...]
    refused: tuple[str, ...] = ()
    nameless: int = 0
    elsewhere: tuple[str, ...] = ()
