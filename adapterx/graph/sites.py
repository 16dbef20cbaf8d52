"""find_sites: which low-rank branches of a model are adapters, and which module each belongs to."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TypeAlias

import onnx_ir as ir

from adapterx.adapter import Adapter
from adapterx.errors import ModelError, NoAdaptersFound
from adapterx.formats import load_adapter
from adapterx.graph.branches import Branch, find_branches
from adapterx.graph.calibration import calibrated
from adapterx.graph.claims import Claim, claims_of
from adapterx.graph.leftovers import leftovers
from adapterx.graph.load import ModelLike, load_model
from adapterx.graph.match import Pair, match_to_adapter, site_of
from adapterx.graph.other_kinds import Other, find_others
from adapterx.graph.paths import Paths
from adapterx.graph.view import MICROSOFT, STANDARD, all_nodes, is_op
from adapterx.manifest import manifest_of
from adapterx.site import AdapterSite, SiteTable

AdapterLike: TypeAlias = str | os.PathLike[str] | Adapter

# Operators that hold activations and weights in codes at once: what lies between two of them is no float.
_ALL_CODES = ("QLinearMatMul", "QGemm", "QLinearConv")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A site and the branches that are its: several when one module is called several times in a graph."""

    site: AdapterSite
    branches: tuple[Branch, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """Everything that was found in a model.

    Args:
        found: named sites with their branches, in graph order
        others: sites of other kinds than linear LoRA
        left: low-rank branches that nothing shows to be adapters
        unsupported: what speaks of adapters but cannot be taken as low-rank linear sites, in words
        absent: sites of the given adapter that this graph does not hold
        base_model: what the given adapter calls its base
    """

    found: tuple[Found, ...]
    left: tuple[Branch, ...]
    unsupported: tuple[str, ...]
    absent: tuple[str, ...] = ()
    base_model: str = ""
    others: tuple[Other, ...] = ()

    @property
    def calibrated(self) -> tuple[str, ...]:
        """Sites that lie between activations of fixed ranges, in words."""
        return calibrated((found.site, branch) for found in self.found for branch in found.branches[:1])

    @property
    def sites(self) -> SiteTable:
        """The sites alone."""
        left = (*self.unsupported, *self.calibrated)
        return SiteTable([*(f.site for f in self.found), *(o.site for o in self.others)], left=left)


def find_sites(model: ModelLike, *, adapter: AdapterLike | None = None, structural: bool = False) -> SiteTable:
    """Find the places where adapters act, by dataflow and evidence, never by node name alone.

    Of a model that adapterx extracted, the sites come from its manifest.

    Args:
        model: path, ``onnx.ModelProto`` or ``onnx_ir.Model``; never changed. Weights in external files stay there.
        adapter: the adapter that was exported with the model (file, PEFT folder or ``Adapter``). It names the
            branches of a graph that lost its names, by value, or by shape where only one place fits.
        structural: take every low-rank branch that has the structure of an adapter, under a structural name,
            even when nothing shows that it is one

    Returns:
        The sites in graph order; prints as a table. Its ``left`` names what belongs to an adapter but cannot be
        taken as a low-rank linear site.

    Raises:
        NoAdaptersFound: there is nothing to take; the message says what was looked at.
        MismatchError: nothing of ``adapter`` is in this graph, or several branches could be one of its sites.
        ModelError: the model is broken, or its own names contradict each other.
    """
    loaded = load_model(model)
    manifest = manifest_of(loaded.metadata_props, where=label(model))
    if manifest is not None:
        return manifest.sites
    return find(loaded, adapter=adapter, structural=structural, where=label(model)).sites


def find(
    model: ir.Model, *, adapter: AdapterLike | None = None, structural: bool = False, where: str = "model"
) -> Finding:
    """:func:`find_sites` on a loaded model, with the branches that a rewriter needs."""
    paths = Paths.of(model)
    others = find_others(model, paths)
    theirs = {node for other in others for exported in other.places for node in exported.nodes}
    branches = [branch for branch in find_branches(model) if branch.a.node not in theirs]
    claims = {branch: list(claims_of(branch)) for branch in branches}
    carriers = Counter(id(claim.carrier) for told in claims.values() for claim in told)
    identified = [(b, _identify(b, told, paths, carriers, strict=adapter is None)) for b, told in claims.items()]
    sites = [(branch, site) for branch, site in identified if site is not None]
    left = [branch for branch, site in identified if site is None]
    absent: tuple[str, ...] = ()
    base_model = ""
    exported = load_adapter(adapter) if isinstance(adapter, str | os.PathLike) else adapter
    if exported is not None:
        match = match_to_adapter(sites, left, exported)
        sites, left, absent = match.sites, match.left, match.absent
        base_model = exported.metadata.get("base_model", "")
    if structural:
        candidates = [branch for branch in left if _looks_like_adapter(branch)]
        left = [branch for branch in left if branch not in candidates]
        sites += [(b, site_of(b, f"structural.{i}", "", "structure")) for i, b in enumerate(candidates)]
    order = {branch: i for i, branch in enumerate(branches)}
    sites = _one_name(sites)
    sites.sort(key=lambda pair: order[pair[0]])
    unsupported = (*leftovers(model, sites, paths, theirs), *(() if exported else _unnamed(sites, left)))
    finding = Finding(_grouped(sites), tuple(left), unsupported, absent, base_model, tuple(others))
    if not finding.sites:
        raise NoAdaptersFound(_nothing(model, finding, where))
    return finding


def _one_name(sites: list[Pair]) -> list[Pair]:
    """Sites that do not know their adapter's name have that of the others, where all the others agree."""
    names = {site.adapter for _, site in sites if site.adapter}
    if len(names) != 1:
        return sites
    name = names.pop()
    return [(branch, dataclasses.replace(site, adapter=name)) for branch, site in sites]


def _unnamed(sites: list[Pair], left: list[Branch]) -> list[str]:
    """Branches without a name that are like those that have one: a tool deleted the rest of the metadata."""
    ranks = {site.rank for _, site in sites}
    return [
        f"{branch.place}: {branch.a.d_in} -> {branch.rank} -> {branch.b.d_out}, like the sites that are named, but "
        "nothing names it; give the exported adapter (adapter=...)"
        for branch in left
        if sites and _looks_like_adapter(branch) and (branch.rank in ranks or branch.scale != 1.0)
    ]


def _identify(
    branch: Branch, claims: list[Claim], paths: Paths, carriers: Counter[int], *, strict: bool
) -> AdapterSite | None:
    """The site that the branch's claims name; ``None`` when there is no claim.

    Claims that contradict each other are an error when ``strict``; else the branch counts as unnamed, for its values
    to decide.
    """
    if not claims:
        return None
    # What several branches share names one of them at most: equal tensors are merged by exporters.
    own = [claim for claim in claims if carriers[id(claim.carrier)] == 1] or claims
    believed = own[0]
    name = paths.canonical(believed.module)
    for claim in own[1:]:
        other = paths.canonical(claim.module)
        if not _agree(name, other) and carriers[id(claim.carrier)] == 1:
            if not strict:
                return None
            raise ModelError(
                f"the branch at {branch.place} is {name!r} by its {_words(believed)} but {other!r} by its "
                f"{_words(claim)}; a tool renamed one and not the other. Export again, or give the exported adapter"
            )
    adapter = next((claim.adapter for claim in own if claim.adapter), "")
    return site_of(branch, name, adapter, believed.source)


def _words(claim: Claim) -> str:
    return claim.source.replace("_", " ")


def _agree(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return long == short or long.endswith(f".{short}")


def _looks_like_adapter(branch: Branch) -> bool:
    return branch.base_op is not None and branch.rank < min(branch.a.d_in, branch.b.d_out)


def _grouped(sites: Iterable[tuple[Branch, AdapterSite]]) -> tuple[Found, ...]:
    """Branches of one module and adapter together: a module that is called twice has one pair of weights."""
    groups: dict[tuple[str, str], list[tuple[Branch, AdapterSite]]] = defaultdict(list)
    for branch, site in sites:
        groups[site.name, site.adapter].append((branch, site))
    found = []
    for (name, _), members in groups.items():
        first, site = members[0]
        for branch, other in members[1:]:
            if not _same_weights(first, branch):
                raise ModelError(
                    f"two different low-rank branches, at nodes {site.node!r} and {other.node!r}, both go by the name "
                    f"{name!r}; give the exported adapter, so that their values tell them apart"
                )
        found.append(Found(site, tuple(branch for branch, _ in members)))
    return tuple(found)


def _same_weights(one: Branch, other: Branch) -> bool:
    if one.scale != other.scale:
        return False
    for left, right in ((one.a, other.a), (one.b, other.b)):
        if left.weight.root is right.weight.root:
            continue
        if left.matrix().shape != right.matrix().shape or left.matrix().tobytes() != right.matrix().tobytes():
            return False
    return True


def _nothing(model: ir.Model, finding: Finding, where: str) -> str:
    nodes = sum(1 for graph in model.graphs() for _ in graph)
    text = (
        f"no adapters in {where}: looked at {nodes} nodes for x -> A -> B beside a base operation, and at initializer "
        "names, exporter metadata and node paths for LoRA names"
    )
    likely = [branch for branch in finding.left if _looks_like_adapter(branch)]
    if finding.unsupported:
        shown = ", ".join(finding.unsupported[:5])
        text += f". Names speak of adapters that are not low-rank linear sites: {shown}"
    if likely:
        first = likely[0]
        text += (
            f". {len(likely)} low-rank branches have the structure of an adapter (the first at {first.place}, "
            f"{first.a.d_in} -> {first.rank} -> {first.b.d_out}) but nothing names them: give the "
            "exported adapter (adapter=...), or take them by structure (structural=True)"
        )
    elif any(is_op(node, *_ALL_CODES, domain=(*STANDARD, MICROSOFT)) for node in all_nodes(model)):
        text += (
            ". The model computes in codes throughout (QLinearMatMul), where an adapter cannot be told from its base: "
            "quantize the export to the QDQ format, without the adapter's nodes"
        )
    elif not finding.unsupported:
        text += ". A model whose adapter was merged before the export has none left to find"
    return text


def label(model: ModelLike) -> str:
    """How messages call the model."""
    return str(model) if isinstance(model, str | os.PathLike) else "the model"


def refuse_partial(finding: Finding, where: str) -> None:
    """Refuse a model of which only a part could be extracted."""
    if finding.unsupported:
        lines = "\n".join(f"  {line}" for line in finding.unsupported[:20])
        raise ModelError(
            f"{where} has adapter weights that cannot be extracted as low-rank linear sites yet, so an adapter would "
            f"only be swapped in part:\n{lines}\nPass partial=True to extract the {len(finding.found)} low-rank sites "
            "alone; what is listed here then stays in the model."
        )
