"""Adapters in the codes of a graph that was quantized with one: other adapters are quantized the same way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from adapterx.adapter import Array
from adapterx.base_weight import SCALE, BaseWeight, Tensors, read_weight, written
from adapterx.errors import ModelError
from adapterx.manifest import Kept
from adapterx.site import AdapterSite


def exported_codes(kept: Mapping[str, Kept], sites: Iterable[AdapterSite], tensor: Tensors) -> dict[str, Array]:
    """The tensors of all kept sites, as the model's file has them.

    Args:
        kept: by site name
        sites: the model's
        tensor: reads one by name

    Raises:
        ModelError: tensors that are not what the manifest says.
    """
    found = {name: tensor(name) for one in kept.values() for name in one.names}
    for site in sites:
        one = kept.get(site.name)
        if one is None:
            continue
        try:
            shapes = (folded(one.a, 1.0, found).shape, folded(one.b, 1.0, found).shape)
        except (ValueError, KeyError, IndexError, ZeroDivisionError) as error:
            raise ModelError(f"the codes of {site.name} are not what the manifest says ({error})") from None
        if shapes != ((site.d_in, site.rank), (site.rank, site.d_out)):
            raise ModelError(
                f"the codes of {site.name} stand for matrices of shapes {shapes}; its manifest says "
                f"{site.d_in} -> {site.rank} -> {site.d_out}"
            )
    return found


def coded(kept: Kept, a: Array, b: Array, exported: Mapping[str, Array]) -> dict[str, Array]:
    """The tensors that make a kept site's nodes compute with an adapter.

    Numbers that the exported codes stand for become those codes to the last bit. Others get scales and zero points of
    their own, as the quantizer would have chosen them.

    Args:
        kept: how the site is stored
        a: ``[r, d_in]``, with the rank of the site
        b: ``[r, d_out]``, scale folded in
        exported: the site's tensors with the adapter that was exported, by name

    Returns:
        Tensor name -> content, for all of ``kept.names``.
    """
    return {
        **_tensors(kept.a, a.T, 1.0, exported),
        **_tensors(kept.b, b, kept.scale, exported),
    }


def folded(stored: BaseWeight, scale: float, tensors: Mapping[str, Array]) -> Array:
    """The numbers that codes stand for, ``[d_in, d_out]``, with the graph's scale: as extraction reads them."""
    return read_weight(stored, tensors.__getitem__) * np.float32(scale)


def _tensors(stored: BaseWeight, weight: Array, scale: float, exported: Mapping[str, Array]) -> dict[str, Array]:
    if np.array_equal(folded(stored, scale, exported).astype(weight.dtype), weight):
        return {name: exported[name] for name in stored.tensors.values()}
    # A grid of no extent fits nothing, so that none of the exported one is kept for the new numbers.
    like = dict(exported)
    if stored.quantized:
        like[stored.tensors[SCALE]] = np.zeros_like(exported[stored.tensors[SCALE]])
    return written(stored, weight.astype(np.float32) / np.float32(scale), like.__getitem__)
