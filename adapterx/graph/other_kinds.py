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
from adapterx.graph.conv_sites import find_convs
from adapterx.graph.embedding_sites import find_embeddings
from adapterx.graph.exported import Exported, site_of_exported
from adapterx.graph.ia3_sites import find_ia3
from adapterx.graph.other_names import named
from adapterx.graph.paths import Paths
from adapterx.graph.prompt_sites import find_prompts
from adapterx.graph.saved_sites import find_given, find_saved
from adapterx.graph.weight_sites import find_weight_changes
from adapterx.site import AdapterSite

_WIDEST = 4
# What a base has of its own, too.
_PLAIN = frozenset({"ia3", "lora", "loha", "lokr"})
# Each is given the model and its base operations, which are looked for once.
Finder = Callable[[ir.Model, Sequence[Base]], list[Exported]]

FINDERS: Final[tuple[Finder, ...]] = (
    find_weight_changes,
    find_ia3,
    find_convs,
    find_embeddings,
    find_saved,
    find_prompts,
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Other:
    """A site of another kind, and the places that are its: several when one module is called several times."""

    site: AdapterSite
    places: tuple[Exported, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Others:
    """What the finders found.

    Args:
        found: by canonical name and adapter
        left: what nothing names
        bases: the model's base operations
    """

    found: tuple[Other, ...]
    left: tuple[Exported, ...]
    bases: tuple[Base, ...]

    @property
    def nodes(self) -> frozenset[ir.Node]:
        """All nodes that belong to adapters of other kinds than linear LoRA, with the operations that they adapt.

        A nameless vector or matrix claims nothing: in a graph without metadata every norm looks like (IA)3.
        """
        shaped = (place for place in self.left if place.kind not in _PLAIN)
        places = [*shaped, *(place for other in self.found for place in other.places)]
        ops = {place.op for place in places if place.op is not None}
        return frozenset(ops.union(*(place.nodes for place in places)))


def find_others(model: ir.Model, paths: Paths, adapter: Adapter | None = None) -> Others:
    """Everything that the finders find, by canonical name and adapter.

    Args:
        model: looked at
        paths: how its names are read
        adapter: that was exported, if it is at hand

    Raises:
        ModelError: two different adapters go by one name.
        MismatchError: several operations could be one module of ``adapter``.
    """
    bases = tuple(find_bases(model, paths))
    own, left = named([one for finder in FINDERS for one in finder(model, bases)], paths, adapter)
    if adapter is not None:
        own += find_given(bases, adapter, {name for name, _ in own})
    groups: dict[tuple[str, str], list[Exported]] = defaultdict(list)
    for name, exported in own:
        groups[name, exported.adapter].append(exported)
    found = tuple(other_of(name, members) for (name, _), members in groups.items())
    # Of two matrices that are added, either can be the base of the other.
    joins = {exported.join for _, exported in own if exported.join is not None}
    return Others(found, tuple(one for one in left if one.join not in joins), bases)


def other_of(name: str, members: Sequence[Exported]) -> Other:
    """The site that several places are together.

    Raises:
        ModelError: they hold different adapters, or one in float64.
    """
    first = members[0]
    if first.change.dtype.itemsize > _WIDEST:
        raise ModelError(f"{first.place}: adapter weights are {first.change.dtype}; adapters are float32 at most")
    for member in members[1:]:
        if Adapter({name: member.change}) != Adapter({name: first.change}):
            raise ModelError(
                f"two different adapters, at {first.place} and {member.place}, both go by the name {name!r}"
            )
    return Other(site_of_exported(first, name), tuple(members))
