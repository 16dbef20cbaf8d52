"""convert_adapter: any adapter file as another, and as one model takes it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import ml_dtypes  # noqa: F401  (numpy knows the name "bfloat16" only after this import)
import numpy as np
import onnx
import onnx_ir as ir

from adapterx.adapter import LORA_A, LORA_B, Adapter, Array, LowRank
from adapterx.errors import FormatError, MismatchError, OptionError, nearest
from adapterx.faults import Faults
from adapterx.formats import load_adapter, save_adapter
from adapterx.formats.detect import Written, written_format
from adapterx.formats.onnx_adapter import write_tensors
from adapterx.formats.quantized import Quantization, check
from adapterx.graph.bases import find_bases
from adapterx.graph.extract import base_fingerprint
from adapterx.graph.load import ModelLike, load_model, read_proto
from adapterx.graph.sites import AdapterLike, find, label
from adapterx.kinds.lora import cast
from adapterx.limits import Limits
from adapterx.manifest import Manifest, SiteBase, manifest_of
from adapterx.pipeline import component as component_of
from adapterx.runtime.base_tensors import BaseTensors
from adapterx.runtime.fit import fit
from adapterx.runtime.plain import plain, taking_all
from adapterx.runtime.ports import port_arrays, rounded
from adapterx.site import LOW_RANK, VECTORS, AdapterSite, by_name
from adapterx.truncation import distance, truncated_adapter

Dtype = Literal["float32", "float16", "bfloat16"]
_DTYPES = ("float32", "float16", "bfloat16")

# In the metadata of a quantized adapter: how far its changes are from those before.
ERROR = "quantization_error"


def convert_adapter(  # noqa: PLR0913 - each option is one thing that is asked for, all by name
    adapter: AdapterLike,
    model: ModelLike | None,
    output: str | os.PathLike[str],
    *,
    format: Written | None = None,
    allow_other_base: bool = False,
    component: str | None = None,
    fill_missing: bool = False,
    rank: int | None = None,
    dtype: Dtype | None = None,
    quantize: Quantization | None = None,
) -> Adapter:
    """Read an adapter of any format, fit it to a model and write it in any format.

    Fitting gives it the model's site names, element type and parts: fused layers are taken apart or put together,
    flattened names of kohya files are found, DoRA and whole weights are set against the base weight. A file of ours
    always holds ``<site>.lora_A.weight`` and ``<site>.lora_B.weight``, which are also the names of the model's inputs,
    so an ``.onnx_adapter`` file serves ``onnxruntime.LoraAdapter`` as it is; for a model that takes int8 it holds the
    codes and their scales. Packed inputs have other names and are
    not in any file: :class:`adapterx.AdapterSession` packs what it reads. Where inputs have a fixed rank, or may not
    be left out, rows of zeros fill up what the adapter lacks; they change no result.

    Args:
        adapter: a file, a PEFT folder or an ``Adapter``
        model: an extracted model, whose manifest names the sites, or an exported one, in which they are looked for;
            ``None`` changes the format only
        output: ``.safetensors``, ``.onnx_adapter`` or ``.npz``; a folder, or a path without suffix, for PEFT
        format: the format, where the suffix does not tell: ``"peft"``, ``"kohya"``, ``"diffusers"`` ...
        allow_other_base: take an adapter although it says that it was made for another base
        component: of an adapter for a pipeline, the part of one model (``"text_encoder_2"``), where names and shapes of
            the sites do not tell which is meant
        fill_missing: write zeros for every site of the model that the adapter lacks
        rank: the most that a site keeps, by truncated SVD. What a site of the model does not take (the gain of DoRA or
            (IA)3) becomes part of the low-rank change. The metadata ``truncation_error`` and ``truncation_errors`` of
            the result say what it cost, relative in the Frobenius norm, of all and by site
        dtype: of the tensors in the file, in place of the model's or the adapter's own
        quantize: ``"int8"`` or ``"int4"``, see :func:`adapterx.save_adapter`. The metadata ``quantization_error`` of
            the result says how far the changes are from those before

    Returns:
        What was written (of a quantized file, the values that are read back).

    Raises:
        MismatchError: the adapter does not belong to the model; names every fault. Nothing is written.
        NoAdaptersFound: the model has no sites.
        FormatError: the adapter cannot be read, or the output's format cannot hold it.
        OptionError: a suffix or format that there is not, or options that contradict each other.
        ModelError: the model cannot be read.
    """
    # Known before gigabytes are read.
    kind = written_format(output, format)
    _check_options(kind, fill_missing and model is None, dtype, quantize)
    name = adapter.metadata.get("adapter_name", "adapter") if isinstance(adapter, Adapter) else Path(adapter).stem
    whole = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    if component is not None:
        whole = component_of(whole, component)
    if model is not None:
        target = _Target(model)
        fitting = target.fitted(whole, name=name, allow_other_base=allow_other_base, rank=rank)
        whole = _filled(fitting, target.manifest, everything=fill_missing)
        if kind == "onnx_adapter" and dtype is None and _takes_codes(target.manifest):
            return _write_codes(whole, target.manifest, output)
    elif rank is not None:
        whole = truncated_adapter(_without_base(whole), rank)
    if dtype is not None:
        whole = _cast(whole, np.dtype(dtype), name)
    save_adapter(whole, output, format=kind, quantize=quantize)
    return whole if quantize is None else _read_back(whole, output)


def _check_options(kind: Written, nothing_to_fill: bool, dtype: str | None, quantize: str | None) -> None:
    if dtype is not None and dtype not in _DTYPES:
        raise OptionError(
            f"dtype={dtype!r} is no option; expected one of {', '.join(_DTYPES)}{nearest(dtype, _DTYPES)}"
        )
    check(quantize, kind)
    if quantize is not None and dtype is not None:
        raise OptionError(f"quantize={quantize!r} decides the type of the tensors; dtype={dtype!r} cannot, too")
    if nothing_to_fill:
        raise OptionError("fill_missing fills sites of a model, and there is no model")


class _Target:
    """A model that adapters are converted for; its weights are only read for kinds that need them."""

    def __init__(self, model: ModelLike) -> None:
        self._model, self._loaded, self._where = model, load_model(model), label(model)
        manifest = manifest_of(self._loaded.metadata_props, where=self._where)
        self.manifest = self._found() if manifest is None else manifest

    def fitted(self, adapter: Adapter, *, name: str, allow_other_base: bool, rank: int | None) -> Adapter:
        manifest = self.manifest
        if rank is None:
            needed = any(not change.is_relative for change in adapter.sites.values())
            tensors = self._tensors() if needed and manifest.bases else None
            return fit(adapter, manifest, name=name, allow_other_base=allow_other_base, bases=tensors)
        bases, tensors = self._bases(), self._tensors()
        wide = taking_all(manifest, bases)
        fitting = fit(adapter, wide, name=name, allow_other_base=allow_other_base, bases=tensors)
        fitting, lost = plain(fitting, manifest, bases, tensors, rank=rank)
        cut = truncated_adapter(fitting, rank, lost)
        limits = {} if manifest.dynamic_rank else {site.name: site.rank for site in manifest.sites}
        if over := [site for site, change in cut.sites.items() if change.rank > limits.get(site, change.rank)]:
            raise OptionError(
                f"rank={rank} is more than the {limits[over[0]]} that the model's port of {over[0]} takes"
            )
        return cut

    def _found(self) -> Manifest:
        """What extraction would write into the model."""
        finding = find(self._loaded, where=self._where)
        return Manifest(finding.sites, "input", dynamic_rank=True, optional=True, fingerprint=base_fingerprint(finding))

    def _bases(self) -> dict[str, SiteBase]:
        found = find_bases(self._loaded)
        return {
            base.name: SiteBase(base.weight, "" if base.bias is None else base.bias.name or "") for base in found
        } | dict(self.manifest.bases)

    def _tensors(self) -> BaseTensors:
        if isinstance(self._model, str | os.PathLike):
            path = Path(self._model)
            return BaseTensors(read_proto(path), path.parent, self._where)
        proto = self._model if isinstance(self._model, onnx.ModelProto) else ir.to_proto(self._model)
        return BaseTensors(proto, None, self._where)


def _without_base(adapter: Adapter) -> Adapter:
    if absolute := [site for site, change in adapter.sites.items() if not change.is_relative]:
        parts = ", ".join(sorted(adapter.sites[absolute[0]].parts))
        raise MismatchError(
            f"{absolute[0]} brings {parts}, which only a base weight makes a change of low rank; give the model"
        )
    return adapter


def _cast(adapter: Adapter, dtype: np.dtype[np.generic], name: str) -> Adapter:
    """``adapter`` in ``dtype``; every site whose values it cannot hold is named."""
    faults, sites = Faults(f"adapter {name!r}"), {}
    for site, change in adapter.sites.items():
        if change.dtype == dtype:
            sites[site] = change
            continue
        try:
            parts = {part: cast(array, dtype, part) for part, array in change.parts.items()}
            a, b = cast(change.a, dtype, LORA_A), cast(change.b, dtype, LORA_B)
            sites[site] = LowRank(a=a, b=b, parts=parts)
        except ValueError:
            faults.add(site, f"finite values of {change.dtype} become infinite in {dtype}")
    faults.refuse(
        "it cannot be cast", advice="Nothing was written. bfloat16 has the range of float32.", error=FormatError
    )
    return Adapter(sites, adapter.metadata)


def _takes_codes(manifest: Manifest) -> bool:
    return manifest.port == "input" and any(site.dtype == "int8" for site in manifest.sites)


def _write_codes(adapter: Adapter, manifest: Manifest, path: str | os.PathLike[str]) -> Adapter:
    """The inputs of the model themselves, which plain ONNX Runtime can be given; returns what they stand for."""
    arrays = port_arrays(adapter, dataclasses.replace(manifest, optional=True, required=()))
    write_tensors(arrays.items(), path, fingerprint=adapter.metadata.get("base_fingerprint", ""))
    return rounded(adapter, manifest)


def _read_back(adapter: Adapter, path: str | os.PathLike[str]) -> Adapter:
    """What codes in a file make of ``adapter``, and how far that is from it."""
    limits = Limits(rank=max(adapter.ranks), ndim=8, file_bytes=Path(path).stat().st_size)
    written = load_adapter(path, limits=limits)
    return Adapter(written.sites, {**adapter.metadata, ERROR: f"{distance(adapter, written):.6g}"})


def _filled(adapter: Adapter, manifest: Manifest, *, everything: bool) -> Adapter:
    """``adapter`` with every input that plain ONNX Runtime would miss, at the rank that it would insist on.

    Args:
        adapter: fitted
        manifest: the model's
        everything: every site gets its tensors, also those that may be left out
    """
    if not everything and (manifest.port != "input" or (manifest.dynamic_rank and manifest.optional)):
        return adapter
    sites = dict(adapter.sites)
    for name, site in by_name(manifest.sites).items():
        held = sites.get(name)
        if held is None and manifest.optional and not everything:
            continue
        # Files cannot hold a rank of 0, so an absent site of any rank gets one row.
        fixed = manifest.port != "external" and not manifest.dynamic_rank
        rank = site.rank if fixed else max(held.rank if held is not None else 0, 1)
        sites[name] = _padded(held, site, rank, vectors=everything or not manifest.optional)
    unchanged = sites.keys() == adapter.sites.keys() and all(sites[name] is adapter.sites[name] for name in sites)
    return adapter if unchanged else Adapter(sites, adapter.metadata)


def _padded(held: LowRank | None, site: AdapterSite, rank: int, *, vectors: bool) -> LowRank:
    """``held`` with ``rank`` rows, and with what else its site takes where ``vectors``."""
    dtype = np.dtype(site.fitted_dtype)
    parts: Mapping[str, Array] = {} if held is None else held.parts
    if vectors:
        parts = {**{port: np.zeros((1, *site.width(port)), dtype) for port in site.ports if port in VECTORS}, **parts}
    if not set(LOW_RANK) & set(site.ports):
        return LowRank.of_parts(parts) if held is None or len(parts) > len(held.parts) else held
    if held is not None and held.rank == rank and len(parts) == len(held.parts):
        return held
    a, b = np.zeros((rank, *site.width(LORA_A)), dtype), np.zeros((rank, *site.width(LORA_B)), dtype)
    if held is not None and held.rank:
        a[: held.rank], b[: held.rank] = held.a, held.b
    return LowRank(a=a, b=b, parts=parts)
