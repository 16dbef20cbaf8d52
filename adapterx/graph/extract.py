"""extract_adapters: take the adapter out of an exported model and leave ports in its place."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import ModelError, OptionError, nearest
from adapterx.formats import save_adapter
from adapterx.graph.branches import Branch
from adapterx.graph.load import ModelLike, check_model, load_model
from adapterx.graph.ports import Masks, PortOptions, add_ports
from adapterx.graph.rewire import bypass, rewire
from adapterx.graph.save import save_model, staged
from adapterx.graph.sites import AdapterLike, Finding, Found, find, label, refuse_partial
from adapterx.graph.view import linear
from adapterx.graph.weights import read_diagonal
from adapterx.manifest import KEY, MASK, Manifest, manifest_of
from adapterx.ops import DOMAIN, VERSION, low_rank_add_function
from adapterx.site import AdapterSite, SiteTable

AdapterFormat = Literal["safetensors", "onnx_adapter", "npz"]

_FUNCTION_IR_VERSION = 8
_SAMPLES = 8
_WIDEST = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Extraction:
    """What :func:`extract_adapters` wrote.

    Args:
        model_path: the model with ports instead of adapter weights
        adapter_path: the adapter, in the format asked for
        adapter: the same in memory; where several adapters were active at once, their exact sum
        adapters: each adapter by the name it had in the export
        sites: one row a site, as in the manifest
    """

    model_path: Path
    adapter_path: Path
    adapter: Adapter
    adapters: Mapping[str, Adapter]
    sites: SiteTable


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

    Returns:
        Paths, the adapter and the sites.

    Raises:
        NoAdaptersFound: nothing to take; says what was looked at. Nothing is written.
        ModelError: broken or already extracted model, weights of other kinds, or a target that is the source.
        OptionError: options that contradict each other or do not exist.
    """
    _check_options(make_inputs, pack_inputs, adapter_format)
    loaded, where = load_model(model), label(model)
    if manifest_of(loaded.metadata_props, where=where) is not None:
        raise ModelError(f"{where} was extracted already; give the model that was exported, or use this one as it is")
    finding = find(loaded, adapter=adapter, structural=structural, where=where)
    if not partial:
        refuse_partial(finding, where)
    path = _target(model, Path(output_dir))
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
    return Extraction(path, adapter_path, whole, adapters, manifest.sites)


def _check_options(make_inputs: bool, pack_inputs: bool, adapter_format: str) -> None:
    if pack_inputs and not make_inputs:
        raise OptionError("pack_inputs packs graph inputs, so it needs make_inputs=True; got make_inputs=False")
    if adapter_format not in get_args(AdapterFormat):
        known = get_args(AdapterFormat)
        hint = nearest(str(adapter_format), known)
        raise OptionError(f"adapter_format must be one of {', '.join(known)}; got {adapter_format!r}{hint}")


def _target(model: ModelLike, folder: Path) -> Path:
    path = folder / (Path(model).name if isinstance(model, str | os.PathLike) else "model.onnx")
    if isinstance(model, str | os.PathLike) and path.exists() and path.samefile(model):
        raise ModelError(f"{path} is the model itself; extract into another folder")
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder} is a file; expected a folder to write into")
    return path


def _read_adapters(finding: Finding, where: str) -> dict[str, Adapter]:
    """Each adapter by its name in the export, scale folded in."""
    by_name: dict[str, dict[str, LowRank]] = {}
    for found in finding.found:
        by_name.setdefault(found.site.adapter or "default", {})[found.site.name] = low_rank_of(found.branches[0])
    source = {"source": where, "format": "onnx"}
    return {name: Adapter(sites, {**source, "adapter_name": name}) for name, sites in by_name.items()}


def low_rank_of(branch: Branch) -> LowRank:
    """The weights of a branch, scale folded into ``b``; folded in float32, then rounded to the graph's dtype.

    Raises:
        ModelError: the scaled ``b`` does not fit the dtype.
    """
    dtype = branch.a.weight.dtype.numpy()
    if dtype.itemsize > _WIDEST:
        raise ModelError(
            f"{branch.place}: adapter weights are {dtype.name}; adapters are float32 at most, export in float32"
        )
    b = branch.b.matrix().astype(np.float32) * np.float32(branch.scale)
    with np.errstate(over="ignore"):
        folded = b.astype(dtype)
    if np.isfinite(b).all() and not np.isfinite(folded.astype(np.float32)).all():
        raise ModelError(f"node {branch.b.node.name!r}: B times its scale {branch.scale:g} overflows {dtype.name}")
    return LowRank(a=np.ascontiguousarray(branch.a.matrix().T.astype(dtype)), b=np.ascontiguousarray(folded))


def _sum(adapters: list[Adapter]) -> Adapter:
    """The exact sum: ranks one after another. One adapter is itself."""
    if len(adapters) == 1:
        return adapters[0]
    parts: dict[str, list[LowRank]] = {}
    for adapter in adapters:
        for name, low_rank in adapter.sites.items():
            parts.setdefault(name, []).append(low_rank)
    sites = {
        name: LowRank(a=np.concatenate([p.a for p in members]), b=np.concatenate([p.b for p in members]))
        for name, members in parts.items()
    }
    return Adapter(
        sites, {**adapters[0].metadata, "adapter_name": "+".join(a.metadata["adapter_name"] for a in adapters)}
    )


def _rewrite(model: ir.Model, finding: Finding, options: PortOptions, fingerprint: str) -> Manifest:
    """Change ``model`` in place; returns the manifest that it now carries."""
    places: dict[str, list[Found]] = {}
    for found in finding.found:
        places.setdefault(found.site.name, []).append(found)
    sites = SiteTable(_place(members) for members in places.values())
    ranks = _x_ranks(model, [branch for found in finding.found for branch in found.branches])
    pairs, packs = add_ports(model, sites, options)
    masks = Masks(model, as_input=options.port != "external")
    for site in sites:
        first, *others = places[site.name]
        for branch in first.branches:
            rewire(branch, pairs[site.name], masks.form(ranks[branch], branch.a.weight.dtype))
        for found in others:
            for branch in found.branches:
                bypass(branch)
    model.opset_imports[DOMAIN] = VERSION
    function = low_rank_add_function(model.opset_imports[""])
    model.functions[function.identifier()] = function
    model.ir_version = max(model.ir_version, _FUNCTION_IR_VERSION)
    manifest = Manifest(
        sites=sites,
        port=options.port,
        dynamic_rank=options.dynamic_rank,
        optional=options.optional,
        fingerprint=fingerprint,
        packs=packs,
        mask=None if options.port == "external" else MASK,
        location=options.location if options.port == "external" else None,
        base_model=finding.base_model,
        elsewhere=finding.absent,
    )
    model.metadata_props[KEY] = manifest.dumps()
    return manifest


def _place(members: list[Found]) -> AdapterSite:
    """One row for a place; the port of several adapters holds their sum."""
    rank = sum(found.site.rank for found in members)
    name = "+".join(found.site.adapter for found in members)
    return dataclasses.replace(members[0].site, rank=rank, adapter=name)


def _x_ranks(model: ir.Model, branches: list[Branch]) -> dict[Branch, int]:
    """How many dimensions each branch's operand has; 2 where nothing tells (the mask then enters as it is)."""
    ranks = {branch: len(branch.x.shape) for branch in branches if branch.x.shape is not None}
    missing = [branch for branch in branches if branch not in ranks]
    if missing:
        inferred = ShapeInferencePass()(model.clone()).model
        shapes = {v.name: v.shape for graph in inferred.graphs() for node in graph for v in node.outputs}
        shapes |= {value.name: value.shape for value in inferred.graph.inputs}
        for branch in missing:
            shape = shapes.get(branch.x.name)
            ranks[branch] = 2 if shape is None else len(shape)
    return ranks


def base_fingerprint(finding: Finding) -> str:
    """SHA-256 (hex) over the sites' names and the signs of a few weights on each base matrix's diagonal.

    Signs on the diagonal survive transposition and casts, so two exports of one checkpoint agree. ``""`` when no base
    weight can be read (a quantized base), which compares with nothing.
    """
    rows = []
    for found in finding.found:
        base = found.branches[0].base_op
        matrix = None if base is None else linear(base)
        if matrix is not None:
            rows.append(f"{found.site.name}\0{_signs(matrix.weight.tensor)}")
    return hashlib.sha256("\n".join(sorted(set(rows))).encode()).hexdigest() if rows else ""


def _signs(matrix: ir.TensorProtocol) -> str:
    size = min(int(dim) for dim in matrix.shape.numpy())
    picks = np.linspace(0, size - 1, num=min(_SAMPLES, size), dtype=np.int64)
    return "".join("-" if element < 0 else "+" for element in read_diagonal(matrix, picks))
