"""extract_adapters: take the adapter out of an exported model and leave ports in its place."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir

from adapterx.adapter import Adapter, LowRank
from adapterx.combination import combine
from adapterx.errors import ModelError, OptionError, nearest
from adapterx.formats import save_adapter
from adapterx.graph.bases import find_bases
from adapterx.graph.branch_weights import low_rank_of
from adapterx.graph.calibration import refuse_calibrated
from adapterx.graph.fingerprint import fingerprint_of
from adapterx.graph.load import ModelLike, check_model, load_model
from adapterx.graph.ported import Origin, give_ports
from adapterx.graph.ports import Masks, PortOptions, Ports
from adapterx.graph.rewire import blank, bypass, put_exported, rewire
from adapterx.graph.save import save_model, staged, target_of
from adapterx.graph.shapes import Shapes
from adapterx.graph.sites import AdapterLike, Finding, Found, find, label, refuse_partial
from adapterx.manifest import Manifest, SiteBase, manifest_of
from adapterx.site import VECTORS, AdapterSite, SiteTable

AdapterFormat = Literal["safetensors", "onnx_adapter", "npz"]
StaticQDQ = Literal["refuse", "allow"]



@dataclasses.dataclass(frozen=True, slots=True)
class Extraction:
    """What :func:`extract_adapters` wrote.

    Args:
        model_path: the model with ports instead of adapter weights
        adapter_path: the adapter, in the format asked for
        adapter: the same in memory; where several adapters were active at once, their exact sum
        adapters: each adapter by the name it had in the export
        sites: one row a site, as in the manifest
        notes: what was allowed and makes other adapters inexact, one line a site
    """

    model_path: Path
    adapter_path: Path
    adapter: Adapter
    adapters: Mapping[str, Adapter]
    sites: SiteTable
    notes: tuple[str, ...] = ()


def extract_adapters(  # noqa: PLR0913 - the options of the contract, all by name
    model: ModelLike,
    output_dir: str | os.PathLike[str],
    *,
    make_inputs: bool = False,
    pack_inputs: bool = False,
    dynamic_rank: bool = True,
    optional_inputs: bool = True,
    adapter_format: AdapterFormat = "safetensors",
    adapter: AdapterLike | None = None,
    structural: bool = False,
    partial: bool = False,
    static_qdq: StaticQDQ = "refuse",
) -> Extraction:
    """Take the adapters out of an exported model.

    Every site becomes one ``LowRankAdd`` node (``docs/ops.md``) that reads its weights from a port; everything else in
    the graph keeps its names. The model carries a manifest of its sites. External data is linked or copied
    file by file, never read.

    Args:
        model: path, ``onnx.ModelProto`` or ``onnx_ir.Model``; never changed
        output_dir: made if it is not there. The model keeps its file name; ``adapter.<format>`` goes beside it.
        make_inputs: weights become graph inputs; else external initializers whose file does not exist, to be given
            to a session when it is made
        pack_inputs: one input per module type and side, split in the graph (needs ``make_inputs``)
        dynamic_rank: inputs take adapters of any rank, each site its own
        optional_inputs: an input that is not fed makes its site the base
        adapter_format: ``safetensors``, ``onnx_adapter`` or ``npz``
        adapter: the adapter that was exported, for models that lost their names (see :func:`find_sites`), and for
            one file of several (encoder, decoder): its sites that this file lacks are noted in the manifest
        structural: take branches by structure alone, under structural names
        partial: extract the low-rank sites of a model that also has adapter weights of other kinds, which stay
        static_qdq: what to do where activations around the adapter were quantized with ranges that were measured with
            it: ``refuse``, or ``allow``, which puts float ports there although what follows them keeps those ranges
            (``notes`` of the result says which)

    Returns:
        Paths, the adapter and the sites.

    Raises:
        NoAdaptersFound: nothing to take; says what was looked at. Nothing is written.
        ModelError: broken or already extracted model, weights of other kinds, or a target that is the source.
        OptionError: options that contradict each other or do not exist.
    """
    _check_options(make_inputs, pack_inputs, adapter_format, static_qdq)
    loaded, where = load_model(model), label(model)
    if manifest_of(loaded.metadata_props, where=where) is not None:
        raise ModelError(f"{where} was extracted already; give the model that was exported, or use this one as it is")
    finding = find(loaded, adapter=adapter, structural=structural, where=where)
    notes = finding.calibrated
    if static_qdq == "refuse":
        refuse_calibrated(notes, where)
    if not partial:
        refuse_partial(finding, where)
    path = target_of(model, Path(output_dir))
    port: Literal["input", "packed", "external"] = "packed" if pack_inputs else "input" if make_inputs else "external"
    options = PortOptions(port, dynamic_rank, optional_inputs, f"{path.stem}.adapter.bin")
    adapters = _read_adapters(finding, where)
    fingerprint = base_fingerprint(finding)
    manifest = _rewrite(loaded, finding, options, fingerprint)
    check_model(loaded, f"the model extracted from {where}")
    whole = _sum([Adapter(a.sites, {**a.metadata, "base_fingerprint": fingerprint}) for a in adapters.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter_path = path.parent / f"adapter.{adapter_format}"
    files = {adapter_path: whole}
    if len(adapters) > 1:
        files |= {path.parent / f"adapter.{name}.{adapter_format}": one for name, one in adapters.items()}
    with staged(path.parent) as stage:
        for file, one in files.items():
            save_adapter(one, stage / file.name)
        save_model(loaded, path, stage, ours=manifest.location, share_weights=port == "external")
    return Extraction(path, adapter_path, whole, adapters, manifest.sites, notes)


def _check_options(make_inputs: bool, pack_inputs: bool, adapter_format: str, static_qdq: str) -> None:
    if pack_inputs and not make_inputs:
        raise OptionError("pack_inputs packs graph inputs, so it needs make_inputs=True; got make_inputs=False")
    told = {"adapter_format": (adapter_format, AdapterFormat), "static_qdq": (static_qdq, StaticQDQ)}
    for option, (given, kind) in told.items():
        known = get_args(kind)
        if given not in known:
            hint = nearest(str(given), known)
            raise OptionError(f"{option} must be one of {', '.join(known)}; got {given!r}{hint}")


def _read_adapters(finding: Finding, where: str) -> dict[str, Adapter]:
    """Each adapter by its name in the export, scale folded in."""
    by_name: dict[str, dict[str, LowRank]] = {}
    for found in finding.found:
        by_name.setdefault(found.site.adapter or "default", {})[found.site.name] = low_rank_of(found.branches[0])
    for other in finding.others:
        by_name.setdefault(other.site.adapter or "default", {})[other.site.name] = other.places[0].change
    source = {"source": where, "format": "onnx"}
    return {name: Adapter(sites, {**source, "adapter_name": name}) for name, sites in by_name.items()}


def _sum(adapters: list[Adapter]) -> Adapter:
    """The exact sum: ranks one after another. One adapter is itself."""
    if len(adapters) == 1:
        return adapters[0]
    name = "+".join(adapter.metadata["adapter_name"] for adapter in adapters)
    total = combine([(adapter, 1.0) for adapter in adapters])
    return Adapter(total.sites, {**adapters[0].metadata, "adapter_name": name})


def _rewrite(model: ir.Model, finding: Finding, options: PortOptions, fingerprint: str) -> Manifest:
    """Change ``model`` in place; returns the manifest that it now carries."""
    places: dict[str, list[Found]] = {}
    for found in finding.found:
        places.setdefault(found.site.name, []).append(found)
    others = {other.site.name: other for other in finding.others}
    if both := sorted(others.keys() & places.keys()):
        raise ModelError(
            f"{both[0]} has adapters of two kinds, lora and {others[both[0]].site.kind}; export one at a time"
        )
    sites = SiteTable([*(_place(members) for members in places.values()), *(other.site for other in others.values())])
    shapes = Shapes(model)
    ranks = {branch: shapes.rank(branch.x) or 2 for found in finding.found for branch in found.branches}
    required = {name for name, other in others.items() if any(p.trained or p.prompt for p in other.places)}
    required |= {found.site.name for found in finding.found if found.trained}
    for trained in (*(f.trained for f in finding.found), *(p.trained for o in finding.others for p in o.places)):
        blank(model, trained)

    def put(site: AdapterSite, ports: Ports, masks: Masks) -> None:
        if site.name in others:
            for exported in others[site.name].places:
                put_exported(model, exported, site, ports, masks, shapes=shapes)
            return
        first, *rest = places[site.name]
        for branch in first.branches:
            rewire(model, branch, site, ports, masks, rank=ranks[branch])
        for found in rest:
            for branch in found.branches:
                bypass(branch)

    origin = Origin(fingerprint, finding.base_model, finding.absent, _bases(model, finding))
    return give_ports(model, sites, dataclasses.replace(options, required=frozenset(required)), put, origin=origin)


def _bases(model: ir.Model, finding: Finding) -> dict[str, SiteBase]:
    """Where weight and bias of the sites lie that adapters of absolute parts can be lowered for."""
    ops = {other.site.name: other.places[0].op for other in finding.others if set(other.site.ports) & VECTORS}
    ops |= {f.site.name: f.branches[0].base_op for f in finding.found if set(f.site.ports) & VECTORS}
    if not ops:
        return {}
    known = {base.op: base for base in find_bases(model)}
    return {
        name: SiteBase(known[op].weight, "" if (bias := known[op].bias) is None else bias.name or "")
        for name, op in ops.items()
        if op in known
    }


def _place(members: list[Found]) -> AdapterSite:
    """One row for a place; the port of several adapters holds their sum."""
    rank = sum(found.site.rank for found in members)
    name = "+".join(found.site.adapter for found in members)
    return dataclasses.replace(members[0].site, rank=rank, adapter=name)


def base_fingerprint(finding: Finding) -> str:
    """:func:`adapterx.graph.fingerprint.fingerprint_of` what was found."""
    return fingerprint_of((found.site.name, found.branches[0].base_op) for found in finding.found)
