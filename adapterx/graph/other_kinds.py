"""Adapters of all kinds but linear LoRA, found in a graph: the finders side by side, their finds by site."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

import onnx_ir as ir

from adapterx.adapter import Adapter
from adapterx.errors import ModelError
from adapterx.graph.bases import Base, find_bases
from adapterx.graph.exported import Exported, site_of_exported
from adapterx.graph.paths import Paths
from adapterx.site import AdapterSite

# Each is given the model and its base operations, which are looked for once.
Finder = Callable[[ir.Model, Sequence[Base]], list[Exported]]

FINDERS: Final[tuple[Finder, ...]] = ()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Other:
    """A site of another kind, and the places that are its: several when one module is called several times."""

    site: AdapterSite
    places: tuple[Exported, ...]


def find_others(model: ir.Model, paths: Paths) -> list[Other]:
    """Everything that the finders find, by canonical name and adapter.

    Raises:
        ModelError: two different adapters go by one name.
    """
    groups: dict[tuple[str, str], list[Exported]] = defaultdict(list)
    bases = find_bases(model, paths)
    for finder in FINDERS:
        for exported in finder(model, bases):
            groups[paths.canonical(exported.module), exported.adapter].append(exported)
    return [_other(name, members) for (name, _), members in groups.items()]


def _other(name: str, members: list[Exported]) -> Other:
    first = members[0]
    for member in members[1:]:
        if Adapter({name: member.change}) != Adapter({name: first.change}):
            raise ModelError(
                f"two different adapters, at {first.place} and {member.place}, both go by the name {name!r}"
            )
    return Other(site_of_exported(first, name), tuple(members))
