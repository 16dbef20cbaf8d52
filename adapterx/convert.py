"""convert_adapter: any adapter file, as one model takes it, in the format of the output's suffix."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from adapterx.adapter import Adapter, Array, LowRank
from adapterx.errors import OptionError, nearest
from adapterx.formats import load_adapter, save_adapter
from adapterx.formats.detect import BY_SUFFIX
from adapterx.graph.extract import base_fingerprint
from adapterx.graph.load import ModelLike, load_model
from adapterx.graph.sites import AdapterLike, find, label
from adapterx.manifest import Manifest, manifest_of
from adapterx.runtime.fit import fit
from adapterx.site import AdapterSite, by_name


def convert_adapter(
    adapter: AdapterLike, model: ModelLike, output: str | os.PathLike[str], *, allow_other_base: bool = False
) -> Adapter:
    """Read an adapter, fit it to a model and write it: the model's site names, its element type, its parts.

    A file always holds ``<site>.lora_A.weight`` and ``<site>.lora_B.weight``, which are also the names of the model's
    inputs, so an ``.onnx_adapter`` file serves ``onnxruntime.LoraAdapter`` as it is. Packed inputs have other names
    and are not in any file: :class:`adapterx.AdapterSession` packs what it reads. Where inputs have a fixed
    rank, or may not be left out, rows of zeros fill up what the adapter lacks; they change no result.

    Args:
        adapter: a file, a PEFT folder or an ``Adapter``
        model: an extracted model, whose manifest names the sites, or an exported one, in which they are looked for
        output: ``.safetensors``, ``.onnx_adapter`` or ``.npz``; replaced if it exists
        allow_other_base: take an adapter although it says that it was made for another base

    Returns:
        What was written.

    Raises:
        MismatchError: the adapter does not belong to the model; names every fault. Nothing is written.
        NoAdaptersFound: the model has no sites.
        FormatError: the adapter cannot be read, or the output's format cannot hold it.
        OptionError: a suffix that is no format.
        ModelError: the model cannot be read.
    """
    # Known before gigabytes are read.
    if Path(output).suffix.lower() not in BY_SUFFIX:
        met = Path(output).suffix
        raise OptionError(
            f"{output}: the suffix {met!r} is no format that is written; expected one of {', '.join(BY_SUFFIX)}"
            f"{nearest(met, BY_SUFFIX)}"
        )
    manifest = _manifest(model)
    name = adapter.metadata.get("adapter_name", "adapter") if isinstance(adapter, Adapter) else Path(adapter).stem
    whole = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    fitting = fit(whole, manifest, name=name, allow_other_base=allow_other_base)
    complete = _filled(fitting, manifest)
    save_adapter(complete, output)
    return complete


def _manifest(model: ModelLike) -> Manifest:
    """The model's own, or what extraction would write into it."""
    loaded, where = load_model(model), label(model)
    manifest = manifest_of(loaded.metadata_props, where=where)
    if manifest is not None:
        return manifest
    finding = find(loaded, where=where)
    return Manifest(finding.sites, "input", dynamic_rank=True, optional=True, fingerprint=base_fingerprint(finding))


def _filled(adapter: Adapter, manifest: Manifest) -> Adapter:
    """``adapter`` with every input that plain ONNX Runtime would miss, at the rank that it would insist on."""
    if manifest.port != "input" or (manifest.dynamic_rank and manifest.optional):
        return adapter
    sites = dict(adapter.sites)
    for name, site in by_name(manifest.sites).items():
        held = sites.get(name)
        if held is None and manifest.optional:
            continue
        # Files cannot hold a rank of 0, so an absent site of any rank gets one row.
        rank = site.rank if not manifest.dynamic_rank else 1 if held is None else held.rank
        sites[name] = _padded(held, site, rank)
    unchanged = sites.keys() == adapter.sites.keys() and all(sites[name] is adapter.sites[name] for name in sites)
    return adapter if unchanged else Adapter(sites, adapter.metadata)


def _padded(held: LowRank | None, site: AdapterSite, rank: int) -> LowRank:
    if held is None:
        dtype = np.dtype(site.dtype)
        return LowRank(a=np.zeros((rank, site.d_in), dtype), b=np.zeros((rank, site.d_out), dtype))
    if held.rank == rank:
        return held
    return LowRank(a=_rows(held.a, rank), b=_rows(held.b, rank))


def _rows(array: Array, rank: int) -> Array:
    filled = np.zeros((rank, array.shape[1]), array.dtype)
    filled[: len(array)] = array
    return filled
