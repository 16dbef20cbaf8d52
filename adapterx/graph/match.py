"""Name the branches of a graph by the adapter that was exported with it: by value, or by shape where one fits."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection

import numpy as np

from adapterx.adapter import SHIFT, WHOLE_WEIGHT, Adapter, LowRank
from adapterx.errors import MismatchError, nearest
from adapterx.graph.branches import Branch
from adapterx.graph.quantized_linear import Codes
from adapterx.site import LOW_RANK, AdapterSite, NameSource

Pair = tuple[Branch, AdapterSite]
# Half types round once in the exporter's cast and once more when a scale is folded.
TOLERANCE = {"float64": 1e-6, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
# Rounding normal numbers to 8 bits changes 1% of their norm, to 4 bits 9%, to 2 bits 36%.
_QUANTIZED = 0.6


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Match:
    """What an adapter says of a graph's branches.

    Args:
        sites: branches with their sites, under the adapter's names where it has them
        left: branches that belong to no site of the adapter
        absent: sites of the adapter that this graph does not hold (another file of the export may)
    """

    sites: list[Pair]
    left: list[Branch]
    absent: tuple[str, ...]


def match_to_adapter(
    sites: list[Pair], unnamed: list[Branch], adapter: Adapter, *, others: Collection[str] = ()
) -> Match:
    """Name what ``adapter`` can name: branches without a name, and sites whose name lacks its first parts.

    Args:
        sites: branches that have names
        unnamed: branches that have none
        adapter: that was exported
        others: its sites that were found already, of other kinds than linear LoRA

    Raises:
        MismatchError: nothing of the adapter is in the graph, or several branches could be one site.
    """
    renamed = [(branch, _renamed(branch, site, adapter)) for branch, site in sites]
    taken = {site.name for _, site in renamed} | set(others)
    open_sites = {name: low_rank for name, low_rank in adapter.sites.items() if name not in taken}
    by_value, left = _by_value(unnamed, open_sites)
    for _, site in by_value:
        open_sites.pop(site.name, None)
    by_shape, left = _by_shape(left, open_sites)
    for _, site in by_shape:
        open_sites.pop(site.name, None)
    shapes = {(branch.a.d_in, branch.b.d_out) for branch in left}
    unclear = {name: one for name, one in open_sites.items() if (one.d_in, one.d_out) in shapes}
    if unclear or len(open_sites) == len(adapter.sites):
        raise MismatchError(_unmatched(unclear or open_sites, renamed, left))
    return Match(renamed + by_value + by_shape, left, tuple(open_sites))


def _renamed(branch: Branch, site: AdapterSite, adapter: Adapter) -> AdapterSite:
    """``site`` under the adapter's name for it."""
    name = adapters_name(site.name, adapter, (site.d_in, site.d_out), lambda one: _same_values(branch, one))
    return dataclasses.replace(site, name=name)


def adapters_name(name: str, adapter: Adapter, widths: tuple[int, int], is_same: Callable[[LowRank], bool]) -> str:
    """What ``adapter`` calls the site ``name``: the same path, or one that differs by leading parts only.

    Args:
        name: by the graph
        adapter: that was exported
        widths: ``d_in`` and ``d_out`` of the site; 0 where nothing tells
        is_same: tells whether one of its sites has the values of this one
    """
    if name in adapter.sites:
        return name
    ends = [other for other in adapter.sites if other.endswith(f".{name}") or name.endswith(f".{other}")]
    # `fc` of one model is not `mlp.fc` of another.
    alike = [other for other in ends if _is_as_wide(adapter.sites[other], widths)]
    if len(alike) > 1:
        # An encoder that was exported alone lost its prefix, and the decoder's modules end in the same words.
        alike = [other for other in alike if is_same(adapter.sites[other])]
    return alike[0] if len(alike) == 1 else name


def _is_as_wide(change: LowRank, widths: tuple[int, int]) -> bool:
    """A whole embedding lies the other way round."""
    given = (change.d_in, change.d_out)
    return any(
        all(one == other or not (one and other) for one, other in zip(given, wanted, strict=True))
        for wanted in (widths, widths[::-1])[: 1 + (WHOLE_WEIGHT in change.parts)]
    )


def _by_value(branches: list[Branch], sites: dict[str, LowRank]) -> tuple[list[Pair], list[Branch]]:
    named: list[Pair] = []
    left: list[Branch] = []
    for branch in branches:
        equal = [name for name, low_rank in sites.items() if _same_values(branch, low_rank)]
        if len(equal) == 1:
            named.append((branch, site_of(branch, equal[0], "", "adapter_values")))
        else:
            left.append(branch)
    return named, left


def _by_shape(branches: list[Branch], sites: dict[str, LowRank]) -> tuple[list[Pair], list[Branch]]:
    """One branch and one site of a shape belong together; several could be mixed up, so they stay unmatched."""
    shapes: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, low_rank in sites.items():
        if not low_rank.kernel:
            shapes[low_rank.d_in, low_rank.d_out].append(name)
    places: dict[tuple[int, int], list[Branch]] = defaultdict(list)
    for branch in branches:
        places[branch.a.d_in, branch.b.d_out].append(branch)
    named = [
        (members[0], site_of(members[0], shapes[shape][0], "", "adapter_shapes"))
        for shape, members in places.items()
        if len(members) == 1 and len(shapes[shape]) == 1
    ]
    taken = {id(branch) for branch, _ in named}
    return named, [branch for branch in branches if id(branch) not in taken]


def _same_values(branch: Branch, low_rank: LowRank) -> bool:
    if (branch.a.d_in, branch.b.d_out, branch.rank) != (low_rank.d_in, low_rank.d_out, low_rank.rank):
        return False
    if low_rank.kernel:
        return False
    tolerance = max(TOLERANCE.get(name, 1e-5) for name in (branch.a.weight.dtype.numpy().name, low_rank.dtype.name))
    a, b = branch.a.matrix().T, branch.b.matrix() * np.float32(branch.scale)
    return all(
        near(one, other) if isinstance(factor.weight, Codes) else close(one, other, tolerance)
        for factor, one, other in ((branch.a, a, low_rank.a), (branch.b, b, low_rank.b))
    )


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether ``one`` can be ``other`` as a quantizer rounded it: what is no copy differs by its whole norm."""
    left, right = one.astype(np.float32), other.astype(np.float32)
    return bool(np.linalg.norm(left - right) <= _QUANTIZED * np.linalg.norm(right))


def close(one: np.ndarray, other: np.ndarray, tolerance: float) -> bool:
    """Whether two arrays of one shape differ by no more than ``tolerance``, relative to the largest element."""
    left, right = one.astype(np.float32), other.astype(np.float32)
    size = max(float(np.abs(right).max(initial=0.0)), float(np.abs(left).max(initial=0.0)))
    return bool(np.abs(left - right).max(initial=0.0) <= tolerance * max(size, 1e-30))


def site_of(branch: Branch, name: str, adapter: str, source: NameSource) -> AdapterSite:
    """What there is to say of ``branch`` under ``name``."""
    return AdapterSite(
        name=name,
        adapter=adapter,
        kind="lora",
        op="?" if branch.base_op is None else branch.base_op.op_type,
        d_in=branch.a.d_in,
        d_out=branch.b.d_out,
        rank=branch.rank,
        scale=branch.scale,
        dtype=branch.a.weight.dtype.numpy().name,
        name_source=source,
        node=branch.join.name or "",
        ports=LOW_RANK if branch.bias is None else (*LOW_RANK, SHIFT),
    )


def _unmatched(sites: dict[str, LowRank], named: list[Pair], left: list[Branch]) -> str:
    known = [site.name for _, site in named]
    lines = [
        f"  {name}: {low_rank.d_in} -> {low_rank.rank} -> {low_rank.d_out}, no branch has its values"
        f"{nearest(name, known)}"
        for name, low_rank in list(sites.items())[:10]
    ]
    shapes = sorted({(b.a.d_in, b.rank, b.b.d_out) for b in left})
    met = ", ".join(f"{i} -> {r} -> {o}" for i, r, o in shapes) or "none"
    return "\n".join(
        [
            f"{len(sites)} sites of the given adapter have no place of their own in this graph:",
            *lines,
            f"Branches without a name have the shapes {met}. Several of one shape can only be told apart by value: "
            "give the very adapter that was exported with the model.",
        ]
    )
