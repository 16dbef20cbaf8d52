"""find_sites: which low-rank branches of a model are adapters, and which module each belongs to."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import onnx_ir as ir

from adapterx.adapter import Adapter
from adapterx.errors import ModelError, NoAdaptersFound
from adapterx.formats import load_adapter
from adapterx.graph.bases import Base
from adapterx.graph.branches import Branch, find_branches
from adapterx.graph.calibration import calibrated
from adapterx.graph.exported import Exported, Operand
from adapterx.graph.identity import identities
from adapterx.graph.leftovers import leftovers
from adapterx.graph.load import ModelLike, load_model
from adapterx.graph.match import Pair, match_to_adapter, near, site_of
from adapterx.graph.other_kinds import Other, find_others, other_of
from adapterx.graph.paths import Paths
from adapterx.graph.quantized_linear import Codes
from adapterx.graph.view import MICROSOFT, STANDARD, all_nodes, is_op
from adapterx.graph.whole_biases import take_biases
from adapterx.manifest import manifest_of
from adapterx.site import AdapterSite, SiteTable

AdapterLike: TypeAlias = str | os.PathLike[str] | Adapter

# A base has nothing that looks like these.
_UNMISTAKABLE = frozenset({"embedding", "dora", "vera"})
# A change that was folded into one matrix does not say what it was.
_ALIKE = {"loha": "delta", "lokr": "delta", "lora": "delta"}
# Operators that hold activations and weights in codes at once: what lies between two of them is no float.
_ALL_CODES = ("QLinearMatMul", "QGemm", "QLinearConv")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A site and the branches that are its: several when one module is called several times in a graph.

    ``trained`` is where the base's bias is read, if that was trained in full and is the adapter's.
    """

    site: AdapterSite
    branches: tuple[Branch, ...]
    trained: tuple[Operand, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Finding:
    """Everything that was found in a model.

    Args:
        found: named sites with their branches, in graph order
        others: sites of other kinds than linear LoRA
        left: low-rank branches that nothing shows to be adapters
        unsupported: what speaks of adapters but cannot be taken, in words
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
            branches of a graph that lost its names, by value, or by shape where only one place fits. And it alone
            tells which biases were trained with it (``bias="lora_only"``): in the graph they look like the base's.
        structural: take every low-rank branch that has the structure of an adapter, under a structural name,
            even when nothing shows that it is one

    Returns:
        The sites in graph order; prints as a table. Its ``left`` names what belongs to an adapter but cannot be
        taken as a low-rank linear site; of an extracted model, ``unmixed`` says at which sites, and why, the rows of
        one batch cannot have different adapters.

    Raises:
        NoAdaptersFound: there is nothing to take; the message says what was looked at.
        MismatchError: nothing of ``adapter`` is in this graph, or several branches could be one of its sites.
        ModelError: the model is broken, or its own names contradict each other.
    """
    loaded = load_model(model)
    manifest = manifest_of(loaded.metadata_props, where=label(model))
    if manifest is not None:
        return SiteTable(manifest.sites, unmixed=manifest.unmixed)
    return find(loaded, adapter=adapter, structural=structural, where=label(model)).sites


def find(
    model: ir.Model, *, adapter: AdapterLike | None = None, structural: bool = False, where: str = "model"
) -> Finding:
    """:func:`find_sites` on a loaded model, with the branches that a rewriter needs."""
    paths = Paths.of(model)
    exported = load_adapter(adapter) if isinstance(adapter, str | os.PathLike) else adapter
    others = find_others(model, paths, exported)
    branches = [branch for branch in find_branches(model) if branch.a.node not in others.nodes]
    told = list(zip(branches, identities(branches, paths, strict=exported is None), strict=True))
    sites = [(b, site_of(b, paths.canonical(who.module), who.adapter, who.source)) for b, who in told if who]
    left = [branch for branch, who in told if who is None]
    absent: tuple[str, ...] = ()
    if exported is not None:
        match = match_to_adapter(sites, left, exported, others={other.site.name for other in others.found})
        sites, left, absent = match.sites, match.left, match.absent
    if structural:
        candidates = [branch for branch in left if looks_like_adapter(branch)]
        left = [branch for branch in left if branch not in candidates]
        sites += [(b, site_of(b, f"structural.{i}", "", "structure")) for i, b in enumerate(candidates)]
    unsupported = [
        *leftovers(model, sites, paths, others.nodes, {other.site.name for other in others.found}),
        *_nameless(others.left, sites, others.found),
    ]
    unsupported += [] if exported else _unnamed(sites, left)
    whole = take_biases(model, sites, others, exported)
    named, placed = _one_name(whole.sites, whole.others)
    order = {branch.a.node: i for i, branch in enumerate(branches)}
    named.sort(key=lambda pair: order[pair[0].a.node])
    absent = tuple(name for name in absent if name not in {other.site.name for other in placed})
    unsupported += _bare(absent, others.bases)
    finding = Finding(
        found=_grouped(named, whole.trained),
        left=tuple(left),
        unsupported=tuple(unsupported),
        absent=absent,
        base_model="" if exported is None else exported.metadata.get("base_model", ""),
        others=placed,
    )
    if not finding.sites:
        raise NoAdaptersFound(_nothing(model, finding, where))
    return finding


def _bare(absent: Iterable[str], bases: Iterable[Base]) -> list[str]:
    """Modules that are in this graph (not in another file of the export) without what the given adapter has there."""
    here = {base.name for base in bases}
    return [
        f"{name}: the given adapter has it, and nothing of it is found at its operation"
        for name in absent
        if name in here
    ]


def _one_name(sites: list[Pair], others: Iterable[Other]) -> tuple[list[Pair], tuple[Other, ...]]:
    """Sites that do not know their adapter's name have that of the others, where all the others agree."""
    others = tuple(others)
    names = {site.adapter for site in (*(s for _, s in sites), *(other.site for other in others)) if site.adapter}
    if len(names) != 1:
        return sites, others
    name = names.pop()
    named = [(branch, dataclasses.replace(site, adapter=name)) for branch, site in sites]
    together: dict[str, list[Exported]] = defaultdict(list)
    for other in others:
        together[other.site.name] += other.places
    renamed = (other_of(site, places) for site, places in together.items())
    return named, tuple(dataclasses.replace(o, site=dataclasses.replace(o.site, adapter=name)) for o in renamed)


def _nameless(left: Iterable[Exported], sites: list[Pair], others: Iterable[Other]) -> list[str]:
    """What has no name, where it can hardly be the base's own: by its structure, or because its like have names."""
    like = {_ALIKE.get(other.site.kind, other.site.kind) for other in others}
    return [
        f"{one.place}: {one.kind} of rank {one.change.rank} that nothing names; give the exported adapter (adapter=...)"
        for one in left
        # A constant that is repeated over the batch is hardly ever a prompt.
        if one.kind in _UNMISTAKABLE
        or (one.kind != "prompt" and _ALIKE.get(one.kind, one.kind) in like)
        or (one.kind == "conv" and (sites or one.scale != 1.0))
    ]


def _unnamed(sites: list[Pair], left: list[Branch]) -> list[str]:
    """Branches without a name that are like those that have one: a tool deleted the rest of the metadata."""
    ranks = {site.rank for _, site in sites}
    return [
        f"{branch.place}: {branch.a.d_in} -> {branch.rank} -> {branch.b.d_out}, like the sites that are named, but "
        "nothing names it; give the exported adapter (adapter=...)"
        for branch in left
        if sites and looks_like_adapter(branch) and (branch.rank in ranks or branch.scale != 1.0)
    ]


def looks_like_adapter(branch: Branch) -> bool:
    """Whether a branch has the structure of an adapter, which a bottleneck of the base may have, too."""
    return branch.base_op is not None and branch.rank < min(branch.a.d_in, branch.b.d_out)


def _grouped(
    sites: Iterable[tuple[Branch, AdapterSite]], trained: Mapping[str, Sequence[Operand]]
) -> tuple[Found, ...]:
    """Branches of one module and adapter together: a module that is called twice has one pair of weights."""
    groups: dict[tuple[str, str], list[tuple[Branch, AdapterSite]]] = defaultdict(list)
    for branch, site in sites:
        groups[site.name, site.adapter].append((branch, site))
    found = []
    for (name, _), members in groups.items():
        # A quantizer may take one call of a module and leave another, which then has the adapter's own numbers.
        members.sort(key=lambda pair: isinstance(pair[0].b.weight, Codes))
        first, site = members[0]
        for branch, other in members[1:]:
            if not _same_weights(first, branch):
                raise ModelError(
                    f"two different low-rank branches, at nodes {site.node!r} and {other.node!r}, both go by the name "
                    f"{name!r}; give the exported adapter, so that their values tell them apart"
                )
        found.append(Found(site, tuple(branch for branch, _ in members), tuple(trained.get(name, ()))))
    return tuple(found)


def _same_weights(one: Branch, other: Branch) -> bool:
    if one.scale != other.scale:
        return False
    for left, right in ((one.a, other.a), (one.b, other.b)):
        if left.weight.root is right.weight.root:
            continue
        kinds = {isinstance(factor.weight, Codes) for factor in (left, right)}
        exact, rounded = left.matrix(), right.matrix()
        if exact.shape != rounded.shape:
            return False
        if not (near(rounded, exact) if len(kinds) > 1 else exact.tobytes() == rounded.tobytes()):
            return False
    return True


def _nothing(model: ir.Model, finding: Finding, where: str) -> str:
    nodes = sum(1 for graph in model.graphs() for _ in graph)
    text = (
        f"no adapters in {where}: looked at {nodes} nodes for x -> A -> B beside a base operation, and at initializer "
        "names, exporter metadata and node paths for LoRA names"
    )
    likely = [branch for branch in finding.left if looks_like_adapter(branch)]
    if finding.unsupported:
        shown = ", ".join(finding.unsupported[:5])
        text += f". Names speak of adapters that cannot be taken: {shown}"
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
            f"{where} has adapter weights that cannot be extracted, so an adapter would only be swapped in part:\n"
            f"{lines}\nPass partial=True to extract the {len(finding.sites)} sites that were found; what is listed "
            "here then stays in the model."
        )
