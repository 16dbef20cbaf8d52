"""inject_adapters: put ports for adapters into a model that never had any."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import onnx
import onnx_ir as ir

from adapterx.adapter import Adapter
from adapterx.errors import ModelError, NoAdaptersFound, OptionError, nearest
from adapterx.formats import load_adapter
from adapterx.graph.apart import is_activated, take_apart
from adapterx.graph.attach import Place, attached, numbered
from adapterx.graph.bases import Base, find_bases
from adapterx.graph.load import ModelLike, check_model, load_model
from adapterx.graph.masks import Masks
from adapterx.graph.plan import Plan, plan_for_adapters, plan_for_modules
from adapterx.graph.ported import Origin, give_ports
from adapterx.graph.ports import PortOptions, Ports
from adapterx.graph.rewire import put_after
from adapterx.graph.rows import folded_rows, unflattening
from adapterx.graph.save import name_as_placed, save_model, staged, target_of
from adapterx.graph.shapes import Shapes
from adapterx.graph.site_rows import SiteRows, site_rows
from adapterx.graph.sites import AdapterLike, find, label
from adapterx.graph.targets import Modules, Targets, modules_of, targeted
from adapterx.manifest import Manifest, Port, manifest_of
from adapterx.port_dtype import AdapterDtype, check, in_dtype
from adapterx.site import AdapterSite, Kind, SiteTable


@dataclasses.dataclass(frozen=True, slots=True)
class Injection:
    """What :func:`inject_adapters` wrote.

    Args:
        model_path: the model with ports
        sites: one row a site, as in the manifest
    """

    model_path: Path
    sites: SiteTable


def inject_adapters(  # noqa: PLR0913 - the options of the contract, all by name
    model: ModelLike,
    output_dir: str | os.PathLike[str],
    *,
    targets: Targets | None = None,
    adapter: AdapterLike | None = None,
    kinds: Sequence[Kind] = ("lora",),
    make_inputs: bool = True,
    pack_inputs: bool = False,
    dynamic_rank: bool = True,
    optional_inputs: bool = True,
    rank: int | None = None,
    partial: bool = False,
    adapter_dtype: AdapterDtype | None = None,
) -> Injection:
    """Put ports for adapters into a model that never had any: exported, optimized or quantized, by any exporter.

    What comes out is what :func:`extract_adapters` makes of the export of an adapted model: the same ports under the
    same names, and the same manifest. Run without an adapter it computes what ``model`` does, node for node: the same
    bits, but where ONNX Runtime fuses nodes of ``model`` between which a port now lies. Options that both functions
    have mean the same; inputs are the default here, since they take any rank and nothing here has one.

    Args:
        model: path, ``onnx.ModelProto`` or ``onnx_ir.Model``; never changed. External data is linked or copied file by
            file, never read.
        output_dir: made if it is not there. The model keeps its file name.
        targets: the modules to give ports: names of modules (``"model.layers.0.self_attn.q_proj"``), ends of names
            (``"q_proj"``), compiled regular expressions that match whole names, or ``"all-linear"``: every linear layer
            but the one that makes the logits
        adapter: in place of ``targets``: the sites of this adapter, with the ports that its kind needs
        kinds: with ``targets``, the kinds of adapters that shall fit: ``"lora"`` (LoHa, LoKr and VeRA come down to the
            same ports), ``"dora"``, ``"ia3"``, ``"bias"``, ``"saved"``
        make_inputs: ports are graph inputs; else external initializers whose file does not exist
        pack_inputs: one input per module type and side, split in the graph
        dynamic_rank: inputs take adapters of any rank, each site its own
        optional_inputs: an input that is not fed makes its site the base
        rank: of ports that are external, or not dynamic; by default that of ``adapter``
        partial: ``adapter`` is for several files (encoder, decoder); its sites that this one lacks are noted in the
            manifest
        adapter_dtype: element type of the ports of linear layers, in place of that of their activations:
            ``"float32"``, ``"float16"``, ``"bfloat16"``, or ``"int8"`` for codes with a scale for each rank, which a
            session makes of the floats that it is given (needs ``make_inputs``)

    Returns:
        The path and the sites.

    Raises:
        ModelError: broken, with ports or adapters already, without names, or a target that means no module of it.
        MismatchError: the adapter's sites are not in the model, or have other shapes there. Nothing is written.
        OptionError: options that contradict each other, or do not exist.
    """
    check(adapter_dtype, as_inputs=make_inputs)
    port = _checked(targets, adapter, kinds, make_inputs=make_inputs, pack_inputs=pack_inputs)
    loaded, where = load_model(model), label(model)
    path = target_of(model, Path(output_dir))

    def plan(modules: Modules) -> Plan:
        if adapter is not None:
            one = adapter if isinstance(adapter, Adapter) else load_adapter(adapter)
            name = "adapter" if isinstance(adapter, Adapter) else Path(adapter).name
            return plan_for_adapters(modules, {name: one}, where=where, partial=partial)
        assert targets is not None, "one of the two was given"
        return plan_for_modules(modules, targeted(modules, targets, where=where), kinds=kinds, rank=rank or 0)

    options = PortOptions(port, dynamic_rank, optional_inputs, f"{path.stem}.adapter.bin")
    manifest = _inject(loaded, plan, options, where=where, rank=rank, adapter_dtype=adapter_dtype)
    check_model(loaded, f"the model injected into {where}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path.parent) as stage:
        save_model(loaded, path, stage, ours=manifest.location, share_weights=port == "external")
    return Injection(path, manifest.sites)


def injected(
    model: ModelLike, adapters: Sequence[Adapter], *, adapter_dtype: AdapterDtype | None = None
) -> tuple[onnx.ModelProto, Path | None]:
    """``model`` with an optional input of any rank for everything that ``adapters`` bring, in memory.

    Args:
        model: as for :func:`inject_adapters`
        adapters: their sites get ports, those that several have ports for all
        adapter_dtype: as for :func:`inject_adapters`

    Returns:
        The graph, whose external data is not loaded, and the folder that its locations are relative to (``None``
        where nothing is external).

    Raises:
        ModelError: broken, with ports or adapters already, or without names.
        MismatchError: an adapter's sites are not in the model, or have other shapes there.
        OptionError: no adapters, or no such element type.
    """
    check(adapter_dtype, as_inputs=True)
    if not adapters:
        raise OptionError("the model has no ports for adapters, and no adapter says where they are to be; give one")
    loaded, where = load_model(model), label(model)
    named = {one.metadata.get("source") or f"number {i}": one for i, one in enumerate(adapters)}
    if len(named) < len(adapters):
        named = {f"number {i}": one for i, one in enumerate(adapters)}

    def plan(modules: Modules) -> Plan:
        return plan_for_adapters(modules, named, where=where)

    options = PortOptions("input", dynamic_rank=True, optional=True, location="")
    _inject(loaded, plan, options, where=where, rank=None, adapter_dtype=adapter_dtype)
    check_model(loaded, f"the model injected into {where}")
    tensors = [value.const_value for graph in loaded.graphs() for value in graph.initializers.values()]
    external = any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
    name_as_placed(loaded)
    return ir.to_proto(loaded), Path(model).parent if external and isinstance(model, str | os.PathLike) else None


def _checked(
    targets: Targets | None,
    adapter: AdapterLike | None,
    kinds: Sequence[Kind],
    *,
    make_inputs: bool,
    pack_inputs: bool,
) -> Port:
    """The port that the options ask for."""
    if (targets is None) == (adapter is None):
        met = "neither" if targets is None else "both"
        raise OptionError(f"give targets or an adapter to say where ports are to be, one of the two; got {met}")
    if pack_inputs and not make_inputs:
        raise OptionError("pack_inputs packs graph inputs, so it needs make_inputs=True; got make_inputs=False")
    known = [kind for kind in get_args(Kind) if kind != "prompt"]
    unknown = [str(kind) for kind in kinds if kind not in known] or ([] if kinds else ["none"])
    if unknown or isinstance(kinds, str):
        met = repr(kinds) if isinstance(kinds, str) else unknown[0]
        raise OptionError(f"kinds is a list of {', '.join(known)}; got {met}{nearest(met, known)}")
    return "packed" if pack_inputs else "input" if make_inputs else "external"


def _inject(
    model: ir.Model,
    plan: Callable[[Modules], Plan],
    options: PortOptions,
    *,
    where: str,
    rank: int | None,
    adapter_dtype: AdapterDtype | None,
) -> Manifest:
    """Change ``model`` in place; returns the manifest that it now carries."""
    _refuse_adapted(model, where)
    chosen = plan(modules_of(find_bases(model), where))
    fused = [base.op for one in chosen.planned for base in one.bases if is_activated(base.op)]
    for op in dict.fromkeys(fused):
        take_apart(op)
    if fused:
        chosen = plan(modules_of(find_bases(model), where))
    sites = SiteTable(in_dtype(one.site, adapter_dtype) for one in chosen.planned)
    if rank is not None:
        sites = SiteTable(dataclasses.replace(site, rank=rank) for site in sites)
    _refuse_unranked(sites, options)
    bases = {one.site.name: one.bases for one in chosen.planned}
    shapes = Shapes(model)
    # Asked before anything is rewired: what comes later states no shape.
    outputs = {base.op: _output(base, shapes) for members in bases.values() for base in members}
    ranks = {op: shapes.rank(output) or 2 for op, output in outputs.items()}
    rows = SiteRows()
    if options.port != "external":
        rows = site_rows(model, shapes, {name: [outputs[b.op] for b in found] for name, found in bases.items()})
    adapted: dict[ir.Value, ir.Value] = {}

    def put(site: AdapterSite, ports: Ports, masks: Masks) -> None:
        for call, base in enumerate(bases[site.name]):
            output, x = outputs[base.op], adapted.get(base.x, base.x)
            users = list(output.uses())
            before = [] if output is base.output else unflattening(x, output, base.d_in, site.name)
            there, at = rows.of(site.name, output), output if before else x
            x = before[-1].outputs[0] if before else x
            place = Place(output, x, base.op, ranks[base.op], call, rows=there, at=at)
            nodes = [*numbered(before, call), *attached(model, place, site, ports, masks)]
            put_after(output, nodes, users)
            if nodes:
                adapted[output] = nodes[-1].outputs[0]

    origin = Origin(chosen.fingerprint, chosen.base_model, chosen.elsewhere, chosen.bases, rows)
    return give_ports(model, sites, options, put, origin=origin)


def _output(base: Base, shapes: Shapes) -> ir.Value:
    return folded_rows(base.output, base.d_out, shapes) if base.kind == "linear" else base.output


def _refuse_adapted(model: ir.Model, where: str) -> None:
    if manifest_of(model.metadata_props, where=where) is not None:
        raise ModelError(f"{where} has ports for adapters already; use it as it is, or inject into its base")
    try:
        finding = find(model, where=where)
    except NoAdaptersFound:
        return
    raise ModelError(
        f"{where} holds an adapter at {len(finding.sites)} sites, the first at {finding.sites[0].name}; "
        "extract_adapters takes it out and leaves ports, or export the model without it"
    )


def _refuse_unranked(sites: SiteTable, options: PortOptions) -> None:
    fixed = "make_inputs=False" if options.port == "external" else "" if options.dynamic_rank else "dynamic_rank=False"
    if fixed and any(site.rank < 1 and "lora_A" in site.ports for site in sites):
        raise OptionError(f"{fixed} fixes the rank of every port, and targets have none; give rank=16, say")
