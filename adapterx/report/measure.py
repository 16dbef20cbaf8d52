"""From a model to its survey: sites as ``find_sites`` finds them, the bases beside them, and norms of both."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir

from adapterx.adapter import INPUT_GAIN, LORA_A, LORA_B, Adapter, LowRank
from adapterx.base_weight import read_weight
from adapterx.formats import load_adapter
from adapterx.graph.bases import Base, find_bases
from adapterx.graph.branch_weights import low_rank_of
from adapterx.graph.branches import Branch
from adapterx.graph.load import ModelLike, load_model
from adapterx.graph.sites import AdapterLike, Finding, find, label
from adapterx.graph.stored import tensor_reader, weight_values
from adapterx.manifest import Manifest, manifest_of
from adapterx.progress import progress
from adapterx.report.modules import modules, reasons
from adapterx.report.norms import delta_norm, norm
from adapterx.report.survey import Row, Survey
from adapterx.runtime.fit import fit
from adapterx.site import LORA_SCALE, AdapterSite, SiteTable

_PORTS = {
    "input": "graph inputs",
    "packed": "packed graph inputs",
    "external": "external initializers, given to each session",
}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """A site, its base operation, and what is there to measure (``None``: the weights are not at hand).

    A branch stays one until its turn comes, so that the weights of one site at a time are in memory.
    """

    site: AdapterSite
    host: Base | None
    change: LowRank | Branch | None


def survey(model: ModelLike, *, adapter: AdapterLike | None = None, structural: bool = False) -> Survey:
    """Find what ``find_sites`` finds, and measure it. One base weight is in memory at a time.

    Args:
        model: as for ``find_sites``
        adapter: of an exported model, the adapter that was exported with it; of an extracted model, which holds none,
            the adapter to measure
        structural: as for ``find_sites``

    Raises:
        NoAdaptersFound: there is nothing to take, as for ``find_sites``.
        MismatchError: as for ``find_sites``; also, the adapter does not fit an extracted model.
        ModelError: the model is broken.
    """
    loaded, where = load_model(model), label(model)
    named = Path(adapter).name if isinstance(adapter, str | os.PathLike) else ""
    given = load_adapter(adapter) if isinstance(adapter, str | os.PathLike) else adapter
    manifest = manifest_of(loaded.metadata_props, where=where)
    bases = find_bases(loaded)
    refused: dict[str, ir.Node | None] = {}
    if manifest is None:
        finding = find(loaded, adapter=given, structural=structural, where=where)
        bases = _without_factors(bases, finding)
        refused = reasons(finding)
        places, sites, elsewhere = _exported(finding, bases), finding.sites, finding.absent
    else:
        places = _extracted(manifest, given, bases, named=named)
        sites, elsewhere = SiteTable(manifest.sites, unmixed=manifest.unmixed), manifest.elsewhere
    rows = _rows(loaded, places)
    hosts = [place.host for place in places]
    return Survey(
        model=Path(model).name if isinstance(model, str | os.PathLike) else where,
        ports="" if manifest is None else _PORTS[manifest.port],
        adapter=named,
        sites=sites,
        modules=modules(bases, list(zip(hosts, rows, strict=True)), refused),
        refused=tuple(refused),
        nameless=sum(not base.name and base not in hosts for base in bases),
        elsewhere=elsewhere,
    )


def _without_factors(bases: list[Base], finding: Finding) -> list[Base]:
    """Also the factors that only the given adapter, or their structure, showed to be an adapter's."""
    factors = {factor.node for found in finding.found for b in found.branches for factor in (b.a, b.b)}
    factors |= {node for other in finding.others for place in other.places for node in place.nodes}
    return [base for base in bases if base.op not in factors]


def _exported(finding: Finding, bases: list[Base]) -> list[_Place]:
    by_op: dict[ir.Node | None, Base] = {base.op: base for base in bases}
    linear = [(found.site, found.branches[0]) for found in finding.found]
    others = [(other.site, other.places[0]) for other in finding.others]
    return [
        *(_Place(site, by_op.get(branch.base_op), branch) for site, branch in linear),
        *(_Place(site, by_op.get(exported.op), exported.change) for site, exported in others),
    ]


def _extracted(manifest: Manifest, adapter: Adapter | None, bases: list[Base], *, named: str) -> list[_Place]:
    changes = {} if adapter is None else fit(adapter, manifest, name=named or "adapter").sites
    by_name = {base.name: base for base in reversed(bases) if base.name}
    return [_Place(site, by_name.get(site.name), changes.get(site.name)) for site in manifest.sites]


def _rows(model: ir.Model, places: list[_Place]) -> list[Row]:
    """Every site in numbers; each base weight is read once, then dropped."""
    tensor = tensor_reader(weight_values(model))
    weights = {place.host.op: place.host.weight for place in places if place.host and place.host.weight}
    sizes = sum(math.prod(weight.shape) for weight in weights.values())
    norms: dict[ir.Node, float] = {}
    rows = []
    with progress("measuring", sizes) as advance:
        for place in places:
            change = low_rank_of(place.change) if isinstance(place.change, Branch) else place.change
            host = place.host
            if change is not None and host is not None and host.weight is not None and host.op not in norms:
                norms[host.op] = norm(read_weight(host.weight, tensor))
                advance(math.prod(host.weight.shape))
            rows.append(_row(place, change, None if host is None else norms.get(host.op)))
    return rows


def _row(place: _Place, change: LowRank | None, base_norm: float | None) -> Row:
    site = place.site
    if change is None:
        return Row(site, site.rank, _exported_bytes(site))
    parts = {name: norm(part) for name, part in change.parts.items()}
    low_rank = delta_norm(change) if change.rank else None
    if low_rank is not None and site.kind == "saved":
        # Trained in full: the graph has no base beside it, so this is a weight and no change of one.
        parts["weight"], low_rank = low_rank, None
    # The base operation of several modules (a packed qkv) has the weight of none of them.
    whole = place.host is not None and place.host.d_out == site.d_out
    base_norm = base_norm if whole and low_rank is not None else None
    return Row(site, change.rank, change.nbytes, low_rank, base_norm, tuple(parts.items()))


def _exported_bytes(site: AdapterSite) -> int:
    """What the adapter took that was in the graph: an extracted model keeps its shapes."""
    sizes = {
        LORA_A: site.rank * site.d_in * math.prod(site.kernel),
        LORA_B: site.rank * site.d_out,
        INPUT_GAIN: site.d_in,
        LORA_SCALE: site.rank * 2,
    }
    return sum(sizes.get(port, site.d_out) * np.dtype(site.dtype_of(port)).itemsize for port in site.graph_ports)
