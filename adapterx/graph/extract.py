"""extract_adapters: take the adapter out of an exported model and leave ports in its place."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import onnx_ir as ir

from adapterx.adapter import INPUT_GAIN, PROMPT, SHIFT, Adapter, LowRank
from adapterx.base_weight import BaseWeight
from adapterx.combination import combine
from adapterx.errors import ModelError, OptionError, nearest
from adapterx.formats import save_adapter
from adapterx.graph.attach import Place
from adapterx.graph.bases import Base, find_bases
from adapterx.graph.branch_weights import low_rank_of
from adapterx.graph.calibration import refuse_calibrated
from adapterx.graph.exported import Exported
from adapterx.graph.fingerprint import fingerprint_of
from adapterx.graph.kept import into_file, is_quantized, keep
from adapterx.graph.load import ModelLike, check_model, load_model
from adapterx.graph.masks import Masks
from adapterx.graph.other_kinds import Other
from adapterx.graph.ported import Origin, give_ports
from adapterx.graph.ports import PortOptions, Ports
from adapterx.graph.rewire import blank, bypass, bypass_exported, put_exported, put_prompt, rewire
from adapterx.graph.save import save_model, staged, target_of
from adapterx.graph.shapes import Shapes
from adapterx.graph.site_rows import SiteRows, site_rows
from adapterx.graph.sites import AdapterLike, Finding, Found, find, label, refuse_partial
from adapterx.graph.stored import weight_values
from adapterx.manifest import KEY, Kept, Manifest, SiteBase, manifest_of
from adapterx.port_dtype import AdapterDtype, check, for_ports, in_dtype
from adapterx.site import LOW_RANK, VECTORS, AdapterSite, SiteTable

AdapterFormat = Literal["safetensors", "onnx_adapter", "npz"]
Quantized = Literal["float", "keep"]
StaticQDQ = Literal["refuse", "allow"]

# What the ports of one site can hold the sum of.
_ADDED = frozenset({*LOW_RANK, SHIFT})
_CHOICES = {"adapter_format": AdapterFormat, "quantized": Quantized, "static_qdq": StaticQDQ}


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
    quantized: Quantized = "float",
    static_qdq: StaticQDQ = "refuse",
    adapter_dtype: AdapterDtype | None = None,
) -> Extraction:
    """Take the adapters out of an exported model.

    Every site of plain LoRA becomes one ``LowRankAdd`` node (``docs/ops.md``) that reads its weights from a port, those
    of other kinds a few nodes more; everything else in the graph keeps its names. A base that an adapter replaced
    whole (a head, a prompt) is not in the graph: such sites must be fed (``Manifest.required``). The model carries a
    manifest of its sites. External data is linked or copied file by file, never read.

    Args:
        model: path, ``onnx.ModelProto`` or ``onnx_ir.Model``; never changed
        output_dir: made if it is not there. The model keeps its file name; ``adapter.<format>`` goes beside it.
        make_inputs: weights become graph inputs; else external initializers whose file does not exist, to be given
            to a session when it is made
        pack_inputs: one input per module type and side, split in the graph (needs ``make_inputs``)
        dynamic_rank: inputs take adapters of any rank, each site its own
        optional_inputs: an input that is not fed makes its site the base
        adapter_format: ``safetensors``, ``onnx_adapter`` or ``npz``
        adapter: the adapter that was exported, for models that lost their names (see :func:`find_sites`), for those
            whose biases were trained with it (``bias="lora_only"``), which stay in the base otherwise, and for one
            file of several (encoder, decoder): its sites that this file lacks are noted in the manifest
        structural: take branches by structure alone, under structural names
        partial: extract what can be taken of a model that also has adapter weights that cannot, which stay
        quantized: what becomes of an adapter that was quantized with its base: ``float`` ports, of any rank, or
            ``keep``, which leaves its codes in the graph as external initializers; other adapters are then quantized
            the same way when they are loaded, and their rank is at most the exported one (not with ``make_inputs``)
        static_qdq: what to do where activations around the adapter were quantized with ranges that were measured with
            it: ``refuse``, or ``allow``, which puts float ports there although what follows them keeps those ranges
            (``notes`` of the result says which)
        adapter_dtype: element type of the ports of linear layers, in place of that of their activations:
            ``"float32"``, ``"float16"``, ``"bfloat16"``, or ``"int8"`` for codes with a scale for each rank, which a
            session makes of the floats that it is given (needs ``make_inputs``). The adapter is written in a float
            type of the ports; for ``int8`` as it was exported

    Returns:
        Paths, the adapter and the sites.

    Raises:
        NoAdaptersFound: nothing to take; says what was looked at. Nothing is written.
        ModelError: broken or already extracted model, weights of other kinds, or a target that is the source.
        MismatchError: the exported adapter has values that ``adapter_dtype`` cannot hold; names the sites.
        OptionError: options that contradict each other or do not exist.
    """
    check(adapter_dtype, as_inputs=make_inputs)
    _check_choices(adapter_format=adapter_format, quantized=quantized, static_qdq=static_qdq)
    _check_ports(make_inputs=make_inputs, pack_inputs=pack_inputs, quantized=quantized)
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
    adapters = adapters_of(finding, where)
    fingerprint = base_fingerprint(finding)
    manifest = _rewrite(
        loaded, finding, options, fingerprint, keep_codes=quantized == "keep", adapter_dtype=adapter_dtype
    )
    check_model(loaded, f"the model extracted from {where}")
    if adapter_dtype is not None:
        adapters = {name: for_ports(one, manifest.sites, adapter_dtype) for name, one in adapters.items()}
    whole = whole_of([Adapter(a.sites, {**a.metadata, "base_fingerprint": fingerprint}) for a in adapters.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter_path = path.parent / f"adapter.{adapter_format}"
    files = {adapter_path: whole}
    if len(adapters) > 1:
        files |= {path.parent / f"adapter.{name}.{adapter_format}": one for name, one in adapters.items()}
    with staged(path.parent) as stage, tempfile.TemporaryDirectory() as codes:
        for file, one in files.items():
            save_adapter(one, stage / file.name)
        _move_codes(loaded, manifest, Path(codes) / f"{path.stem}.adapter.codes.bin")
        save_model(loaded, path, stage, ours=manifest.location, share_weights=port == "external")
    return Extraction(path, adapter_path, whole, adapters, manifest.sites, notes)


def _check_choices(**given: str) -> None:
    for option, value in given.items():
        known = get_args(_CHOICES[option])
        if value not in known:
            hint = nearest(str(value), known)
            raise OptionError(f"{option} must be one of {', '.join(known)}; got {value!r}{hint}")


def _check_ports(*, make_inputs: bool, pack_inputs: bool, quantized: Quantized) -> None:
    if pack_inputs and not make_inputs:
        raise OptionError("pack_inputs packs graph inputs, so it needs make_inputs=True; got make_inputs=False")
    if make_inputs and quantized == "keep":
        raise OptionError(
            "quantized='keep' needs make_inputs=False: ONNX Runtime repacks codes when it opens a model, and computes "
            "otherwise with codes that are fed (MatMulNBits of accuracy level 4 then differs by some percent)"
        )


def adapters_of(finding: Finding, where: str) -> dict[str, Adapter]:
    """Each adapter of an export by its name there, scale folded in."""
    by_name: dict[str, dict[str, LowRank]] = {}
    for found in finding.found:
        by_name.setdefault(found.site.adapter or "default", {})[found.site.name] = low_rank_of(found.branches[0])
    for other in finding.others:
        by_name.setdefault(other.site.adapter or "default", {})[other.site.name] = other.places[0].change
    source = {"source": where, "format": "onnx"}
    return {name: Adapter(sites, {**source, "adapter_name": name}) for name, sites in by_name.items()}


def whole_of(adapters: list[Adapter]) -> Adapter:
    """The exact sum: ranks one after another. One adapter is itself."""
    if len(adapters) == 1:
        return adapters[0]
    name = "+".join(adapter.metadata["adapter_name"] for adapter in adapters)
    total = combine([(adapter, 1.0) for adapter in adapters])
    return Adapter(total.sites, {**adapters[0].metadata, "adapter_name": name})


def _move_codes(model: ir.Model, manifest: Manifest, file: Path) -> None:
    """Adapters that stay quantized lie in a file of their own, in whose place a session puts others."""
    values = weight_values(model)
    if manifest.kept:
        into_file([values[name] for kept in manifest.kept.values() for name in kept.names], file)


def _rewrite(
    model: ir.Model,
    finding: Finding,
    options: PortOptions,
    fingerprint: str,
    *,
    keep_codes: bool,
    adapter_dtype: AdapterDtype | None,
) -> Manifest:
    """Change ``model`` in place; returns the manifest that it now carries."""
    places: dict[str, list[Found]] = {}
    for found in finding.found:
        places.setdefault(found.site.name, []).append(found)
    others: dict[str, list[Other]] = {}
    for other in finding.others:
        others.setdefault(other.site.name, []).append(other)
    if both := sorted(others.keys() & places.keys()):
        raise ModelError(
            f"{both[0]} has adapters of two kinds, lora and {others[both[0]][0].site.kind}; export one at a time"
        )
    kept = _kept(places) if keep_codes else {}
    sites = SiteTable([*map(_place, places.values()), *map(_place, others.values())])
    sites = SiteTable(site if site.name in kept else in_dtype(site, adapter_dtype) for site in sites)
    shapes = Shapes(model)
    rows = SiteRows() if options.port == "external" else site_rows(model, shapes, _meeting_masks(places, others))

    def place_of(site: str, met: ir.Value, *, x: ir.Value, op: ir.Node | None, call: int) -> Place:
        return Place(met, x, op, shapes.rank(met) or 2, call, rows=rows.of(site, met))

    # Before anything is rewired.
    met = {
        branch: place_of(name, branch.x, x=branch.x, op=branch.base_op, call=call)
        for name, (first, *_) in places.items()
        for call, branch in enumerate(first.branches)
    }
    required = {o.site.name for o in finding.others if any(p.trained or p.prompt for p in o.places)}
    required |= {found.site.name for found in finding.found if found.trained}
    for trained in (*(f.trained for f in finding.found), *(p.trained for o in finding.others for p in o.places)):
        blank(model, trained)

    def put(site: AdapterSite, ports: Ports, masks: Masks) -> None:
        if site.name in others:
            first_other, *further = others[site.name]
            _put_calls(model, first_other.places, site, ports, masks, place_of=place_of)
            for exported in (place for other in further for place in other.places):
                bypass_exported(exported)
            return
        first, *rest = places[site.name]
        for branch in first.branches:
            rewire(model, branch, site, ports, masks, place=met[branch])
        for found in rest:
            for branch in found.branches:
                bypass(branch)

    origin = Origin(fingerprint, finding.base_model, finding.absent, _bases(model, finding), rows)
    ported = SiteTable(site for site in sites if site.name not in kept)
    options = dataclasses.replace(options, required=frozenset(required))
    manifest = give_ports(model, ported, options, put, origin=origin)
    if kept:
        manifest = dataclasses.replace(manifest, sites=sites, kept=kept)
        model.metadata_props[KEY] = manifest.dumps()
    return manifest


def _put_calls(
    model: ir.Model,
    calls: Sequence[Exported],
    site: AdapterSite,
    ports: Ports,
    masks: Masks,
    *,
    place_of: Callable[..., Place],
) -> None:
    """Let ``site``'s ports do what an exported adapter of another kind did, at every call of its module."""
    for call, exported in enumerate(calls):
        base, x, op = exported.base, exported.x, exported.op
        if exported.prompt is not None:
            put_prompt(model, exported.prompt, ports[PROMPT])
            continue
        assert base is not None and x is not None, "only a prompt has neither"  # noqa: PT018
        place, before = (place_of(site.name, value, x=x, op=op, call=call) for value in (base, x))
        put_exported(model, exported, site, ports, masks, place=place, before=before)


def _meeting_masks(
    places: Mapping[str, Sequence[Found]], others: Mapping[str, Sequence[Other]]
) -> dict[str, list[ir.Value]]:
    """By site, the values that its masks will meet, at every call."""
    met = {name: [branch.x for branch in first.branches] for name, (first, *_) in places.items()}
    for name, (first_other, *_) in others.items():
        read = [place.x for place in first_other.places if INPUT_GAIN in first_other.site.ports]
        met[name] = [value for value in (*(place.base for place in first_other.places), *read) if value is not None]
    return met


def _kept(places: dict[str, list[Found]]) -> dict[str, Kept]:
    """Sites whose adapters are stored as codes, which stay."""
    kept = {}
    for name, (first, *others) in places.items():
        if not any(is_quantized(branch) for branch in first.branches):
            continue
        if set(first.site.ports) - set(LOW_RANK):
            raise ModelError(f"{name}: an adapter with a bias of its own cannot stay in codes; pass quantized='float'")
        if others:
            raise ModelError(f"{name}: {1 + len(others)} quantized adapters act there at once; pass quantized='float'")
        kept[name] = keep(first.branches, name)
    if not kept:
        raise ModelError("no adapter in it is stored as codes, so there are none to keep; pass quantized='float'")
    return kept


def _takes_absolute(site: AdapterSite) -> bool:
    return bool(set(site.ports) & VECTORS) or site.kind == "saved"


def _bases(model: ir.Model, finding: Finding) -> dict[str, SiteBase]:
    """Where weight and bias of the sites lie that adapters of absolute parts can be lowered for."""
    ops = {other.site.name: other.places[0].op for other in finding.others if _takes_absolute(other.site)}
    ops |= {f.site.name: f.branches[0].base_op for f in finding.found if _takes_absolute(f.site)}
    if not ops:
        return {}
    known: dict[ir.Node | None, Base] = {base.op: base for base in find_bases(model)}
    _refuse_unreadable(finding, known)
    return {
        name: SiteBase(known[op].weight, "" if (bias := known[op].bias) is None else bias.name or "")
        for name, op in ops.items()
        if op in known
    }


def _refuse_unreadable(finding: Finding, known: Mapping[ir.Node | None, Base]) -> None:
    """DoRA's other adapters need the base weight."""
    lost = [o for o in finding.others if o.site.kind == "dora" and _weight(known.get(o.places[0].op)) is None]
    if lost:
        lines = "\n".join(f"  {o.site.name}: the weight of {o.site.op} at {o.places[0].place}" for o in lost[:20])
        raise ModelError(
            "DoRA divides by the length of the adapted weight's rows, so another adapter needs base weights that "
            f"cannot be read from this graph:\n{lines}\nQuantize after the extraction, or give the float export."
        )


def _weight(base: Base | None) -> BaseWeight | None:
    return None if base is None else base.weight


def _place(members: Sequence[Found | Other]) -> AdapterSite:
    """One row for a place; the port of several adapters holds their sum."""
    sites = [member.site for member in members]
    if strange := [site for site in sites if len(sites) > 1 and not set(site.ports) <= _ADDED]:
        raise ModelError(
            f"{strange[0].name}: {len(sites)} adapters act there at once, and {strange[0].kind} does not add up; "
            "export one at a time"
        )
    rank = sum(site.rank for site in sites)
    return dataclasses.replace(sites[0], rank=rank, adapter="+".join(site.adapter for site in sites))


def base_fingerprint(finding: Finding) -> str:
    """:func:`adapterx.graph.fingerprint.fingerprint_of` what was found."""
    # A weight that was trained in full is the adapter's.
    others = [(other.site.name, other.places[0].op) for other in finding.others if other.site.kind != "saved"]
    return fingerprint_of([*((found.site.name, found.branches[0].base_op) for found in finding.found), *others])
