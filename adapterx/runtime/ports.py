"""What a fitted adapter looks like to a graph: arrays by the names of its ports."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes  # noqa: F401  (numpy knows the name "bfloat16" only after this import)
import numpy as np

from adapterx.adapter import LORA_A, LORA_B, Adapter, Array, LowRank, tensor_name
from adapterx.manifest import Manifest, Pack
from adapterx.site import AdapterSite, by_name


def port_names(manifest: Manifest) -> frozenset[str]:
    """Every name that belongs to adapters, in the graph or in adapter files: no host feeds these by hand."""
    names = {name for pair in manifest.tensor_names().values() for name in pair}
    mask = {manifest.mask} if manifest.mask else set()
    return frozenset(names | mask | {pack.name for pack in manifest.packs})


def graph_inputs(manifest: Manifest) -> frozenset[str]:
    """The graph inputs that a manifest promises, none in external mode."""
    if manifest.port == "external":
        return frozenset()
    plain = {tensor_name(site.name, side) for site in manifest.sites for side in (LORA_A, LORA_B)}
    packed = {tensor_name(site, pack.side) for pack in manifest.packs for site in pack.sites}
    return frozenset((plain - packed) | {pack.name for pack in manifest.packs})


def port_arrays(adapter: Adapter | None, manifest: Manifest) -> dict[str, Array]:
    """The arrays to feed for an adapter that was fitted to this model.

    Optional ports that the adapter says nothing of are left out: the graph's own default makes them the base. Others
    get matrices of no rows or, where the rank is fixed, zeros. Lower ranks than a port's are padded with rows of
    zeros, which add exactly nothing.

    Args:
        adapter: fitted; ``None`` is the base
        manifest: the model's

    Returns:
        ``<site>.lora_A.weight`` ``[r, d_in]``, ``<site>.lora_B.weight`` ``[r, d_out]``, and the packed inputs
        ``[members * r, d]``. What needs no padding and no packing is the adapter's own memory.
    """
    sites = by_name(manifest.sites)
    held: Mapping[str, LowRank] = adapter.sites if adapter else {}
    ranks = _ranks(held, sites, manifest)
    packed = {(site, pack.side) for pack in manifest.packs for site in pack.sites}
    arrays = {}
    for name, site in sites.items():
        for side, width in ((LORA_A, site.d_in), (LORA_B, site.d_out)):
            if (name, side) not in packed and (name in held or not manifest.optional):
                arrays[tensor_name(name, side)] = _rows(held.get(name), side, (ranks[name], width), site.dtype)
    for pack in manifest.packs:
        if not manifest.optional or any(name in held for name in pack.sites):
            arrays[pack.name] = _stacked(pack, held, sites, ranks)
    return arrays


def _ranks(held: Mapping[str, LowRank], sites: Mapping[str, AdapterSite], manifest: Manifest) -> dict[str, int]:
    if manifest.port != "external" and not manifest.dynamic_rank:
        return {name: site.rank for name, site in sites.items()}
    ranks = {name: held[name].rank if name in held else 0 for name in sites}
    # A site ties the pack of its a to the pack of its b, so one large rank can travel from pack to pack.
    while True:
        before = dict(ranks)
        for pack in manifest.packs:
            ranks.update(dict.fromkeys(pack.sites, max(ranks[name] for name in pack.sites)))
        if ranks == before:
            return ranks


def _stacked(
    pack: Pack, held: Mapping[str, LowRank], sites: Mapping[str, AdapterSite], ranks: Mapping[str, int]
) -> Array:
    first = sites[pack.sites[0]]
    width = first.d_in if pack.side == LORA_A else first.d_out
    rows = [_rows(held.get(name), pack.side, (ranks[name], width), first.dtype) for name in pack.sites]
    return _sealed(np.concatenate(rows))


def _rows(low_rank: LowRank | None, side: str, shape: tuple[int, int], dtype: str) -> Array:
    if low_rank is None:
        return _sealed(np.zeros(shape, np.dtype(dtype)))
    array = low_rank.a if side == LORA_A else low_rank.b
    if array.shape == shape:
        return array
    padded = np.zeros(shape, array.dtype)
    padded[: len(array)] = array
    return _sealed(padded)


def _sealed(array: Array) -> Array:
    array.flags.writeable = False
    return array
