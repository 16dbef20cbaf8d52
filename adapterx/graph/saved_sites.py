"""Modules that were trained in full beside an adapter (PEFT's ``modules_to_save``): a linear layer or an embedding.

The graph has their trained weight and nothing of the base's, so the exported adapter is that weight, and zeros take its
place.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from adapterx.adapter import SHIFT, WHOLE_WEIGHT, Adapter, Array, LowRank
from adapterx.errors import MismatchError
from adapterx.graph.bases import Base
from adapterx.graph.claims import FOLDED_FROM, NAME_SCOPES, base_layer_depth, listed, path_parts
from adapterx.graph.exported import Exported, Operand, nodes_between
from adapterx.graph.identity import Identity
from adapterx.graph.match import TOLERANCE, close
from adapterx.graph.operations import constant_behind
from adapterx.graph.view import all_nodes, constant, linear
from adapterx.graph.weights import read
from adapterx.kinds.lora import of_delta
from adapterx.site import NameSource

_PARAMETER = re.compile(
    r"^(?P<module>.+?)\.modules_to_save\.(?P<adapter>[^.]+)(?P<inner>(?:\.[^.]+)*?)\.(?:weight|bias)$"
)
_SCOPE = re.compile(r"^(?P<module>.+?)\.modules_to_save\.(?P<adapter>[^.]+)(?P<inner>(?:\.[^.]+)*)$")
_NUMBER = re.compile(r"_\d+$")


def find_saved(model: ir.Model, bases: Sequence[Base]) -> list[Exported]:
    """Every base operation that names show to be trained in full, if its weight is stored as floats."""
    adapters, wrapped = _by_paths(model)
    found = []
    for base in bases:
        who = next(_told(base, adapters, wrapped), None)
        weight = None if who is None or not base.pure or base.kind == "conv" else _weight(base)
        if who is not None and weight is not None:
            found.append(_exported(base, who, weight))
    return found


def find_given(bases: Sequence[Base], adapter: Adapter, taken: Collection[str]) -> list[tuple[str, Exported]]:
    """Modules that ``adapter`` has whole and whose names the graph lost: those of its values, or else of its name.

    Args:
        bases: the model's base operations
        adapter: that was exported
        taken: its sites that were found already

    Raises:
        MismatchError: a nameless operation of the same shape has other values, or several have the same.
    """
    found: list[tuple[str, Exported]] = []
    unclear = []
    for name, change in adapter.sites.items():
        whole = change.parts.get(WHOLE_WEIGHT)
        if whole is None or name in taken:
            continue
        fitting = [(base, weight) for base in bases if (weight := _weight_like(base, whole)) is not None]
        equal = [base for base, weight in fitting if is_equal(weight, _laid(whole, base))]
        places = equal or [base for base, _ in fitting if base.name == name]
        if len({base.op.inputs[_slot(base)] for base in places}) > 1 or (
            not places and any(not base.name for base, _ in fitting)
        ):
            unclear.append(name)
        for base, weight in fitting:
            if base in places:
                source = "adapter_values" if equal else base.name_source
                found.append((name, _exported(base, Identity("", "", source), weight)))
    if unclear:
        raise MismatchError(
            f"{', '.join(unclear)}: trained in full, and of the graph's operations of that shape, which have no names, "
            "not one alone has its values; give the very adapter that was exported with the model"
        )
    return found


def _weight_like(base: Base, whole: Array) -> Array | None:
    """The weight of ``base`` as ``[d_out, d_in]``, if ``whole`` could be in its place."""
    fits = base.pure and base.kind != "conv" and _laid(whole, base).shape == (base.d_out, base.d_in)
    return _weight(base) if fits else None


def _laid(whole: Array, base: Base) -> Array:
    """An embedding's table lies ``[vocabulary, hidden]`` in files."""
    return whole.T if base.kind == "embedding" else whole


def is_equal(weight: Array, whole: Array) -> bool:
    """Whether two arrays of one shape hold the same numbers, as far as their types can."""
    return close(weight, whole, max(TOLERANCE.get(one.dtype.name, 1e-5) for one in (weight, whole)))


def _slot(base: Base) -> int:
    return 0 if base.kind == "embedding" else 1


def bias_operand(base: Base) -> Operand | None:
    """Where the bias of ``base`` is read, as a node and its slot; ``None`` when it has none."""
    node = base.output.producer()
    while base.bias is not None and node is not None:
        first = 0 if node is not base.op else 2
        for slot, value in enumerate(node.inputs[first:], first):
            if constant_behind(value) is base.bias:
                return node, slot
        above = [v for v in node.inputs if v is not None and constant_behind(v) is None]
        node = None if node is base.op or not above else above[0].producer()
    return None


def bias_of(base: Base) -> Array | None:
    """The bias of ``base`` as a row ``[1, d_out]``; ``None`` when it has none."""
    found = constant(base.bias)
    return None if found is None else read(found.tensor).reshape(1, -1)


def _weight(base: Base) -> Array | None:
    """The weight as ``[d_out, d_in]``; ``None`` where it is not stored as floats."""
    if base.kind == "embedding":
        table = constant(base.op.inputs[0])
        return None if table is None else table.numpy().T
    product = linear(base.op)
    return None if product is None else product.matrix().T


def _exported(base: Base, who: Identity, weight: Array) -> Exported:
    places = [(base.op, _slot(base))]
    bias, place = bias_of(base), bias_operand(base)
    change = of_delta(weight, weight.dtype)
    if bias is not None and place is not None:
        places.append(place)
        change = LowRank(a=change.a, b=change.b, parts={SHIFT: bias.astype(weight.dtype)})
    nodes = {base.op: None}
    for node, slot in places:
        nodes |= dict.fromkeys((node, *nodes_between(node.inputs[slot], base.op)))
    return Exported(
        module=who.module,
        adapter=who.adapter,
        source=who.source,
        kind="saved",
        op=base.op,
        x=base.x,
        base=base.output,
        join=None,
        change=change,
        nodes=tuple(nodes),
        trained=tuple(places),
    )


def _told(base: Base, adapters: Collection[str], wrapped: Collection[tuple[str, ...]]) -> Iterator[Identity]:
    """What names say of a module trained in full, the surest first: a tensor can stand for equal ones of others."""
    weight = base.op.inputs[_slot(base)]
    roots = [value for value in (constant_behind(weight), base.bias) if value is not None]
    alone = [value for value in roots if len(value.uses()) == 1]
    yield from _by_tensors(alone)
    scopes = listed(base.op.metadata_props.get(NAME_SCOPES))
    for scope in scopes:
        if (found := _SCOPE.match(scope)) is not None:
            yield Identity(found["module"] + found["inner"], found["adapter"], "name_scopes")
    parts = path_parts(base.op.name or "")[:-1]
    depth = next((i for i, part in enumerate(parts) if i and _NUMBER.sub("", part) in adapters), 0)
    if depth and tuple(parts[:depth]) not in wrapped:
        yield Identity("/".join((*parts[:depth], *parts[depth + 1 :])), _NUMBER.sub("", parts[depth]), "node_path")
    if not scopes and not parts:
        yield from _by_tensors(roots)


def _by_tensors(values: Sequence[ir.Value]) -> Iterator[Identity]:
    sources: tuple[NameSource, NameSource] = ("initializer", "folded_from")
    for value in values:
        for source, names in zip(
            sources, ([str(value.name)], listed(value.metadata_props.get(FOLDED_FROM))), strict=True
        ):
            for found in filter(None, map(_PARAMETER.match, names)):
                yield Identity(found["module"] + found["inner"], found["adapter"], source)


def _by_paths(model: ir.Model) -> tuple[set[str], set[tuple[str, ...]]]:
    """Names of adapters, and paths of what PEFT wrapped, where the one is traced as a child of the other."""
    paths = [parts for node in all_nodes(model) if len(parts := path_parts(node.name or "")) > 1]
    wrapped = {tuple(parts[:depth]) for parts in paths if (depth := base_layer_depth(parts))}
    names = set()
    for parts in paths:
        depth = next((i for i in range(1, len(parts) - 1) if tuple(parts[:i]) in wrapped), 0)
        if depth and base_layer_depth(parts) != depth:
            names.add(_NUMBER.sub("", parts[depth]))
    return names, wrapped
