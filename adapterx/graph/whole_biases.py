"""Biases that were trained in full beside an adapter (PEFT's ``bias="lora_only"`` and ``"all"``).

A graph looks the same with them and without: its biases have their usual names, and no exporter says what was trained.
Only the adapter that was exported tells, so nothing is looked at here unless that is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from adapterx.adapter import GAIN, SHIFT, WHOLE_BIAS, Adapter, Array, LowRank
from adapterx.errors import ModelError
from adapterx.graph.bases import Base
from adapterx.graph.exported import Exported, Operand
from adapterx.graph.match import Pair
from adapterx.graph.other_kinds import Other, Others, other_of
from adapterx.graph.saved_sites import bias_of, bias_operand, is_equal
from adapterx.kinds.lora import cast, wide
from adapterx.site import LOW_RANK


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class WholeBiases:
    """Sites with the biases that came with their adapter.

    Args:
        sites: low-rank linear ones, their branches with the base's bias as their own
        others: all others, with sites of nothing but a bias
        trained: where the biases of ``sites`` are read, by site
    """

    sites: list[Pair]
    others: tuple[Other, ...]
    trained: dict[str, list[Operand]]


def take_biases(model: ir.Model, sites: Sequence[Pair], others: Others, adapter: Adapter | None) -> WholeBiases:
    """Count as the adapter's every bias that ``adapter`` says to be its own.

    Args:
        model: looked at
        sites: low-rank linear sites
        others: all others
        adapter: that was exported, if it is at hand

    Raises:
        ModelError: one that is no linear layer's or convolution's, or that an optimizer moved into another operation.
    """
    pairs, rest, trained = list(sites), {other.site.name: other for other in others.found}, {}
    made: dict[str, Other] = {}
    lost = []
    for name, change in ({} if adapter is None else adapter.sites).items():
        if WHOLE_BIAS not in change.parts or (name in rest and rest[name].site.kind == "saved"):
            continue
        places = _places(name, pairs, rest.get(name), others.bases) or _equal(change.parts[WHOLE_BIAS], others.bases)
        operands = [operand for base in places if (operand := bias_operand(base)) is not None]
        if not places or len(operands) < len(places):
            lost += [name] if places or _has_bias(model, name) else []
        elif any(site.name == name for _, site in pairs):
            by_op = {base.op: base for base in places}
            pairs = [_with_bias(pair, by_op) if pair[1].name == name else pair for pair in pairs]
            trained[name] = operands
        else:
            changed = [_changed(rest.get(name), base, operand) for base, operand in zip(places, operands, strict=True)]
            made[name] = other_of(name, changed)
    if lost:
        raise ModelError(
            f"the adapter has biases of its own at {', '.join(lost)}, which are not added to a linear layer or a "
            'convolution in this graph; export without optimizations, or train with bias="none"'
        )
    kept = [other for other in others.found if other.site.name not in made]
    return WholeBiases(pairs, (*kept, *made.values()), trained)


def _places(name: str, pairs: Sequence[Pair], other: Other | None, bases: Sequence[Base]) -> list[Base]:
    """The base operations of the site ``name``: those that have an adapter, or else those of that module."""
    ops = {branch.base_op for branch, site in pairs if site.name == name}
    ops |= set() if other is None else {place.op for place in other.places}
    return [base for base in bases if (base.op in ops if ops else base.name == name)]


def _equal(whole: Array, bases: Sequence[Base]) -> list[Base]:
    """The one operation whose bias has these values, where names do not tell."""
    biases = [(base, bias) for base in bases if (bias := bias_of(base)) is not None and bias.shape == whole.shape]
    equal = [base for base, bias in biases if is_equal(bias, whole)]
    return equal if len({base.bias for base in equal}) == 1 else []


def _has_bias(model: ir.Model, name: str) -> bool:
    """Whether names speak of the bias; if not, it may lie in another file of the export."""
    ends = (f".{name}.bias", f".{name}.base_layer.bias")
    return any(f".{value}".endswith(ends) for graph in model.graphs() for value in graph.initializers)


def _with_bias(pair: Pair, by_op: Mapping[ir.Node, Base]) -> Pair:
    branch, site = pair
    if branch.bias is not None:
        raise ModelError(
            f"{site.name}: the adapter has a bias of its own beside B, and the base's; give it one of them"
        )
    assert branch.base_op is not None, "it was looked up by this"
    whole = dataclasses.replace(branch, bias=by_op[branch.base_op].bias, bias_scale=1.0)
    return whole, dataclasses.replace(site, kind="bias", ports=(*LOW_RANK, SHIFT))


def _changed(other: Other | None, base: Base, operand: Operand) -> Exported:
    """What is exported at ``base``, its bias included."""
    bias = bias_of(base)
    assert bias is not None, "what is read somewhere is there"
    if other is None:
        return Exported(
            module=base.name,
            adapter="",
            source=base.name_source,
            kind="bias",
            op=base.op,
            x=base.x,
            base=base.output,
            join=None,
            change=LowRank.of_parts({SHIFT: bias}),
            trained=(operand,),
        )
    [place] = [place for place in other.places if place.op is base.op]
    change, parts = place.change, dict(place.change.parts)
    # The base's bias was under the gain, too.
    total = wide(bias) * (1 + wide(parts[GAIN])) if GAIN in parts else wide(bias)
    if SHIFT in parts:
        total = total + wide(parts[SHIFT])
    parts[SHIFT] = cast(total, change.dtype, "bias")
    change = LowRank(a=change.a, b=change.b, parts=parts)
    return dataclasses.replace(place, change=change, trained=(*place.trained, operand))
