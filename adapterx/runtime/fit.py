"""Does this adapter belong to this model? Asked once, before a session sees it; every fault is told at once."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import numpy as np

from adapterx.adapter import INPUT_GAIN, PROMPT, WHOLE_WEIGHT, Adapter, LowRank
from adapterx.errors import MismatchError, nearest
from adapterx.formats.onnx_adapter import model_version
from adapterx.fused import fused_sites, joined, parts_of_fused, split
from adapterx.kinds import lowered, needs_weight, shaped
from adapterx.kinds.saved import needs_base
from adapterx.manifest import Manifest
from adapterx.pipeline import for_model
from adapterx.port_dtype import cast_for
from adapterx.renaming import renaming
from adapterx.runtime.base_tensors import BaseTensors
from adapterx.site import LOW_RANK, AdapterSite, by_name

_SHOWN = 50
# One look for a near name compares with every site: a hostile file of 20,000 names must not take minutes.
_NEAREST = 12


@dataclasses.dataclass(frozen=True, slots=True)
class _Fault:
    place: str
    cause: str


def fit(
    adapter: Adapter,
    manifest: Manifest,
    *,
    name: str,
    allow_other_base: bool = False,
    bases: BaseTensors | None = None,
) -> Adapter:
    """The adapter as this model takes it: the model's names, dtype and parts, relative to its base.

    Args:
        adapter: what a reader made
        manifest: what the model says of itself
        name: what messages call the adapter
        allow_other_base: take an adapter although it says that it was made for another base
        bases: the model's weights, for kinds whose arithmetic they are part of (DoRA, whole modules)

    Returns:
        ``adapter`` itself when nothing had to change. Arrays that need no cast are shared, not copied.

    Raises:
        MismatchError: naming every fault: unknown sites, shapes, ranks of fixed ports, dtypes, the base's fingerprint.
    """
    faults = [] if allow_other_base else [_Fault("base", cause) for cause in _other_base(adapter, manifest)]
    fixed = frozenset(manifest.kept)
    if manifest.port != "external" and not manifest.dynamic_rank:
        fixed = frozenset(site.name for site in manifest.sites)
    here = [site for site in adapter.sites if site not in manifest.elsewhere]
    if here and len(here) < len(adapter.sites):
        adapter = Adapter({site: adapter.sites[site] for site in here}, adapter.metadata)
    lower = functools.partial(_lowered, manifest=manifest, bases=bases)
    required = frozenset(manifest.required)
    fitting = _fitted(adapter, manifest.sites, name=name, fixed=fixed, faults=faults, lower=lower, required=required)
    table = by_name(manifest.sites)
    if faults := [
        _Fault(site, why) for site in manifest.required for why in _lacks(fitting.sites.get(site), table[site])
    ]:
        raise MismatchError(_message(name, faults, len(adapter.sites), list(table)))
    return fitting


def _lacks(change: LowRank | None, site: AdapterSite) -> Iterator[str]:
    """What must be given at a site that has no base in the graph; low-rank terms beside a bias may be absent."""
    held = set() if change is None else {side for side, _ in change.tensors()}
    needed = [port for port in site.ports if port not in LOW_RANK or site.kind == "saved"]
    if lost := [port for port in needed if port not in held]:
        what = "says nothing of it" if change is None else f"brings no {' and no '.join(lost)}"
        yield f"adapter {what}, and the model has no base there"


def _lowered(change: LowRank, site: AdapterSite, *, manifest: Manifest, bases: BaseTensors | None) -> LowRank:
    """``change`` beside this model's base; ValueError with the cause where that cannot be."""
    base = manifest.bases.get(site.name)
    if base is None or bases is None:
        raise ValueError(
            f"adapter brings {', '.join(sorted(change.parts))}, the model's site takes {', '.join(site.ports)}; "
            "extract or inject the model for this kind of adapter"
        )
    if site.is_embedding and WHOLE_WEIGHT in change.parts:
        turned = {**change.parts, WHOLE_WEIGHT: change.parts[WHOLE_WEIGHT].T}
        change = LowRank(a=change.a, b=change.b, parts=turned)
    weight = bases.weight(base) if needs_weight(change) else None
    whole = change.parts.get(WHOLE_WEIGHT)
    if weight is not None and whole is not None and whole.shape != weight.shape:
        raise ValueError(f"adapter's weight is {whole.shape}, model's is {weight.shape}")
    return lowered(change, weight, bases.bias(base))


def _other_base(adapter: Adapter, manifest: Manifest) -> Iterator[str]:
    """What speaks against one base, where both sides say something.

    A fingerprint is made of the sites' own weights: that of fewer sites than the model's says nothing of the model's.
    """
    metadata, sites = adapter.metadata, {site.name for site in manifest.sites}
    fingerprint = "" if adapter.sites.keys() < sites else manifest.fingerprint
    told = {
        "fingerprint": (metadata.get("base_fingerprint", ""), fingerprint),
        "version": (metadata.get("model_version", ""), _version(fingerprint)),
        # A folder name is what is left of a local path on another machine.
        "name": tuple(
            name.rstrip("/").rpartition("/")[2] for name in (metadata.get("base_model", ""), manifest.base_model)
        ),
    }
    for what, (adapters, models) in told.items():
        if adapters and models and adapters != models:
            yield (
                f"adapter was made for {what} {adapters[:40]!r}, model is {models[:40]!r}; "
                "allow_other_base=True takes it all the same"
            )


def _version(fingerprint: str) -> str:
    return str(model_version(fingerprint)) if fingerprint else ""


def fitted(
    adapter: Adapter, sites: Iterable[AdapterSite], *, name: str = "adapter", fixed_rank: bool = False
) -> Adapter:
    """The adapter under the names, dtypes and parts of ``sites``; sites that it lacks stay absent.

    Names must be equal, but for one dotted prefix that all names of one side have more than the other's
    (``model.encoder.layer.0.q`` and ``encoder.layer.0.q``), and only when a single such prefix fits. Where the model's
    sites have no names, shapes decide, and only when each shape occurs once.

    Args:
        adapter: what a reader made
        sites: the model's sites
        name: what messages call the adapter
        fixed_rank: ports take up to the sites' own rank; else any

    Raises:
        MismatchError: naming every fault.

    Example:
        >>> from adapterx.site import AdapterSite
        >>> site = AdapterSite("m.fc", "", "lora", "MatMul", 4, 3, 2, 1.0, "float32", "structure", "")
        >>> fitted(Adapter({"fc": LowRank(a=np.ones((2, 4)), b=np.ones((2, 3)))}), [site]).sites["m.fc"].dtype
        dtype('float32')
    """
    sites = list(sites)
    fixed = frozenset(site.name for site in sites if fixed_rank)
    return _fitted(adapter, sites, name=name, fixed=fixed, faults=[], lower=lambda change, _: change)


_Lower = Callable[[LowRank, AdapterSite], LowRank]


def _fitted(
    adapter: Adapter,
    sites: Iterable[AdapterSite],
    *,
    name: str,
    fixed: frozenset[str],
    faults: list[_Fault],
    lower: _Lower,
    required: Collection[str] = (),
) -> Adapter:
    table = by_name(sites)
    fused = fused_sites(table)
    parts_of = parts_of_fused(table)
    adapter = for_model(adapter, dict.fromkeys({*fused, *parts_of}) | {name: one.shape for name, one in table.items()})
    rename = _by_shape(adapter, table) or renaming(adapter.sites, {*table, *fused, *parts_of})
    found: dict[str, LowRank] = {}
    for given, target, low_rank in _aimed(adapter, rename, table=table, parts_of=parts_of, faults=faults):
        parts = fused.get(target, (table[target],) if target in table else ())
        shaped = _shaped(low_rank, parts, adapter.metadata)
        causes = list(_causes(shaped, parts, fixed)) if parts else ["no such site"]
        alone = (needs_base(shaped, part, adapter.metadata) for part in parts if part.name in required)
        causes += [cause for cause in alone if cause]
        faults.extend(_Fault(given, cause) for cause in causes or _place(found, parts, shaped, lower))
    if faults:
        raise MismatchError(_message(name, faults, len(adapter.sites), [*table, *fused]))
    unchanged = found.keys() == adapter.sites.keys() and all(found[s] is adapter.sites[s] for s in found)
    return adapter if unchanged else Adapter(found, adapter.metadata)


def _aimed(
    adapter: Adapter,
    rename: Callable[[str], str],
    *,
    table: Mapping[str, AdapterSite],
    parts_of: Mapping[str, str],
    faults: list[_Fault],
) -> Iterator[tuple[str, str, LowRank]]:
    """``(name, site of the model, change)``; changes of parts that the model has only fused come as one."""
    groups: dict[str, dict[str, LowRank]] = defaultdict(dict)
    for given, change in adapter.sites.items():
        target = rename(given)
        if target not in parts_of:
            yield given, target, change
            continue
        whole = parts_of[target]
        groups[whole][target.rpartition(".")[2]] = _shaped(change, (table[whole],), adapter.metadata)
    for whole, members in groups.items():
        try:
            yield whole, whole, joined(members, whole.rpartition(".")[2], table[whole].d_out)
        except MismatchError as cause:
            faults.append(_Fault(whole, str(cause)))


def _by_shape(adapter: Adapter, table: Mapping[str, AdapterSite]) -> Callable[[str], str] | None:
    """Names for a model whose sites have none, when every shape tells one site of it from all others."""
    if adapter.sites.keys() & table.keys() or any(site.name_source != "structure" for site in table.values()):
        return None
    places = Counter(site.shape for site in table.values())
    given = Counter((low_rank.d_in, low_rank.d_out) for low_rank in adapter.sites.values())
    if any(places[shape] != 1 or count != 1 for shape, count in given.items()):
        return None
    by_shape = {site.shape: name for name, site in table.items()}
    return lambda name: by_shape[adapter.sites[name].d_in, adapter.sites[name].d_out]


def _shaped(change: LowRank, parts: tuple[AdapterSite, ...], metadata: Mapping[str, str]) -> LowRank:
    """``change`` in the shape that only the model knows: VeRA's columns, the kernel that LoHa files flatten."""
    if not parts:
        return change
    return shaped(change, parts[0].d_in, parts[0].kernel, peft_type=metadata.get("peft_type", ""))


def _place(found: dict[str, LowRank], parts: tuple[AdapterSite, ...], change: LowRank, lower: _Lower) -> list[str]:
    pieces = split(change, [part.d_out for part in parts]) if len(parts) > 1 else [change]
    causes = []
    for part, piece in zip(parts, pieces, strict=True):
        try:
            relative = piece if piece.is_relative else lower(piece, part)
        except ValueError as cause:
            causes.append(str(cause))
            continue
        strange = [side for side, _ in relative.tensors() if side not in part.ports]
        cast = cast_for(relative, part)
        if strange and relative.is_relative:
            causes.append(
                f"adapter brings {', '.join(strange)}, the model's site takes {', '.join(part.ports)}; "
                "extract or inject the model for this kind of adapter"
            )
        elif part.name in found:
            causes.append(f"{part.name} is given twice")
        elif isinstance(cast, str):
            causes.append(cast)
        else:
            found[part.name] = cast
    return list(dict.fromkeys(causes))


def _causes(change: LowRank, parts: tuple[AdapterSite, ...], fixed: frozenset[str]) -> Iterator[str]:
    d_in, d_out = parts[0].d_in, sum(part.d_out for part in parts)
    widths = (change.d_in, change.d_out)
    if parts[0].is_embedding and WHOLE_WEIGHT in change.parts:
        widths = widths[::-1]
    # What a site of vectors only does not tell cannot be wrong.
    if any(given and given != wanted for given, wanted in zip(widths, (d_in, d_out), strict=True)):
        wide = f"{d_out} ({' + '.join(str(part.d_out) for part in parts)})" if len(parts) > 1 else str(d_out)
        given = f"{change.a.shape} -> {change.d_out}" if change.rank else f"{widths[0]} -> {widths[1]}"
        yield f"adapter is {given}, model is {d_in} -> {wide}" + _transposed(change, d_in, d_out)
    else:
        for name, part in change.parts.items():
            wanted = d_in if name == INPUT_GAIN else d_out
            if name != WHOLE_WEIGHT and part.shape[1] != wanted:
                yield f"adapter's {name} is for {part.shape[1]} features, model has {wanted}"
    if change.rank and change.kernel != parts[0].kernel:
        yield f"adapter has a kernel of {change.kernel}, model of {parts[0].kernel}"
    limit = min((part.rank for part in parts if part.name in fixed), default=change.rank)
    if change.rank > limit:
        yield f"adapter has rank {change.rank}, the model's port takes {limit}; extract with dynamic_rank=True"
    prompt = change.parts.get(PROMPT)
    if prompt is not None and len(prompt) != parts[0].rank:
        yield f"adapter has {len(prompt)} virtual tokens, model has {parts[0].rank}"
    if not _is_float(change.dtype):
        yield f"adapter is {change.dtype}, model takes {parts[0].fitted_dtype}"


def _transposed(low_rank: LowRank, d_in: int, d_out: int) -> str:
    if (low_rank.d_in, low_rank.d_out) == (d_out, d_in):
        return "; only the transpose fits: it was made for a weight that lies [d_in, d_out], or a and b are swapped"
    if low_rank.rank == d_in == d_out and low_rank.d_in == low_rank.d_out:
        return "; only the transpose fits: a and b must lie [rank, d_in] and [rank, d_out]"
    return ""


@functools.cache
def _is_float(dtype: np.dtype[np.generic]) -> bool:
    return dtype.name.startswith(("float", "bfloat"))


def _message(name: str, faults: list[_Fault], of: int, known: list[str]) -> str:
    lines, looked = [], 0
    for fault in faults[:_SHOWN]:
        hint = ""
        if fault.cause == "no such site" and looked < _NEAREST:
            hint, looked = nearest(fault.place, known), looked + 1
        place = fault.place if fault.place.isprintable() else repr(fault.place)
        lines.append(f"  {place}: {fault.cause}{hint}")
    if len(faults) > _SHOWN:
        lines.append(f"  and {len(faults) - _SHOWN} more")
    places = len({fault.place for fault in faults if fault.place != "base"})
    at = f" at {places} of {of} sites" if places else ""
    head = f"adapter {name!r} does not fit this model{at}:"
    if any(place.startswith("structural.") for place in known):
        lines.append("  the model's sites have no names, and several have one shape; extract it with adapter=...")
    return "\n".join([head, *lines, "Export both from one checkpoint. `adapterx sites model.onnx` lists the model's."])
