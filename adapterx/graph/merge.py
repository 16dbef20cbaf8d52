"""merge_adapter: an adapter folded into the base weights of an ONNX model; unmerge_adapter takes it out again."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import onnx_ir as ir

from adapterx.adapter import Adapter
from adapterx.errors import MismatchError, ModelError, NoAdaptersFound, OptionError
from adapterx.formats import load_adapter
from adapterx.graph.bases import find_bases
from adapterx.graph.load import ModelLike, check_model, load_model
from adapterx.graph.merge_edits import Edit, edits_of
from adapterx.graph.merge_plan import Planned, Request, plan
from adapterx.graph.merged_files import write_merged
from adapterx.graph.portless import take_out_ports
from adapterx.graph.save import save_model, staged
from adapterx.graph.sites import AdapterLike, find, label
from adapterx.graph.stored import weight_values
from adapterx.manifest import KEY, Manifest, manifest_of
from adapterx.merge_table import Merge, MergeRow


def merge_adapter(
    model: ModelLike,
    adapter: AdapterLike,
    output: str | os.PathLike[str],
    *,
    weight: float = 1.0,
    keep_ports: bool = False,
    partial: bool = False,
) -> Merge:
    """Fold an adapter into the base weights of a model: ``W' = W + weight * b.T @ a``, and likewise for every kind.

    Sums are made in float32 and rounded once. A quantized weight is dequantized, added to, and quantized again in the
    same block and scheme; the rows of the result say what that costs. What several operations read (a head tied to an
    embedding) is only changed for the one that the adapter adapts. Data files are copied, their merged weights written
    block by block: a model of any size takes little memory.

    Args:
        model: a model that never had adapters, or one that :func:`extract_adapters` or :func:`inject_adapters` made;
            path, ``onnx.ModelProto`` or ``onnx_ir.Model``; never changed
        adapter: a PEFT folder, an adapter file or an ``Adapter``
        output: the merged model's file; written whole or not at all. Beside it in ``<output>.data`` its weights, where
            the model's lie in a data file
        weight: how much of the adapter; 0.5 is half
        keep_ports: the result takes adapters as the model did, on top of the merged one; else it is a plain model
        partial: take an adapter that has sites in other files too (an encoder's, in a decoder)

    Returns:
        Path and one row a site; prints as a table.

    Raises:
        MismatchError: the adapter does not fit; names every fault. Nothing is written.
        ModelError: the model cannot be read, still holds an adapter, or is ``output``.
        FormatError: the adapter cannot be read.
        OptionError: ``weight`` is no number.
        OSError: no permission, disk full.
    """
    if not math.isfinite(weight):
        raise OptionError(f"weight={weight!r} is no number to multiply an adapter with; 1.0 is all of it")
    whole = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    return _merged(model, Request(whole, weight, partial=partial), Path(output), keep_ports=keep_ports)


def unmerge_adapter(
    model: ModelLike,
    adapter: AdapterLike,
    output: str | os.PathLike[str],
    *,
    weight: float = 1.0,
    partial: bool = False,
) -> Merge:
    """Take out what :func:`merge_adapter` folded in, to within rounding of the weights' type.

    Args:
        model: what :func:`merge_adapter` wrote
        adapter: the one that was merged
        output: as for :func:`merge_adapter`
        weight: as it was merged
        partial: as it was merged

    Raises:
        MismatchError: a quantized weight, or a kind that replaced numbers of the base (DoRA, modules trained in full):
            what was there is not in the merged model any more. And as :func:`merge_adapter`.
    """
    whole = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
    return _merged(model, Request(whole, weight, undo=True, partial=partial), Path(output), keep_ports=True)


def _merged(model: ModelLike, request: Request, path: Path, *, keep_ports: bool) -> Merge:
    loaded, where = load_model(model), label(model)
    source = Path(model) if isinstance(model, str | os.PathLike) else None
    if source is not None and path.exists() and path.samefile(source):
        raise ModelError(f"{path} is the model itself; merge into another file")
    manifest = manifest_of(loaded.metadata_props, where=where)
    if manifest is None:
        _refuse_adapters(loaded, where)
    else:
        required = {site.name: site for site in manifest.sites if site.name in manifest.required}
        request = dataclasses.replace(request, elsewhere=manifest.elsewhere, required=required)
    values = weight_values(loaded)
    planned = plan(find_bases(loaded), values, request)
    if manifest is not None and not keep_ports:
        _refuse_lost(manifest, planned)
        take_out_ports(loaded, manifest)
    elif manifest is not None:
        # What was merged is another base, which adapters for this one may or may not suit.
        loaded.metadata_props[KEY] = dataclasses.replace(manifest, fingerprint="").dumps()
    edits = edits_of(loaded, planned, values)
    check_model(loaded, f"the model merged from {where}")
    ours = manifest.location if manifest is not None and keep_ports else None
    rows = _save(loaded, edits, path, ours=ours, beside=None if source is None else source.parent)
    return Merge(path, tuple(_in_order(planned, rows)))


def _refuse_adapters(model: ir.Model, where: str) -> None:
    try:
        found = find(model, where=where)
    except NoAdaptersFound:
        return
    raise ModelError(
        f"{where} still holds an adapter, at {len(found.sites)} sites; take it out with extract_adapters first, and "
        "merge into the extracted model"
    )


def _refuse_lost(manifest: Manifest, planned: list[Planned]) -> None:
    """Sites whose base is not in the graph have to come from the adapter."""
    given = {one.base.name for one in planned}
    lost = [name for name in manifest.required if name not in given]
    if lost:
        raise MismatchError(
            f"the model has no base at {', '.join(lost)}, which were trained in full, and the adapter says nothing of "
            "them; merge with keep_ports=True, or an adapter that has them"
        )


def _save(model: ir.Model, edits: list[Edit], path: Path, *, ours: str | None, beside: Path | None) -> list[MergeRow]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path.parent) as stage:
        rows, written = write_merged(model, edits, path, stage)
        save_model(model, path, stage, ours=ours, share_weights=False, written=written, beside=beside)
    return rows


def _in_order(planned: list[Planned], rows: list[MergeRow]) -> list[MergeRow]:
    """A row for each site, that of a bias alone included, in the order of the graph."""
    by_site: dict[str, list[MergeRow]] = {one.base.name: [] for one in planned}
    for row in rows:
        by_site[row.site].append(row)
    return [row for site, found in by_site.items() for row in found or [MergeRow(site, "", "bias")]]
