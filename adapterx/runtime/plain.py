"""Plain LoRA from kinds that act on the base weight: the change that they make to it, at a rank that is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from adapterx.adapter import GAIN, SHIFT, Adapter, Array, LowRank
from adapterx.errors import MismatchError
from adapterx.kinds.lora import wide
from adapterx.kinds.merged import merger
from adapterx.manifest import Manifest, SiteBase
from adapterx.progress import progress
from adapterx.runtime.base_tensors import BaseTensors
from adapterx.site import LOW_RANK, VECTORS, AdapterSite, SiteTable, by_name
from adapterx.truncation import Truncated, nearest, truncated

# What rounding of gain and shift leaves of a bias that they do not change together.
_ROUNDING = {2: 2e-2, 4: 1e-4, 8: 1e-8}


def taking_all(manifest: Manifest, bases: Mapping[str, SiteBase]) -> Manifest:
    """``manifest`` as if its sites took every kind at any rank: what an adapter is fitted to before :func:`plain`."""
    sites = [
        dataclasses.replace(site, ports=tuple(dict.fromkeys((*LOW_RANK, *site.ports, *sorted(VECTORS)))))
        for site in manifest.sites
    ]
    return dataclasses.replace(manifest, sites=SiteTable(sites), dynamic_rank=True, bases=bases)


def plain(
    adapter: Adapter, manifest: Manifest, bases: Mapping[str, SiteBase], tensors: BaseTensors, *, rank: int
) -> tuple[Adapter, dict[str, Truncated]]:
    """``adapter`` with nothing that the model's sites do not take: gains become part of the low-rank change.

    Args:
        adapter: fitted to :func:`taking_all` of the model
        manifest: what the model really takes
        bases: where the weights of its sites lie
        tensors: reads them
        rank: of a site's change, at most

    Returns:
        The adapter, and what it cost at the sites that had to be changed. Others are as they were, at any rank.

    Raises:
        MismatchError: the weight of a site cannot be read, or a change of a bias, which plain LoRA has no place for.
    """
    sites, lost, faults = dict(adapter.sites), {}, []
    table = by_name(manifest.sites)
    with progress("truncating", len(sites)) as advance:
        for name, change in adapter.sites.items():
            if set(change.parts) - set(table[name].ports):
                try:
                    lost[name] = _plain(change, table[name], bases.get(name), tensors, rank)
                    sites[name] = lost[name].change
                except ValueError as cause:
                    faults.append(f"  {name}: {cause}")
            advance(1)
    if faults:
        raise MismatchError("\n".join(["changes that cannot become plain LoRA:", *faults]))
    return Adapter(sites, adapter.metadata), lost


def _plain(change: LowRank, site: AdapterSite, base: SiteBase | None, tensors: BaseTensors, rank: int) -> Truncated:
    if base is None:
        raise ValueError("the base operation of this site was not found in the model")
    bias = tensors.bias(base)
    _refuse_bias(change, bias)
    if set(change.parts) == {SHIFT}:
        return truncated(LowRank(a=change.a, b=change.b), rank)
    weight = wide(tensors.weight(base)).T
    whole = merger(change, (weight.shape[0], weight.shape[1]), amount=1.0, weight=lambda: weight, bias=bias)
    cut = nearest((whole.weight(weight) - weight).T, rank, change.dtype)
    a = cut.change.a.reshape(cut.change.rank, site.d_in, *site.kernel)
    return dataclasses.replace(cut, change=LowRank(a=a, b=cut.change.b))


def _refuse_bias(change: LowRank, bias: Array | None) -> None:
    """DoRA's shift undoes what its gain does to the bias; what (IA)3 does to it stays."""
    shift = wide(change.parts[SHIFT]).reshape(-1) if SHIFT in change.parts else np.zeros(1, np.float32)
    gained = np.zeros(1, np.float32)
    if GAIN in change.parts and bias is not None:
        gained = wide(change.parts[GAIN]).reshape(-1) * wide(bias)
    left, most = np.abs(gained + shift).max(), max(np.abs(gained).max(), np.abs(shift).max())
    if left > _ROUNDING[change.dtype.itemsize] * most:
        raise ValueError(
            f"it changes the bias by up to {left:.3g}, which plain LoRA cannot; inject the model for its kind"
        )
