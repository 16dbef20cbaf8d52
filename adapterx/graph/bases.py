"""find_bases: every operation of a model that an adapter can act on, with the module that it is in the checkpoint."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from adapterx.base_weight import BaseWeight
from adapterx.graph.base_names import UNNAMED, Candidate, Name, folded_into, is_adapters, named
from adapterx.graph.branches import find_branches
from adapterx.graph.claims import claims_of
from adapterx.graph.operations import ANY, Kind, Operation, constant_behind, operation
from adapterx.graph.paths import Paths
from adapterx.graph.rows import unflattened
from adapterx.graph.shapes import Shapes
from adapterx.graph.stored import base_weight_of
from adapterx.graph.view import all_nodes, is_op
from adapterx.manifest import manifest_of
from adapterx.site import NameSource

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Base:
    """One base operation.

    Rows that an exporter flattened in front of the operation and folded back after it (GPT-2's Conv1D) are seen as
    they were: ``x`` above, ``output`` below.

    Args:
        name: the module's path in the source checkpoint, ``""`` when nothing tells it
        name_source: what told it
        kind: ``linear``, ``conv`` or ``embedding``
        op: the node with the weight
        x: the float activations that it reads, above any quantization; ids of an embedding
        output: its result, dequantized, with a constant bias added
        d_in: features that come in (channels of a convolution, rows of an embedding)
        d_out: features that go out
        kernel: of a convolution, else empty
        dtype: numpy name of the type in which adapters are fed: that of ``x``, of ``output`` for an embedding
        bias: the constant that is part of ``output``, or ``None``
        weight: how the float weight is stored, ``None`` where it cannot be read
        folded: the module's path, where a normalization behind it was folded into the weight; it has no ``name`` then,
            since what an adapter of the module adds would have to be normalized, too
        pure: ``output`` is the product and the bias, nothing on top. A fused operation gives an activation, or a sum
            with something else, and has to be taken apart before anything can be added
        columns: constants that scale or order the columns of ``x`` before the weight meets them
    """

    name: str
    name_source: NameSource
    kind: Kind
    op: ir.Node
    x: ir.Value
    output: ir.Value
    d_in: int
    d_out: int
    kernel: tuple[int, ...]
    dtype: str
    bias: ir.Value | None
    weight: BaseWeight | None
    folded: str = ""
    pure: bool = True
    columns: tuple[ir.Value, ...] = ()


def find_bases(model: ir.Model, paths: Paths | None = None) -> list[Base]:
    """Every linear layer, convolution and embedding of ``model``, subgraphs included, in graph order.

    The factors of adapters that the graph still holds are not among them. Nothing is changed, and no weight is read.
    One module has several bases of one name where it is called several times.

    Args:
        model: of any exporter, optimized or quantized; also one that adapterx made
        paths: how names of this model are read, when the caller has it already
    """
    branches = [branch for branch in find_branches(model) if any(claims_of(branch))]
    factors = {node for branch in branches for node in (branch.a.node, branch.b.node)}
    shapes = Shapes(model)
    found: list[tuple[Candidate, _Result]] = []
    for node in all_nodes(model):
        step = None if node in factors else operation(node)
        result = None if step is None else _result(node, step, shapes)
        if step is not None and result is not None:
            found.append((Candidate(node, step, result.output, result.bias), result))
    found = [(candidate, result) for candidate, result in found if not is_adapters(candidate)]
    manifest = manifest_of(model.metadata_props, where="the model")
    sites = frozenset() if manifest is None else frozenset(manifest.sites.names)
    paths = paths or Paths.of(model)
    names = named([candidate for candidate, _ in found], paths, sites)
    # Where there is a port already, whoever put it there knew.
    folded = [
        "" if name in sites else folded_into(one, paths) for (one, _), (name, _) in zip(found, names, strict=True)
    ]
    return [_base(*one, name, was) for one, name, was in zip(found, names, folded, strict=True)]


def _base(candidate: Candidate, result: _Result, name: Name, folded: str) -> Base:
    step = candidate.operation
    return Base(
        *(UNNAMED if folded else name),
        kind=step.kind,
        op=candidate.node,
        x=result.x,
        output=result.output,
        d_in=step.d_in,
        d_out=step.d_out,
        kernel=step.kernel,
        dtype=result.dtype,
        bias=result.bias,
        weight=base_weight_of(candidate.node),
        folded=folded,
        pure=step.pure,
        columns=step.columns,
    )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Result:
    x: ir.Value
    output: ir.Value
    bias: ir.Value | None
    dtype: str


def _result(node: ir.Node, step: Operation, shapes: Shapes) -> _Result | None:
    """What becomes of the operation's output, as far as it belongs to the operation; ``None`` for another pattern."""
    whole = _scaled(node.outputs[0]) if step.integer else node.outputs[0]
    if whole is None:
        return None
    value = _dequantized(whole) if step.kind == "embedding" else whole
    bias = None if step.bias is None else constant_behind(step.bias)
    if step.bias is None and step.pure:
        value, bias = _with_bias(value, step)
    x = step.x
    if step.kind == "linear" and step.pure:
        x, value = unflattened(x, value, (step.d_in, step.d_out), shapes)
    dtype = shapes.dtype(value if step.kind == "embedding" else x)
    # A model that states no types, and whose operators inference does not know, is a float model all the same.
    name = "float32" if dtype is None else dtype.numpy().name
    return _Result(x, value, bias, name) if name in _FLOATS else None


def _only_use(value: ir.Value) -> tuple[ir.Node, int] | None:
    uses = () if value.is_graph_output() else value.uses()
    return next(iter(uses)) if len(uses) == 1 else None


def _scaled(value: ir.Value) -> ir.Value | None:
    """Past ``Cast -> Mul``, which make floats of the sums of codes; past a second Mul, where the first has no constant.

    Scales by token and by column are multiplied in one after another.
    """
    cast = _only_use(value)
    if cast is None or not is_op(cast[0], "Cast"):
        return None
    use = _only_use(cast[0].outputs[0])
    if use is None or not is_op(use[0], "Mul"):
        return None
    value, factor = use[0].outputs[0], use[0].inputs[1 - use[1]]
    within = factor.producer() if factor is not None else None
    factors = [factor] if within is None or not is_op(within, "Mul") else within.inputs
    if any(constant_behind(one) is not None for one in factors):
        return value
    use = _only_use(value)
    if use is not None and is_op(use[0], "Mul") and constant_behind(use[0].inputs[1 - use[1]]) is not None:
        return use[0].outputs[0]
    return value


def _dequantized(value: ir.Value) -> ir.Value:
    """Past the DequantizeLinear of codes that were looked up."""
    use = _only_use(value)
    if use is None or use[1] != 0 or not is_op(use[0], "DequantizeLinear", domain=ANY):
        return value
    return use[0].outputs[0]


def _with_bias(value: ir.Value, step: Operation) -> tuple[ir.Value, ir.Value | None]:
    """Past the addition of a constant vector, where that is all that ``value`` is for."""
    use = _only_use(value)
    if use is None or not is_op(use[0], "Add"):
        return value, None
    node, slot = use
    addend = node.inputs[1 - slot]
    root = constant_behind(addend)
    tensor = None if root is None else ir.convenience.get_const_tensor(root)
    if addend is None or tensor is None or tensor.size != step.d_out:
        return value, None
    shape = addend.shape if addend.shape is not None else tensor.shape if addend is root else None
    # A vector of features is a row; that of a convolution's channels has a 1 for each dimension of the picture.
    wide = [] if shape is None else [i for i, dim in enumerate(shape) if dim != 1]
    if wide and wide != [len(shape or ()) - 1 - len(step.kernel)]:
        return value, None
    return node.outputs[0], root
