"""Which base operations of a model are quantized and how, before anything is changed; and why the others are not."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import onnx_ir as ir

from adapterx.errors import ModelError, OptionError
from adapterx.formats import load_adapter
from adapterx.graph.base_methods import RTN, Method, StaticInt8
from adapterx.graph.bases import Base, find_bases
from adapterx.graph.branches import Branch, find_branches
from adapterx.graph.claims import claims_of
from adapterx.graph.operations import constant_behind, factor_of
from adapterx.graph.other_kinds import find_others
from adapterx.graph.paths import Paths
from adapterx.graph.sites import AdapterLike, find, looks_like_adapter
from adapterx.graph.targets import Modules, Target, is_head, modules_of, targeted
from adapterx.graph.view import MICROSOFT, STANDARD, all_nodes, attribute, is_op
from adapterx.quantization_table import FloatRow

_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "TransposeMatMul")
# Adapters that are added beside what the base gives, or multiply it. Those of other kinds are made of its weight.
_BESIDE = frozenset({"lora", "ia3", "bias", "conv", "embedding", "prompt"})
_COMMON = frozenset({"ia3", "prompt", "bias"})
MAYBE: Final = "perhaps an adapter's, though nothing names one: give that (adapter=...), or name the layer in layers"
_FLOATS = frozenset({"float32", "float16", "bfloat16"})
_OF_TABLES = (4, 8)
_SHOWN = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Wish:
    """What the caller wants.

    Args:
        method: for every linear layer
        layers: exceptions by name, end of name, compiled expression or operator; ``None`` leaves a layer float. A name
            is stronger than an operator, and of several names the last
        head: quantize the layer that makes the logits, too
        embeddings: quantize tables of embeddings, too
    """

    method: Method
    layers: Mapping[Target, Method | None] = dataclasses.field(default_factory=dict)
    head: bool = False
    embeddings: bool = False


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class QuantizePlan:
    """What becomes of each base operation.

    Args:
        chosen: bases with their methods, in graph order
        floats: what stays, and why
        adapters: how many sites of adapters the model still holds inside
    """

    chosen: tuple[tuple[Base, Method], ...]
    floats: tuple[FloatRow, ...]
    adapters: int


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Adapters:
    """What of a graph is an adapter's.

    Args:
        factors: nodes that multiply with its weights
        within: base operations that it is woven into -> why they stay
        likely: operations that may be an adapter's, or have one in them, though nothing names it
        sites: how many places there are
    """

    factors: frozenset[ir.Node]
    within: Mapping[ir.Node, str]
    likely: frozenset[ir.Node]
    sites: int


def quantize_plan(model: ir.Model, wish: Wish, *, where: str, adapter: AdapterLike | None = None) -> QuantizePlan:
    """What of ``model`` is quantized. Adapters in it are known by dataflow, as :func:`find_sites` knows them.

    Args:
        model: looked at
        wish: what the caller wants
        where: the model's name for messages
        adapter: the one that was exported with it, if it is at hand

    Raises:
        ModelError: nothing can be quantized, or an exception names no module, or one that cannot be.
    """
    bases = find_bases(model)
    adapters = _adapters(model, adapter, where)
    explicit = _explicit(bases, wish.layers, where)
    chosen: list[tuple[Base, Method]] = []
    floats: list[FloatRow] = []
    faults: list[str] = []
    for base in bases:
        if base.op in adapters.factors:
            continue
        method = explicit.get(base.op, MAYBE if base.op in adapters.likely else _default(base, wish))
        reason = method if isinstance(method, str) else "as asked for" if method is None else ""
        cannot = adapters.within.get(base.op, "") or _cannot(base)
        if not cannot and isinstance(method, StaticInt8) and base.op.graph is not model.graph:
            cannot = "it lies in a branch or a loop, where activations cannot be measured"
        if base.op in explicit and method is not None and cannot:
            faults.append(f"  {_name(base)} ({base.op.op_type}): {cannot}")
        if not reason and not cannot and method is not None and not isinstance(method, str):
            chosen.append((base, method))
        else:
            floats.append(FloatRow(_name(base), base.op.op_type, cannot or reason))
    if faults:
        raise ModelError("\n".join([f"layers of {where} that cannot be quantized:", *dict.fromkeys(faults)]))
    floats += _unknown(model, {base.op for base in bases} | adapters.factors | adapters.likely)
    if not chosen:
        lines = [f"  {row.module} ({row.op}): {row.reason}" for row in floats[:_SHOWN]]
        raise ModelError("\n".join([f"nothing in {where} can be quantized", *lines]))
    return QuantizePlan(tuple(chosen), tuple(dict.fromkeys(floats)), adapters.sites)


def _name(base: Base) -> str:
    return base.name or base.folded or base.op.name or str(base.op.outputs[0].name)


def _adapters(model: ir.Model, adapter: AdapterLike | None, where: str) -> _Adapters:
    found = () if adapter is None else find(model, adapter=adapter, where=where).found
    named = {branch.a.node for one in found for branch in one.branches}
    branches = find_branches(model)
    sure = [branch for branch in branches if branch.a.node in named or any(claims_of(branch))]
    factors = _factors(sure)
    likely = _factors(branch for branch in branches if looks_like_adapter(branch))
    within: dict[ir.Node, str] = {}
    exported = load_adapter(adapter) if isinstance(adapter, str | os.PathLike) else adapter
    others = find_others(model, Paths.of(model), exported)
    for other in others.found:
        for place in other.places:
            factors.update(place.nodes)
            ops = [node for node, _ in place.trained]
            ops += [] if place.op is None or other.site.kind in _BESIDE else [place.op]
            within |= dict.fromkeys(
                ops, f"its {other.site.kind} adapter is made of its weight; extract the adapter, then quantize"
            )
    for place in others.left:
        # Without names every norm looks like (IA)3, and the constant of a mask like a prompt.
        if place.kind not in _COMMON:
            likely |= {*place.nodes, *([] if place.op is None else [place.op])}
    sites = len({branch.join for branch in sure}) + len(others.found)
    return _Adapters(frozenset(factors - within.keys()), within, frozenset(likely - factors), sites)


def _factors(branches: Iterable[Branch]) -> set[ir.Node]:
    return {node for branch in branches for node in (branch.a.node, branch.b.node)}


def _explicit(
    bases: Sequence[Base], layers: Mapping[Target, Method | None], where: str
) -> dict[ir.Node, Method | None]:
    """Methods of the operations that ``layers`` speaks of: by operator first, by name on top."""
    if not layers:
        return {}
    types = {base.op.op_type for base in bases}
    found = {base.op: layers[base.op.op_type] for base in bases if base.op.op_type in layers}
    modules: Modules | None = None
    for target, method in layers.items():
        if isinstance(target, str) and target in types:
            continue
        modules = modules or modules_of(list(bases), where)
        for name in targeted(modules, target, where=where):
            found |= {base.op: method for base in modules.named[name]}
    return found


def _default(base: Base, wish: Wish) -> Method | str:
    """The method of an operation that no exception speaks of, or why it has none."""
    if base.kind == "conv":
        return "a convolution"
    if base.kind == "embedding":
        return wish.method if wish.embeddings else "an embedding (embeddings=True quantizes it)"
    if is_head(base) and not wish.head:
        return "it makes the logits (head=True quantizes it)"
    return wish.method


def _cannot(base: Base) -> str:
    """Why ``base`` cannot be quantized, or ``""``."""
    if base.weight is not None and base.weight.quantized:
        return "its weight is in codes already"
    if base.kind == "conv":
        return "a convolution, and codes are for linear layers and embeddings"
    if base.weight is None or (base.kind == "embedding") != (base.weight.form == "embedding"):
        return "its weight cannot be read out of this graph"
    if base.dtype not in _FLOATS:
        return f"it computes in {base.dtype}"
    factor, plain = factor_of(base.op), attribute(base.op, "beta", 1.0) == 1.0
    if factor != 1 or not plain:
        return f"an optimizer put a factor into it (alpha={factor:g}, beta={attribute(base.op, 'beta', 1.0):g})"
    return ""


def of_table(method: Method) -> RTN:
    """How a table of embeddings is quantized where linear layers are by ``method``: symmetric, by RTN.

    ONNX Runtime 1.24 misreads the zero points of an odd number of blocks, and knows tables of 4 and 8 bits only.

    Raises:
        OptionError: at 2 bits.
    """
    if not isinstance(method, RTN):
        return RTN(bits=4)
    if method.bits not in _OF_TABLES:
        raise OptionError(
            f"an embedding takes 4 or 8 bits, not {method.bits}; give its own, layers={{'Gather': RTN(bits=4)}}"
        )
    return dataclasses.replace(method, symmetric=True)


def _unknown(model: ir.Model, known: Collection[ir.Node]) -> list[FloatRow]:
    """Products with a constant that are no linear layers: a matrix for each expert, a vector."""
    found = []
    for node in all_nodes(model):
        if node in known or not is_op(node, *_PRODUCTS, domain=(*STANDARD, MICROSOFT)) or len(node.inputs) < 2:
            continue
        root = constant_behind(node.inputs[1])
        tensor = None if root is None else ir.convenience.get_const_tensor(root)
        if tensor is not None and tensor.size > 1 and constant_behind(node.inputs[0]) is None:
            shape = tuple(int(dim) for dim in tensor.shape.numpy())
            name = node.name or str(node.outputs[0].name)
            found.append(FloatRow(name, node.op_type, f"its constant {shape} is no weight of a linear layer"))
    return found
