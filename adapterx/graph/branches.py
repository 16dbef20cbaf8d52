"""Find low-rank branches by dataflow: ``x -> A -> B (-> scale) -> joined to what the base makes of x``.

Structure alone does not make an adapter (a base model may have a bottleneck of its own): whether a branch is
one is decided in :mod:`adapterx.graph.sites`, by evidence.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator

import onnx_ir as ir

from adapterx.graph.operations import factor_of, rearranged
from adapterx.graph.quantized_linear import any_linear
from adapterx.graph.view import (
    MICROSOFT,
    QUANTIZERS,
    SAME_ROWS,
    SAME_VALUE,
    STANDARD,
    Linear,
    all_nodes,
    is_fixed,
    is_op,
    is_static_quantizer,
    scaled,
    source,
    times,
)

SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_BASE_SEARCH = 64


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One low-rank branch and the place where it meets the base.

    Args:
        a: the factor that reads what the base operation reads
        b: the factor that reads ``a``
        scale: product of all constant factors from ``a`` to the join, whatever operator holds them, over that of the
            base operation
        join: the node where delta and base are added
        base_slot: which input of ``join`` is the base; that of a Gemm which adds the delta as its ``C`` is its ``x``
        delta_slot: which input of ``join`` is the delta; ``None`` when ``join`` is ``b.node`` itself (a Gemm whose
            ``C`` is the base)
        delta: the value that is added, after the scale
        base_op: the operation that the branch runs beside; ``None`` when nothing that feeds the base reads ``x``
        refolded: rows were flattened above ``a`` and folded back before the join
        bias: a constant vector added to the delta (PEFT's ``lora_bias``), or ``None``
        calibrated: what the factors make is put on a grid that was chosen before the run, by the exported adapter's
            numbers (static quantization)
        bias_scale: what ``bias`` is multiplied with before the join
    """

    a: Linear
    b: Linear
    scale: float
    join: ir.Node
    base_slot: int
    delta_slot: int | None
    delta: ir.Value | None
    base_op: ir.Node | None
    refolded: bool
    bias: ir.Value | None
    calibrated: bool = False
    bias_scale: float = 1.0

    @property
    def x(self) -> ir.Value:
        """What to feed the branch from: above a Dropout of training, and above a flattening that is undone later.

        Floats: above the dynamic quantization of what the base reads too, but not above a static one, whose numbers
        are floats again.
        """
        # Read off the node: rewiring the branch above has put another value in the place of ``a.x``.
        x = self.a.node.inputs[0]
        assert x is not None, "a linear node has its operand"
        return _above(x, "Dropout", "Identity", "DynamicQuantizeLinear", *(SAME_ROWS if self.refolded else ()))

    @property
    def base(self) -> ir.Value:
        """What the base contributes to the join."""
        value = self.join.inputs[self.base_slot]
        assert value is not None, "a join has its base operand"
        return value

    @property
    def place(self) -> str:
        """The join in words, for messages."""
        name = self.join.name
        return f"node {name!r}" if name else f"the node that makes {self.join.outputs[0].name!r}"

    @property
    def rank(self) -> int:
        """``r`` in this graph."""
        return self.a.d_out


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Join:
    node: ir.Node
    base_slot: int
    delta_slot: int | None
    delta: ir.Value | None
    factor: float
    reshaped: bool
    bias: ir.Value | None
    bias_scale: float = 1.0


def find_branches(model: ir.Model) -> list[Branch]:
    """Every low-rank branch of ``model``, subgraphs included, in graph order. Nothing is changed."""
    linears = [matched for node in all_nodes(model) if (matched := any_linear(node)) is not None]
    by_output = {one.output: one for one in linears}
    factors = [(*pair, b) for b in linears if (pair := _factor_before(b, by_output)) is not None]
    heads = {a.node for a, _, _ in factors}
    found = (branch_between(a, b, inner=inner, heads=heads) for a, inner, b in factors)
    return [branch for branch in found if branch is not None]


def branch_between(a: Linear, b: Linear, *, inner: float, heads: set[ir.Node]) -> Branch | None:
    """The branch of two factors, ``None`` when it is not added to anything that depends on the run.

    Args:
        a: the first factor
        b: the second, which reads it
        inner: the factor between them
        heads: first factors of all branches, none of which is a base
    """
    join = _descend(b)
    if join is None:
        return None
    base_op = _base_operation(join, source(a.x), heads)
    # What the base multiplies with besides its weight was done to what both read.
    scale = a.factor * inner * b.factor * join.factor / factor_of(base_op)
    calibrated = _calibrated(b.x, a.output) or (join.delta is not None and _calibrated(join.delta, b.output))
    where = (join.node, join.base_slot, join.delta_slot, join.delta)
    return Branch(a, b, scale, *where, base_op, join.reshaped, join.bias, calibrated, join.bias_scale)


def _calibrated(value: ir.Value, top: ir.Value) -> bool:
    """Whether a static quantizer lies on the way from ``value`` up to ``top``."""
    while value is not top:
        node = value.producer()
        assert node is not None, "the way was gone before"
        if is_static_quantizer(node):
            return True
        value = next(operand for operand in node.inputs if operand is not None and not is_fixed(operand))
    return False


def _factor_before(b: Linear, by_output: dict[ir.Value, Linear]) -> tuple[Linear, float] | None:
    """The linear that feeds ``b`` and the factor between them, when their ranks agree."""
    value, factor = scaled(b.x)
    a = by_output.get(value)
    if a is None or a.addend is not None or a.d_out != b.d_in:
        return None
    return a, factor


def _descend(b: Linear) -> _Join | None:
    """From ``b`` down to where its result is added to something that depends on the run."""
    bias, factor, reshaped = None, 1.0, False
    before = 1.0  # the factor above the bias
    if b.addend is not None:
        if not is_fixed(b.addend):
            # Gemm(low, B, C=base): the optimizer made the addition part of B. A scaled base is not ours to take.
            return _Join(b.node, 2, None, None, 1.0, False, None) if b.addend_factor == 1.0 else None
        bias, before = b.addend, 1.0 / b.addend_factor
    value = b.output
    while True:
        uses = value.uses()
        if len(uses) != 1 or value.is_graph_output():
            return None
        node, slot = next(iter(uses))
        if is_op(node, *SAME_VALUE, *SAME_ROWS) and slot == 0:
            reshaped = reshaped or is_op(node, *SAME_ROWS)
        elif is_static_quantizer(node) and slot == 0:
            pass
        elif (step := times(node)) is not None:
            factor *= step[1]
        elif is_op(node, "Add") and is_fixed(node.inputs[1 - slot]):
            bias, before = node.inputs[1 - slot], factor
        else:
            join = _join_at(node, slot, value, factor=factor, reshaped=reshaped, bias=bias)
            return None if join is None else dataclasses.replace(join, bias_scale=join.factor / before)
        value = node.outputs[0]


def _join_at(
    node: ir.Node, slot: int, delta: ir.Value, *, factor: float, reshaped: bool, bias: ir.Value | None
) -> _Join | None:
    if is_op(node, "Add"):
        return _Join(node, 1 - slot, slot, delta, factor, reshaped, bias)
    if is_op(node, *SKIP_NORMS, domain=(MICROSOFT,)) and slot in {0, 1}:
        return _Join(node, 1 - slot, slot, delta, factor, reshaped, bias)
    host = any_linear(node) if is_op(node, "Gemm", "FusedGemm", domain=(*STANDARD, MICROSOFT)) else None
    if host is not None and slot == 2:
        # C of a Gemm: base and addition are one node; the base operand is the product itself (no slot of its own).
        return _Join(node, 0, 2, delta, factor * host.addend_factor, reshaped, bias)
    return None


def _above(value: ir.Value, *op_types: str) -> ir.Value:
    anywhere = (*STANDARD, MICROSOFT)
    while (
        is_op(node := value.producer(), *op_types, domain=anywhere) and node is not None and node.inputs[0] is not None
    ):
        value = node.inputs[0]
    return value


def _base_operation(join: _Join, x: ir.Value, heads: set[ir.Node]) -> ir.Node | None:
    """The nearest operation above the join's base that reads ``x`` and is not the first factor of a branch."""
    if join.delta_slot == 2:
        host = any_linear(join.node)
        return join.node if host is not None and source(host.x) is x else None
    base = join.node.inputs[join.base_slot]
    queue = deque(_producers(base) if base is not None else ())
    seen: set[ir.Node] = set()
    while queue and len(seen) < _BASE_SEARCH:
        node = queue.popleft()
        if node in seen or node in heads:
            continue
        seen.add(node)
        operands = [value for value in node.inputs if value is not None]
        if _computes(node) and any(source(rearranged(value)[0]) is x for value in operands):
            return node
        for value in operands:
            queue.extend(_producers(value))
    return None


def _producers(value: ir.Value) -> Iterator[ir.Node]:
    node = value.producer()
    if node is not None:
        yield node


def _computes(node: ir.Node) -> bool:
    """Whether a node has weights or works on two operands, and so can be what an adapter sits beside."""
    if is_op(node, *QUANTIZERS, domain=(*STANDARD, MICROSOFT)):
        return False
    if is_op(node, "Gather") and rearranged(node.outputs[0])[1]:
        return False
    return not is_op(node, *SAME_VALUE, *SAME_ROWS, "Transpose", "Add", "Mul", "Div", "Shape")
