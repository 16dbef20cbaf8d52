"""Names for what the finders of other kinds than linear LoRA found: the graph's, or those of the exported adapter."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from adapterx.adapter import PROMPT, RELATIVE, Adapter, Array, LowRank
from adapterx.graph.exported import Exported
from adapterx.graph.match import TOLERANCE, adapters_name, close
from adapterx.graph.paths import Paths
from adapterx.site import NameSource

Named: TypeAlias = tuple[str, Exported]
Find: TypeAlias = Callable[[Sequence[Exported], Mapping[str, LowRank]], list[tuple[Exported, str]]]


def named(met: Sequence[Exported], paths: Paths, adapter: Adapter | None) -> tuple[list[Named], list[Exported]]:
    """What has a name with it, and what has none.

    Args:
        met: what the finders found
        paths: how names of this model are read
        adapter: that was exported; names what the graph does not, by value, or by shape where one place fits
    """
    own = [(paths.canonical(one.module), one) for one in met if one.module]
    left = [one for one in met if not one.module]
    if adapter is None:
        return own, left
    own = [(_adapters_name(name, one, adapter), one) for name, one in own]
    steps: tuple[tuple[NameSource, Find], ...] = (("adapter_values", _by_value), ("adapter_shapes", _by_shape))
    for source, find in steps:
        taken = {name for name, _ in own}
        named_now = find(left, {name: one for name, one in adapter.sites.items() if name not in taken})
        own += [(name, dataclasses.replace(one, source=source)) for one, name in named_now]
        done = {one for one, _ in named_now}
        left = [one for one in left if one not in done]
    return own, left


def _adapters_name(name: str, one: Exported, adapter: Adapter) -> str:
    widths = (one.change.d_in, one.change.d_out)
    return adapters_name(name, adapter, widths, lambda change: _same(one.change, change))


def _by_value(left: Sequence[Exported], sites: Mapping[str, LowRank]) -> list[tuple[Exported, str]]:
    equal = [(one, [name for name, given in sites.items() if _same(one.change, given)]) for one in left]
    return [(one, names[0]) for one, names in equal if len(names) == 1]


def _by_shape(left: Sequence[Exported], sites: Mapping[str, LowRank]) -> list[tuple[Exported, str]]:
    """One place and one site of a shape belong together; several could be mixed up, so they stay without a name."""
    names: dict[tuple[int, ...], list[str]] = defaultdict(list)
    places: dict[tuple[int, ...], list[Exported]] = defaultdict(list)
    for name, given in sites.items():
        names[_shape(given)].append(name)
    for one in left:
        places[_shape(one.change)].append(one)
    return [
        (members[0], names[shape][0])
        for shape, members in places.items()
        if len(members) == 1 and len(names[shape]) == 1 and all(shape)
    ]


def _shape(change: LowRank) -> tuple[int, ...]:
    return change.d_in, change.d_out, *change.kernel


def _same(change: LowRank, given: LowRank) -> bool:
    """Whether a graph's change has the values of an adapter's site, as far as that needs no base."""
    pairs: list[tuple[Array | None, Array | None]] = [(change.a, given.a)] if given.rank or change.rank else []
    if given.is_relative:
        # What meets the base first has other gains, shifts and `b` in the graph; `a` it leaves alone.
        sides = ((one.parts.get(name) for one in (change, given)) for name in (*RELATIVE, PROMPT))
        pairs += [(change.b, given.b), *((one, other) for one, other in sides)]
    if _is_folded(change, given):
        pairs[:2] = [(change.b.T @ change.a, given.b.T @ given.a)]
    tolerance = max(TOLERANCE.get(one.dtype.name, 1e-5) for one in (change, given))
    return bool(pairs) and all(
        one is other is None
        or (one is not None and other is not None and one.shape == other.shape and close(one, other, tolerance))
        for one, other in pairs
    )


def _is_folded(change: LowRank, given: LowRank) -> bool:
    """The exporter has made one matrix of what the adapter has as factors of some other form."""
    whole = change.rank == min(change.d_in, change.d_out) and not change.kernel
    return whole and given.is_relative and given.rank > 0
