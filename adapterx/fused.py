"""Adapters of fused layers over models whose exporter took the layer apart.

Checkpoints keep ``qkv_proj`` and ``gate_up_proj`` as one linear layer; some exporters write one for each part. The
rows of the fused weight are those of its parts, one after the other, so the parts share ``a`` and cut ``b``: exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from adapterx.adapter import INPUT_GAIN, WHOLE_WEIGHT, Array, LowRank
from adapterx.site import AdapterSite

FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def fused_sites(sites: Mapping[str, AdapterSite]) -> dict[str, tuple[AdapterSite, ...]]:
    """Names of fused layers that a model has only in parts, with the parts in the order of the fused rows.

    Args:
        sites: the model's sites by name

    Example:
        >>> fused_sites({})
        {}
    """
    found: dict[str, tuple[AdapterSite, ...]] = {}
    for name in sites:
        parent, _, last = name.rpartition(".")
        for fused, parts in FUSED.items():
            members = [f"{parent}.{part}" if parent else part for part in parts]
            whole = f"{parent}.{fused}" if parent else fused
            if last == parts[0] and whole not in sites and all(member in sites for member in members):
                found[whole] = tuple(sites[member] for member in members)
    return found


def split(low_rank: LowRank, widths: Iterable[int]) -> list[LowRank]:
    """The change of each part of a fused layer: one ``a`` for all, ``b`` cut by the parts' ``d_out``.

    Example:
        >>> import numpy as np
        >>> [part.d_out for part in split(LowRank(a=np.ones((2, 4)), b=np.ones((2, 5))), (3, 2))]
        [3, 2]
    """
    parts, start = [], 0
    for width in widths:
        columns = slice(start, start + width)
        cut = {name: _cut(name, part, columns) for name, part in low_rank.parts.items()}
        parts.append(LowRank(a=low_rank.a, b=low_rank.b[:, columns], parts=cut))
        start += width
    assert start == low_rank.d_out, "the caller checks that the parts' widths add up"
    return parts


def _cut(name: str, part: Array, columns: slice) -> Array:
    if name == INPUT_GAIN:
        return part
    return part[columns] if name == WHOLE_WEIGHT else part[:, columns]
