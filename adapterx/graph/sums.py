"""What a graph adds to a base, as a sum: ``base * gain + shift + products``, however its nodes say it.

DoRA's ``base + ((g - 1) * (base - bias) + g * (x @ A @ B) * s)`` is one such sum, LoHa's ``base + x @ D`` another. No
name is read here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from adapterx.adapter import Array
from adapterx.graph.bases import Base
from adapterx.graph.branches import SKIP_NORMS
from adapterx.graph.folded import Folding
from adapterx.graph.operations import factor_of
from adapterx.graph.quantized_linear import any_linear
from adapterx.graph.view import MICROSOFT, SAME_ROWS, SAME_VALUE, Linear, attribute, is_op, source

# PEFT's arithmetic is a few nodes deep; a chain of residual additions runs through the whole model.
_DEPTH = 12
_ONE = np.ones((), np.float32)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """One constant matrix that something is multiplied with, or the kernel of a convolution.

    Args:
        node: the product
        weight: its operand
        read: gives ``[d_in, d_out]`` in float32; of a convolution ``[c_out, c_in / groups, *kernel]``
        dtype: of the matrix in the graph
    """

    node: ir.Node
    weight: ir.Value | None
    read: Callable[[], Array]
    dtype: ir.DataType


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """``x`` times constant matrices, with a factor (a scalar, or a vector) before, between and behind them.

    Args:
        x: what the first matrix is multiplied with, in the type that it is multiplied in
        matrices: in the order of the run, one or more
        factors: one more than ``matrices``
    """

    x: ir.Value
    matrices: tuple[Matrix, ...]
    factors: tuple[Array, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """What becomes of a base at one node.

    Args:
        base: the base operation
        join: the node where all comes together; its first output is the sum
        value: what ``join`` has of the base
        gain: what the base is multiplied with, scalar or ``[d_out]``
        shift: the constant that is added, scalar or ``[d_out]``
        chains: what is added that depends on ``x``, over the factor of the base operation
        nodes: all that lies between the base and ``join``, and what only computes constants for it
    """

    base: Base
    join: ir.Node
    value: ir.Value
    gain: Array
    shift: Array
    chains: tuple[Chain, ...]
    nodes: tuple[ir.Node, ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Term:
    factor: Array
    value: ir.Value | None


def find_sums(base: Base, folding: Folding) -> list[Sum]:
    """Every sum that ``base`` is part of, whose other parts are constant or made of what ``base`` reads; nearest first.

    The second of two adapters adds to what the first gave.
    """
    found: list[Sum] = []
    value = base.output
    while (one := _sum(base, value, folding)) is not None:
        found.append(one)
        value = one.join.outputs[0]
    return found


def _sum(base: Base, value: ir.Value, folding: Folding) -> Sum | None:
    for seen, node, slot in _joins(value):
        read = _Reader(base, value, node, folding)
        terms = read.terms(slot)
        if terms is None:
            continue
        outside = np.float32(factor_of(base.op))
        chains = [read.chain(term.value, term.factor / outside) for term in terms if term.value not in (None, value)]
        if chains and all(chain is not None for chain in chains):
            gain = sum((t.factor for t in terms if t.value is value), np.zeros((), np.float32))
            shift = sum((t.factor for t in terms if t.value is None), np.zeros((), np.float32))
            inside = between(node, {value, seen, base.x, *(c.x for c in chains if c is not None)})
            whole = tuple(chain for chain in chains if chain is not None)
            return Sum(base, node, seen, gain, shift, whole, inside)
    return None


def _joins(value: ir.Value) -> Iterator[tuple[ir.Value, ir.Node, int]]:
    """``value`` as an addition sees it, the addition, and its slot."""
    queue = [value]
    for one in queue:
        for node, slot in one.uses():
            if is_op(node, *SAME_VALUE) and slot == 0:
                queue.append(node.outputs[0])
            elif _adds(node, slot):
                yield one, node, slot


def _adds(node: ir.Node, slot: int) -> bool:
    if is_op(node, *SKIP_NORMS, domain=(MICROSOFT,)):
        return slot < 2
    return is_op(node, "Add") or (_is_gemm(node) and slot == 2 and attribute(node, "beta", 1.0) == 1.0)


def _is_gemm(node: ir.Node) -> bool:
    return is_op(node, "Gemm") or is_op(node, "FusedGemm", domain=(MICROSOFT,))


def between(join: ir.Node, ends: Collection[ir.Value]) -> tuple[ir.Node, ...]:
    """``join`` and every node above it up to ``ends``."""
    found: dict[ir.Node, None] = {}
    queue = [join]
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found[node] = None
        queue += [p for value in node.inputs if value is not None and value not in ends and (p := value.producer())]
    return tuple(found)


class _Reader:
    """Reads values that lead up to one base."""

    def __init__(self, base: Base, value: ir.Value, join: ir.Node, folding: Folding) -> None:
        self._value, self._join, self._folding = value, join, folding
        self._axes = len(base.kernel)
        self._x = source(base.x)

    def terms(self, slot: int) -> list[_Term] | None:
        """What the join adds up; ``None`` where that is too much to be an adapter."""
        join = self._join
        operands = [value for value in join.inputs[: 2 if slot < 2 else 3] if value is not None]
        if _is_gemm(join):
            return [_Term(_ONE, self._value), _Term(_ONE, join.outputs[0])]
        found: list[_Term] = []
        for operand in operands:
            if not self._add(found, operand, _ONE, 0):
                return None
        return found if sum(term.value is self._value for term in found) else None

    def _add(self, found: list[_Term], value: ir.Value, factor: Array, depth: int) -> bool:
        node = value.producer()
        if value is self._value:
            found.append(_Term(factor, value))
        elif self._folding.holds(value):
            vector = self._vector(value)
            if vector is None:
                return False
            found.append(_Term(factor * vector, None))
        elif node is None or depth > _DEPTH:
            return False
        elif is_op(node, *SAME_VALUE) and node.inputs[0] is not None:
            return self._add(found, node.inputs[0], factor, depth + 1)
        elif is_op(node, "Add", "Sub"):
            sign = np.float32(-1 if is_op(node, "Sub") else 1)
            left, right = node.inputs
            assert left is not None, "an addition has two operands"
            assert right is not None, "an addition has two operands"
            return self._add(found, left, factor, depth + 1) and self._add(found, right, factor * sign, depth + 1)
        elif (scaled := self._scaled(node)) is not None:
            return self._add(found, scaled[0], factor * scaled[1], depth + 1)
        elif is_op(node, *SAME_ROWS) and self._is_product(node.inputs[0]) and node.inputs[0] is not None:
            return self._add(found, node.inputs[0], factor, depth + 1)
        else:
            found.append(_Term(factor, value))
        return True

    def _is_product(self, value: ir.Value | None) -> bool:
        """Rows were flattened for a product, and are folded back."""
        return value is not None and self._matrix(value) is not None

    def _scaled(self, node: ir.Node) -> tuple[ir.Value, Array] | None:
        """``(operand, factor)`` where ``node`` multiplies or divides by a constant scalar or vector."""
        if not is_op(node, "Mul", "Div"):
            return None
        left, right = node.inputs
        pairs = [(left, right)] if is_op(node, "Div") else [(left, right), (right, left)]
        for value, other in pairs:
            if value is not None and other is not None and self._folding.holds(other):
                vector = self._vector(other)
                if vector is not None:
                    return value, (np.float32(1) / vector if is_op(node, "Div") else vector)
        return None

    def _vector(self, value: ir.Value) -> Array | None:
        """A scalar ``[]``, or one number per feature ``[d]``."""
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None and not self._is_vector(tuple(int(size) for size in tensor.shape.numpy())):
            return None
        array = self._folding.array(value)
        if array.size == 1:
            return array.reshape(()).astype(np.float32)
        return array.reshape(-1) if self._is_vector(array.shape) else None

    def _is_vector(self, shape: tuple[int, ...]) -> bool:
        """Features come last; channels come before the axes of the picture."""
        size = math.prod(shape)
        return size == 1 or (len(shape) > self._axes and shape[len(shape) - 1 - self._axes] == size)

    def chain(self, value: ir.Value | None, factor: Array) -> Chain | None:
        """``value`` as a :class:`Chain` from what the base reads, ``factor`` behind it."""
        matrices: list[Matrix] = []
        factors = [factor]
        while value is not None:
            if matrices and source(value) is self._x:
                return Chain(value, tuple(reversed(matrices)), tuple(reversed(factors)))
            node, found = value.producer(), self._matrix(value)
            if node is None or len(matrices) > _DEPTH:
                return None
            if found is not None:
                matrix, value = found
                matrices.append(matrix)
                factors.append(_ONE)
            elif is_op(node, *SAME_VALUE, *SAME_ROWS):
                value = node.inputs[0]
            elif (scaled := self._scaled(node)) is not None:
                value, factors[-1] = scaled[0], factors[-1] * scaled[1]
            else:
                return None
        return None

    def _matrix(self, value: ir.Value) -> tuple[Matrix, ir.Value] | None:
        """The matrix that ``value`` is a product with, and the other operand."""
        if self._axes:
            return self._kernel(value)
        for one in _product_nodes(value):
            found = any_linear(one)
            if (
                found is not None
                and found.output is value
                and self._adds_the_base(found.addend)
                and self._is_linear(one)
            ):
                return Matrix(one, one.inputs[1], functools.partial(_stored, found), found.weight.dtype), found.x
        node = value.producer()
        if node is None or not is_op(node, "MatMul", "Gemm") or attribute(node, "transA", 0):
            return None
        x, weight, *rest = node.inputs
        if x is None or self._folding.holds(x) or weight is None or not self._folding.holds(weight):
            return None
        array = functools.partial(self._computed, node, weight)
        matrix = Matrix(node, weight, array, self._folding.dtype(weight))
        return (matrix, x) if self._adds_the_base(*rest) else None

    def _kernel(self, value: ir.Value) -> tuple[Matrix, ir.Value] | None:
        node = value.producer()
        if node is None or not is_op(node, "Conv") or any(node.inputs[2:]):
            return None
        x, weight = node.inputs[:2]
        if x is None or weight is None or not self._folding.holds(weight) or self._folding.holds(x):
            return None
        return Matrix(node, weight, functools.partial(self._folding.array, weight), self._folding.dtype(weight)), x

    def _is_linear(self, node: ir.Node) -> bool:
        """Nothing is on top of the product, but where all comes together: what is there comes after it."""
        return node is self._join or "activation" not in node.attributes

    def _computed(self, node: ir.Node, weight: ir.Value) -> Array:
        array = self._folding.array(weight)
        return (array.T if attribute(node, "transB", 0) else array) * np.float32(attribute(node, "alpha", 1.0))

    def _adds_the_base(self, addend: ir.Value | None = None) -> bool:
        """A Gemm adds nothing, or what the optimizer made part of it: the base."""
        while addend is not None and is_op(node := addend.producer(), *SAME_VALUE) and addend is not self._value:
            addend = None if node is None else node.inputs[0]
        return addend is None or addend is self._value


def _stored(found: Linear) -> Array:
    return found.matrix().astype(np.float32) * np.float32(found.factor)


def _product_nodes(value: ir.Value) -> Sequence[ir.Node]:
    """The node that can be the product which ends in ``value``: itself, or where codes are dequantized, one above."""
    found = []
    above: ir.Value | None = value
    for _ in range(3):
        node = None if above is None else above.producer()
        if node is None:
            break
        found.append(node)
        above = next((v for v in node.inputs if v is not None and v.producer() is not None), None)
    return found
