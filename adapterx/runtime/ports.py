"""What a fitted adapter looks like to a graph: arrays by the names of its ports."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes  # noqa: F401  (numpy knows the name "bfloat16" only after this import)
import numpy as np

from adapterx.adapter import PROMPT, Adapter, Array, LowRank, tensor_name
from adapterx.manifest import Manifest, Pack
from adapterx.site import LOW_RANK, AdapterSite, by_name


def port_names(manifest: Manifest) -> frozenset[str]:
    """Every name that belongs to adapters, in the graph or in adapter files: no host feeds these by hand."""
    names = {name for ports in manifest.tensor_names().values() for name in ports}
    masks = {mask for mask in (manifest.mask, manifest.row_mask) if mask}
    return frozenset(names | masks | {pack.name for pack in manifest.packs})


def graph_inputs(manifest: Manifest) -> frozenset[str]:
    """The graph inputs that a manifest promises, none in external mode."""
    if manifest.port == "external":
        return frozenset()
    plain = {tensor_name(site.name, port) for site in manifest.sites for port in site.ports}
    packed = {tensor_name(site, pack.side) for pack in manifest.packs for site in pack.sites}
    return frozenset((plain - packed) | {pack.name for pack in manifest.packs})


def port_arrays(adapter: Adapter | None, manifest: Manifest) -> dict[str, Array]:
    """The arrays to feed for an adapter that was fitted to this model.

    Optional ports that the adapter says nothing of are left out: the graph's own default makes them the base. Others
    get matrices of no rows or, where the rank is fixed, zeros. Lower ranks than a port's are padded with rows of
    zeros, which add exactly nothing. A convolution never gets a matrix of no rows.

    Args:
        adapter: fitted; ``None`` is the base
        manifest: the model's

    Returns:
        ``<site>.lora_A.weight`` ``[r, d_in]``, ``<site>.lora_B.weight`` ``[r, d_out]``, ``<site>.gain.weight``
        ``[1, d_out]`` and so on, and the packed inputs ``[members * r, d]``. What needs no padding and no packing is
        the adapter's own memory.
    """
    sites = by_name(manifest.sites)
    held: Mapping[str, LowRank] = adapter.sites if adapter else {}
    ranks = _ranks(held, sites, manifest)
    packed = {(site, pack.side) for pack in manifest.packs for site in pack.sites}
    arrays = {}
    for name, site in sites.items():
        given = dict(held[name].tensors()) if name in held else {}
        for port in site.ports:
            if (name, port) in packed:
                continue
            if port in given or not manifest.optional or name in manifest.required:
                rows = ranks[name] if port in LOW_RANK else _vector_rows(port, site, manifest, given)
                arrays[tensor_name(name, port)] = _rows(given.get(port), (rows, *site.width(port)), site.dtype)
    for pack in manifest.packs:
        if not manifest.optional or any(name in held for name in pack.sites):
            arrays[pack.name] = _stacked(pack, held, sites, ranks)
    return arrays


def _ranks(held: Mapping[str, LowRank], sites: Mapping[str, AdapterSite], manifest: Manifest) -> dict[str, int]:
    if manifest.port != "external" and not manifest.dynamic_rank:
        return {name: site.rank for name, site in sites.items()}
    least = {name: 1 for name, site in sites.items() if site.kernel}
    least |= {name: sites[name].rank for name in manifest.kept}
    ranks = {name: max(held[name].rank if name in held else 0, least.get(name, 0)) for name in sites}
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
    width = first.width(pack.side)
    given = {name: dict(held[name].tensors()).get(pack.side) for name in pack.sites if name in held}
    rows = [_rows(given.get(name), (ranks[name], *width), first.dtype) for name in pack.sites]
    return _sealed(np.concatenate(rows))


def _vector_rows(port: str, site: AdapterSite, manifest: Manifest, given: Mapping[str, Array]) -> int:
    """Rows of a gain or shift (one, or none for the base where that may be), tokens of a prompt."""
    fixed = port == PROMPT or (manifest.port != "external" and not manifest.dynamic_rank)
    return site.rows(port) if fixed else len(given.get(port, ()))


def _rows(array: Array | None, shape: tuple[int, ...], dtype: str) -> Array:
    if array is None:
        return _sealed(np.zeros(shape, np.dtype(dtype)))
    if array.shape == shape:
        return array
    padded = np.zeros(shape, array.dtype)
    padded[: len(array)] = array
    return _sealed(padded)


def _sealed(array: Array) -> Array:
    array.flags.writeable = False
    return array
