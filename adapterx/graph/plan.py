"""Plan: which sites an injection makes, what each can take, and at which operations, before anything is changed."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from adapterx.adapter import (
    ABSOLUTE,
    GAIN,
    INPUT_GAIN,
    MAGNITUDE,
    PROMPT,
    SHIFT,
    WHOLE_BIAS,
    WHOLE_WEIGHT,
    Adapter,
    LowRank,
)
from adapterx.errors import MismatchError, nearest
from adapterx.fused import joined
from adapterx.graph.apart import is_activated
from adapterx.graph.base_names import gets_bias_later
from adapterx.graph.bases import Base
from adapterx.graph.fingerprint import fingerprint_of
from adapterx.graph.operations import factor_of
from adapterx.graph.rows import entrance
from adapterx.graph.targets import FOLDED, Modules
from adapterx.kinds import shaped
from adapterx.manifest import SiteBase
from adapterx.pipeline import for_model
from adapterx.renaming import renaming
from adapterx.site import LOW_RANK, PORTS, VECTORS, AdapterSite, Kind

_SHOWN = 50
# Ports of the kinds that need others than the two matrices; a shift only where there is a bias to be changed.
_PORTS: Mapping[str, frozenset[str]] = {
    "dora": frozenset({*LOW_RANK, GAIN, SHIFT}),
    "ia3": frozenset({GAIN, INPUT_GAIN}),
    "bias": frozenset({SHIFT}),
    "saved": frozenset({*LOW_RANK, SHIFT}),
}
_FORMS: Mapping[str, Kind] = {"conv": "conv", "embedding": "embedding"}
_BY_PEFT_TYPE: Mapping[str, Kind] = {"LOHA": "loha", "LOKR": "lokr", "VERA": "vera", "IA3": "ia3"}


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """One site to be, and the operations of its module."""

    site: AdapterSite
    bases: tuple[Base, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What an injection is going to do.

    Args:
        planned: in graph order
        elsewhere: sites of the given adapters that this file of a set does not have
        base_model: what the given adapters call their base, where all that say it say the same
    """

    planned: tuple[Planned, ...]
    elsewhere: tuple[str, ...] = ()
    base_model: str = ""

    @property
    def fingerprint(self) -> str:
        """Of the base operations under the sites' names; as :func:`extract_adapters` makes it."""
        return fingerprint_of((p.site.name, p.bases[0].op) for p in self.planned if p.bases[0].kind == "linear")

    @property
    def bases(self) -> dict[str, SiteBase]:
        """Where weights and biases lie, for sites that take adapters whose arithmetic these are part of."""
        return {
            p.site.name: SiteBase(base.weight, "" if base.bias is None else base.bias.name or "")
            for p in self.planned
            if VECTORS & set(p.site.ports) or p.site.kind == "saved"
            for base in p.bases[:1]
        }


def plan_for_modules(modules: Modules, names: Iterable[str], *, kinds: Collection[Kind], rank: int) -> Plan:
    """Sites at the modules of these names, for adapters of these kinds.

    Args:
        modules: all of the model
        names: those that are meant
        kinds: of adapters that shall fit; what a convolution or an embedding takes is told by the module
        rank: what the manifest says of sites that take any, and what fixed ports have

    Raises:
        MismatchError: a module that cannot take a kind.
    """
    planned, faults = [], []
    for name in names:
        base = modules.named[name][0]
        ports = frozenset[str]().union(*(_ports_of_kind(kind, base) for kind in kinds))
        cause = _cannot(base, ports)
        if cause:
            faults.append(f"{name}: {cause}")
        only = next(iter(kinds)) if len(kinds) == 1 else "lora"
        planned.append(_planned(name, modules.named[name], kind=only, ports=ports, rank=rank))
    if faults:
        raise MismatchError("\n  ".join(["modules that cannot take such adapters:", *faults[:_SHOWN]]))
    return Plan(tuple(planned))


def plan_for_adapters(modules: Modules, adapters: Mapping[str, Adapter], *, where: str, partial: bool = False) -> Plan:
    """Sites at the modules that the adapters change, each with the ports that they need together.

    Names are the adapter's own. Where one dotted prefix makes the difference to the graph's, it is undone, as it is
    when a session loads an adapter.

    Args:
        modules: all of the model
        adapters: by the names that messages call them
        where: the model's name for messages
        partial: sites that the model lacks are in other files of the export, and noted in the manifest

    Raises:
        MismatchError: adapters that do not belong to this model, with every fault.
    """
    needs: dict[str, _Need] = {}
    elsewhere: list[str] = []
    named: _Naming | None = None
    for label, adapter in adapters.items():
        aims = _Aims.of(adapter, modules)
        named = aims.naming if named is None else named
        faults = list(aims.faults)
        lost = aims.absent
        if partial and aims.needs:
            # What is here, and cannot take an adapter, is in no other file.
            lost = {site: target for site, target in lost.items() if target in modules.folded}
            elsewhere += [site for site in aims.absent if site not in lost and site not in elsewhere]
        faults += [f"{site}: {_absent(target, modules)}" for site, target in list(lost.items())[:_SHOWN]]
        faults += _other_base(adapter, aims, modules)
        if faults:
            raise MismatchError(_message(label, faults, adapter, where=where, note=modules.about_unnamed()))
        for name, need in aims.needs.items():
            needs[name] = need.with_other(needs.get(name))
    assert named is not None, "there is an adapter"
    planned = [
        _planned(named.site(name), bases, kind=needs[name].kind, ports=needs[name].ports, rank=needs[name].rank)
        for name, bases in modules.named.items()
        if name in needs
    ]
    told = {name for adapter in adapters.values() if (name := adapter.metadata.get("base_model", ""))}
    return Plan(tuple(planned), tuple(elsewhere), told.pop() if len(told) == 1 else "")


@dataclasses.dataclass(frozen=True, slots=True)
class _Need:
    """What one or several adapters need at one module."""

    kind: Kind
    ports: frozenset[str]
    rank: int

    def with_other(self, other: _Need | None) -> _Need:
        if other is None:
            return self
        kind = self.kind if self.kind == other.kind else "lora"
        return _Need(kind, self.ports | other.ports, max(self.rank, other.rank))


@dataclasses.dataclass(frozen=True, slots=True)
class _Naming:
    """How an adapter's names differ from the graph's: leading parts that it has more, or fewer."""

    added: str = ""
    dropped: str = ""

    @classmethod
    def of(cls, given: str, target: str) -> _Naming:
        """Of a name of the adapter, and what it is in the graph."""
        if len(given) > len(target):
            return cls(added=given.removesuffix(target))
        return cls(dropped=target.removesuffix(given))

    def __bool__(self) -> bool:
        return bool(self.added or self.dropped)

    def site(self, module: str) -> str:
        return self.added + module.removeprefix(self.dropped)


@dataclasses.dataclass(frozen=True, slots=True)
class _Aims:
    """Where the sites of one adapter lie in a model.

    Args:
        needs: by module
        absent: sites that the model has no module for, with what each would be called there
        faults: sites that do not fit theirs, in words
        naming: of the adapter
    """

    needs: Mapping[str, _Need]
    absent: Mapping[str, str]
    faults: tuple[str, ...]
    naming: _Naming

    @classmethod
    def of(cls, adapter: Adapter, modules: Modules) -> _Aims:
        known = {name: (name,) for name in modules.named} | modules.aliases
        shapes = {name: (bases[0].d_in, bases[0].d_out) for name, bases in modules.named.items()}
        adapter = for_model(adapter, {**dict.fromkeys(known), **shapes})
        rename = renaming(adapter.sites, known)
        needs: dict[str, _Need] = {}
        absent, faults, naming = dict[str, str](), list[str](), _Naming()
        parts: dict[str, dict[str, LowRank]] = defaultdict(dict)
        for given, change in adapter.sites.items():
            target = rename(given)
            if PROMPT in change.parts:
                faults.append(f"{given}: virtual tokens stand beside no operation; export the model with them")
                continue
            if target not in known:
                absent[given] = target
                continue
            naming = naming or _Naming.of(given, target)
            names = known[target]
            if target not in modules.named and len(names) == 1:
                parts[names[0]][target.rpartition(".")[2]] = change
                continue
            bases = [modules.named[name][0] for name in names]
            causes = _causes(change, bases, adapter.metadata)
            faults += [f"{given}: {cause}" for cause in causes]
            needs |= (
                {} if causes else {n: _need(change, b, adapter.metadata) for n, b in zip(names, bases, strict=True)}
            )
        for whole, members in parts.items():
            base = modules.named[whole][0]
            cut = {name: _shaped(change, base, adapter.metadata) for name, change in members.items()}
            try:
                change = joined(cut, whole.rpartition(".")[2], base.d_out)
            except MismatchError as cause:
                faults.append(f"{whole}: {cause}")
                continue
            causes = _causes(change, [base], {})
            faults += [f"{whole}: {cause}" for cause in causes]
            needs |= {} if causes else {whole: _need(change, base, adapter.metadata)}
        return cls(needs, absent, tuple(faults), naming)


def _planned(name: str, bases: tuple[Base, ...], *, kind: Kind, ports: Collection[str], rank: int) -> Planned:
    first = bases[0]
    site = AdapterSite(
        name=name,
        adapter="",
        kind=_FORMS.get(first.kind, kind) if kind == "lora" else kind,
        op=first.op.op_type,
        d_in=first.d_in,
        d_out=first.d_out,
        rank=rank,
        scale=1.0,
        dtype=first.dtype,
        name_source=first.name_source,
        node=first.op.name or "",
        kernel=first.kernel,
        ports=tuple(port for port in PORTS if port in ports),
    )
    return Planned(site, bases)


def _ports_of_kind(kind: Kind, base: Base) -> frozenset[str]:
    ports = _PORTS.get(kind, frozenset(LOW_RANK))
    if base.kind == "embedding":
        return ports - {GAIN, INPUT_GAIN, SHIFT}
    return ports if base.bias is not None or kind == "bias" else ports - {SHIFT}


def _need(change: LowRank, base: Base, metadata: Mapping[str, str]) -> _Need:
    """What ``change`` is fed through beside ``base``, once it is lowered."""
    held = set(change.parts)
    ports = {port for port in PORTS if port in held}
    if change.rank or held & {MAGNITUDE, WHOLE_WEIGHT}:
        ports |= set(LOW_RANK)
    if MAGNITUDE in held:
        ports |= {GAIN} | ({SHIFT} if base.bias is not None else set())
    if WHOLE_BIAS in held:
        ports.add(SHIFT)
    kind: Kind = "lora"
    if MAGNITUDE in held:
        kind = "dora"
    elif WHOLE_WEIGHT in held:
        kind = "saved"
    elif not change.rank:
        kind = "bias" if WHOLE_BIAS in held else "ia3"
    else:
        kind = _BY_PEFT_TYPE.get(metadata.get("peft_type", ""), "lora")
    rank = min(base.d_in, base.d_out) if WHOLE_WEIGHT in held else change.rank
    return _Need(kind, frozenset(ports), rank)


def _causes(change: LowRank, bases: Sequence[Base], metadata: Mapping[str, str]) -> list[str]:
    """Why ``change`` does not fit beside ``bases``, which are the parts of one layer where there are several."""
    first = bases[0]
    change = _shaped(change, first, metadata)
    d_in, d_out = first.d_in, sum(base.d_out for base in bases)
    given = (change.d_in, change.d_out)
    if first.kind == "embedding" and WHOLE_WEIGHT in change.parts:
        given = given[::-1]
    causes = []
    # What a change of vectors only does not tell cannot be wrong.
    if any(one and one != wanted for one, wanted in zip(given, (d_in, d_out), strict=True)):
        causes.append(f"adapter is {given[0]} -> {given[1]}, model is {d_in} -> {d_out}")
    elif change.rank and change.kernel != first.kernel:
        causes.append(f"adapter has a kernel of {change.kernel}, model of {first.kernel}")
    if change.parts.keys() & set(ABSOLUTE) - {WHOLE_BIAS} and any(base.weight is None for base in bases):
        causes.append("this kind of adapter needs the base's weight, which cannot be read out of this operation")
    cannot = (_cannot(base, _need(change, base, metadata).ports) for base in bases)
    return causes + list(dict.fromkeys(cause for cause in cannot if cause))


def _shaped(change: LowRank, base: Base, metadata: Mapping[str, str]) -> LowRank:
    return shaped(change, base.d_in, base.kernel, peft_type=metadata.get("peft_type", ""))


def _cannot(base: Base, ports: Collection[str]) -> str:
    """Why ports of gains and shifts cannot be put around ``base``, or ``""``."""
    if not ports:
        return "this kind of adapter changes nothing there"
    if {GAIN, SHIFT} & set(ports) and base.bias is None and gets_bias_later(base.output):
        return (
            "an optimizer moved its bias into the next node, so its whole result is nowhere in the graph; inject into "
            "the export, then optimize"
        )
    if {GAIN, SHIFT} & set(ports) and not base.pure and not is_activated(base.op):
        return "its operation also adds something else, so its own result is nowhere in the graph"
    if INPUT_GAIN in ports and entrance(base.x, base.op) is None:
        return "its operation reads codes, or rows that others read, so that its input cannot be scaled for it alone"
    if SHIFT in ports and base.bias is None and factor_of(base.op) != 1:
        return (
            "an optimizer multiplies its result with a number, and nothing tells whether the model does so before or "
            "after a bias of the layer would be added; inject into the export, then optimize"
        )
    return ""


def _other_base(adapter: Adapter, aims: _Aims, modules: Modules) -> Iterator[str]:
    """The base that the adapter was taken from is not this one, where both can tell."""
    told = adapter.metadata.get("base_fingerprint", "")
    if not told or aims.absent or aims.faults:
        return
    met = fingerprint_of(
        (aims.naming.site(n), modules.named[n][0].op) for n in aims.needs if modules.named[n][0].kind == "linear"
    )
    if met and met != told:
        yield f"base: adapter was taken from a model with fingerprint {told[:16]}, these weights have {met[:16]}"


def _absent(target: str, modules: Modules) -> str:
    if target in modules.folded:
        return f"the module has {FOLDED}"
    return f"no such module{nearest(target, modules.named)}"


def _message(label: str, faults: Sequence[str], adapter: Adapter, *, where: str, note: str) -> str:
    lines = [
        f"adapter {label!r} does not fit {where} at {len(faults)} of {len(adapter.sites)} sites:",
        *(f"  {fault}" for fault in faults[:_SHOWN]),
        f"  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else "",
        note,
        "Take an adapter that was trained on this base. For one file of a set (encoder, decoder), partial=True "
        "leaves the sites of the others to them.",
    ]
    return "\n".join(line for line in lines if line)
