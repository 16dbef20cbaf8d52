"""What a fitted adapter looks like to a graph: arrays by the names of its ports."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes  # noqa: F401  (numpy knows the name "bfloat16" only after this import)
import numpy as np

from adapterx.adapter import LORA_A, LORA_B, PROMPT, Adapter, Array, LowRank, tensor_name
from adapterx.formats.quantized import int8_codes
from adapterx.manifest import Manifest, Pack
from adapterx.site import LORA_SCALE, LOW_RANK, RANKED, AdapterSite, by_name


def port_names(manifest: Manifest) -> frozenset[str]:
    """Every name that belongs to adapters, in the graph or in adapter files: no host feeds these by hand."""
    names = {name for ports in manifest.tensor_names().values() for name in ports}
    masks = {mask for mask in (manifest.mask, manifest.row_mask) if mask}
    return frozenset(names | masks | {pack.name for pack in manifest.packs})


def graph_inputs(manifest: Manifest) -> frozenset[str]:
    """The graph inputs that a manifest promises, none in external mode."""
    if manifest.port == "external":
        return frozenset()
    plain = {tensor_name(site.name, port) for site in manifest.sites for port in site.graph_ports}
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
        ``[1, d_out]`` and so on, and the packed inputs ``[members * r, d]``. Where the model takes int8, codes, and
        ``<site>.lora_scale.weight`` ``[r, 2]``. What needs no padding, packing or rounding is the adapter's own memory.
    """
    sites = by_name(manifest.sites)
    held: Mapping[str, LowRank] = adapter.sites if adapter else {}
    ranks = _ranks(held, sites, manifest)
    packed = {(site, pack.side) for pack in manifest.packs for site in pack.sites}
    brought = {name: _tensors(held[name], site) for name, site in sites.items() if name in held}
    arrays = {}
    for name, site in sites.items():
        given = brought.get(name, {})
        for port in site.graph_ports:
            if (name, port) in packed:
                continue
            if port in given or not manifest.optional or name in manifest.required:
                rows = ranks[name] if port in RANKED else _vector_rows(port, site, manifest, given)
                shape = (rows, *site.width(port))
                arrays[tensor_name(name, port)] = _rows(given.get(port), shape, site.dtype_of(port))
    for pack in manifest.packs:
        if not manifest.optional or any(name in held for name in pack.sites):
            arrays[pack.name] = _stacked(pack, brought, sites, ranks)
    return arrays


def mask_columns(arrays: Mapping[str, Array], manifest: Manifest) -> int:
    """The columns of ``adapter_mask`` that an adapter takes: the most rows that it has at any site.

    Args:
        arrays: what :func:`port_arrays` gave
        manifest: the model's
    """
    members = {pack.name: len(pack.sites) for pack in manifest.packs}
    low_rank = {tensor_name(site.name, port) for site in manifest.sites for port in site.ports if port in LOW_RANK}
    rows = (len(array) // members.get(name, 1) for name, array in arrays.items() if name in low_rank | members.keys())
    return max(rows, default=0)


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


def _tensors(change: LowRank, site: AdapterSite) -> dict[str, Array]:
    """What a fitted change brings to each port, in the port's element type."""
    given = dict(change.tensors())
    if site.dtype == "int8" and LORA_A in given:
        (given[LORA_A], a_scale), (given[LORA_B], b_scale) = int8_codes(change.a), int8_codes(change.b)
        given[LORA_SCALE] = np.stack([a_scale, b_scale], axis=1)
    return {port: _sealed(array.astype(site.dtype_of(port), copy=False)) for port, array in given.items()}


def rounded(adapter: Adapter, manifest: Manifest) -> Adapter:
    """The numbers that the ports of another type than the activations make of an adapter; itself where there are none.

    Args:
        adapter: fitted, or of the model's own sites
        manifest: the model's
    """
    table = by_name(manifest.sites)
    if not any(table[name].activations for name in adapter.sites):
        return adapter
    return Adapter({name: _rounded(change, table[name]) for name, change in adapter.sites.items()}, adapter.metadata)


def _rounded(change: LowRank, site: AdapterSite) -> LowRank:
    if not site.activations or not change.rank:
        return change
    given = _tensors(change, site)
    a, b = given[LORA_A], given[LORA_B]
    if LORA_SCALE in given:
        a, b = a * given[LORA_SCALE][:, :1], b * given[LORA_SCALE][:, 1:]
    return LowRank(a=a.astype(change.dtype), b=b.astype(change.dtype), parts=change.parts)


def _stacked(
    pack: Pack,
    brought: Mapping[str, Mapping[str, Array]],
    sites: Mapping[str, AdapterSite],
    ranks: Mapping[str, int],
) -> Array:
    first = sites[pack.sites[0]]
    width, dtype = first.width(pack.side), first.dtype_of(pack.side)
    rows = [_rows(brought.get(name, {}).get(pack.side), (ranks[name], *width), dtype) for name in pack.sites]
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
