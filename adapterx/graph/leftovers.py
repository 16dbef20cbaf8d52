"""What a model says of adapters beyond the sites that were found: reasons not to take a part for the whole."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

import onnx_ir as ir

from adapterx.graph.branches import Branch
from adapterx.graph.claims import FOLDED_FROM, NAME_SCOPES, base_layer_depth, listed, path_parts
from adapterx.graph.paths import Paths
from adapterx.graph.view import all_nodes, is_fixed, is_op
from adapterx.site import AdapterSite

_MARK = re.compile(
    r"\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)(?:\.|$)|\.(?:hada_w|lokr_w|ia3_l|vera_lambda|oft_)"
    r"|\.modules_to_save\.|(?:^|\.)prompt_encoder\.[^.]+\.(?:embedding\.weight$|mlp_head\.|lstm_head\.|transform\.)"
)
_COMPUTED = ": of a prompt that the graph computes; save the adapter, load it (PeftModel.from_pretrained), export that"
_NUMBERED = re.compile(r"_\d+$")


def leftovers(
    model: ir.Model,
    found: Iterable[tuple[Branch, AdapterSite]],
    paths: Paths,
    theirs: Collection[ir.Node] = (),
    others: Collection[str] = (),
) -> tuple[str, ...]:
    """One line for each thing that belongs to an adapter and is no site.

    Args:
        model: looked at
        found: low-rank linear sites
        paths: of the model
        theirs: nodes that belong to sites of other kinds
        others: names of those sites
    """
    pairs = list(found)
    # Of nodes that a quantizer made, nothing but the site's name tells the module.
    named = {*others, *(site.name for _, site in pairs)}
    return (*_marked(model, pairs, theirs), *_wrapped_or_tuned(model, pairs, paths, theirs, named))


def _marked(model: ir.Model, found: list[tuple[Branch, AdapterSite]], theirs: Collection[ir.Node]) -> list[str]:
    """Names of constants in use, or of what they were folded from, that speak of an adapter."""
    taken = {value for branch, _ in found for factor in (branch.a, branch.b) for value in factor.weight.values}
    taken |= {value for b, _ in found for factor in (b.a, b.b) if (value := factor.node.inputs[1]) is not None}
    taken |= {branch.bias for branch, _ in found if branch.bias is not None}
    marks = set()
    for value in _constants(model):
        names = [value.name or "", *listed(value.metadata_props.get(FOLDED_FROM))]
        spoken = next((name for name in names if _MARK.search(name)), None)
        used = value.is_graph_output() or any(use.node not in theirs for use in value.uses())
        if spoken is not None and value not in taken and used:
            marks.add(spoken + _COMPUTED * ("prompt_encoder." in spoken) + _lost_norm(value))
    return sorted(marks)


def _lost_norm(magnitude: ir.Value) -> str:
    """What DoRA's magnitude is divided by, where that is not known before the run."""
    norms = [use.node.inputs[1] for use in magnitude.uses() if is_op(use.node, "Div") and use.idx == 0]
    for norm in norms:
        queue, seen = [norm], set[ir.Value]()
        while queue:
            value = queue.pop()
            if value is None or value in seen:
                continue
            seen.add(value)
            node = value.producer()
            if node is None and value.const_value is None:
                return f": the base weight {value.name!r}, whose length it is divided by, is not in the graph"
            queue += [] if node is None else node.inputs
    return ""


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()
        for node in graph:
            if is_op(node, "Constant"):
                yield node.outputs[0]


def _wrapped_or_tuned(
    model: ir.Model,
    found: list[tuple[Branch, AdapterSite]],
    paths: Paths,
    theirs: Collection[ir.Node],
    named: Collection[str],
) -> list[str]:
    """Modules that PEFT wrapped or trained in full, by node paths and scopes, beside which no branch was found."""
    nodes = {node for b, _ in found for node in (b.a.node, b.b.node, b.base_op, b.join) if node is not None}
    adapters = {site.adapter for _, site in found if site.adapter}
    known = {module for node in (*nodes, *theirs) for module, _ in _modules(node, adapters)}
    lines: dict[str, str] = {}
    for node in all_nodes(model):
        for module, what in _modules(node, adapters):
            if module not in known and (name := paths.canonical(module)) not in named:
                lines.setdefault(module, f"{name}: {what}")
    return list(lines.values())


def _modules(node: ir.Node, adapters: set[str]) -> Iterator[tuple[str, str]]:
    """Modules that a node's path or scopes show to be PEFT's, with the words for it."""
    parts = path_parts(node.name or "")
    if depth := base_layer_depth(parts):
        yield "/".join(parts[:depth]), _wrapped(node)
    inner = next((i for i, part in enumerate(parts[:-1]) if i and _NUMBERED.sub("", part) in adapters), 0)
    if inner:
        yield "/".join(parts[:inner]), "trained in full (modules_to_save), or adapted in a way that is not known here"
    for scope in listed(node.metadata_props.get(NAME_SCOPES)):
        if scope.endswith(".base_layer"):
            yield scope.removesuffix(".base_layer"), _wrapped(node)


def _wrapped(node: ir.Node) -> str:
    """The reason for what PEFT wrapped and no finder took."""
    weight = node.inputs[1] if is_op(node, "MatMul", "Gemm", "Conv") else None
    if weight is not None and not is_fixed(weight):
        return f"wrapped by PEFT, and its base weight {weight.name!r} is not in the graph"
    return "wrapped by PEFT, but not by an adapter that can be taken"
