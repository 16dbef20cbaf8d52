"""Which of a model's inputs bring the rows of a batch, and along which axis. Nothing in a graph says so: names do."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable

import onnx_ir as ir

from adapterx.graph.facts import Fact, Rows
from adapterx.graph.sizes import ROWS, Size, stated, unknown

_PLAIN = re.compile(r"\w+")
_MADE_UP = re.compile(r"_dynamic_axes_\d+$")
_MATRIX = 2


@dataclasses.dataclass(frozen=True, slots=True)
class BatchInputs:
    """What the inputs of a model say of its batch.

    Args:
        rows: how many rows there are: :data:`ROWS`, or a number where the model fixes it
        names: what the names of dimensions stand for, where they stand for the batch
        facts: of every input
    """

    rows: Size
    names: dict[str, Size]
    facts: dict[ir.Value, Fact]


def batch_inputs(inputs: Iterable[ir.Value]) -> BatchInputs:
    """Read the batch off the inputs of a graph.

    The batch is what dimensions are called that have "batch" in their name, else the most common first dimension. An
    input whose first dimension is another is one that all rows share (positions, a single picture size), or brings
    things of its own, of which nothing tells the rows (patches of all pictures, one after another).

    Args:
        inputs: those that must be fed
    """
    shapes = {value: value.shape for value in inputs}
    firsts = [(shape[0], len(shape)) for shape in shapes.values() if shape is not None and len(shape)]
    names = _names([shape for shape in shapes.values() if shape is not None])
    unnamed = any(_is_unnamed(dim) for dim, _ in firsts) or any(shape is None for shape in shapes.values())
    rows = ROWS if names or unnamed or not firsts else Size(_fixed(firsts))
    known = dict.fromkeys(names, ROWS)
    others = {
        str(dim.value)
        for shape in shapes.values()
        for dim in (() if shape is None else shape[1:])
        if isinstance(dim, ir.SymbolicDim)
    }
    facts = {value: _fact(value, shape, rows, known, shared=others) for value, shape in shapes.items()}
    return BatchInputs(rows, known, facts)


def _is_unnamed(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, ir.SymbolicDim) and (dim.value is None or _MADE_UP.search(dim.value) is not None)


def _named(dim: int | ir.SymbolicDim) -> str:
    return "" if isinstance(dim, int) or _is_unnamed(dim) else str(dim.value)


def _names(shapes: list[ir.Shape]) -> set[str]:
    first = [_named(shape[0]) for shape in shapes if len(shape)]
    everywhere = [_named(dim) for shape in shapes for dim in shape]
    said = {name for name in first or everywhere if _says_batch(name)} or {n for n in everywhere if _says_batch(n)}
    if said:
        return said
    later = {_named(dim) for shape in shapes for dim in shape[1:]}
    whole = [_named(shape[0]) for shape in shapes if len(shape) >= _MATRIX] or first
    counted = Counter(name for name in whole if name and name not in later) or Counter(name for name in whole if name)
    return {name for name, _ in counted.most_common(1)}


def _says_batch(name: str) -> bool:
    return "batch" in name.lower() and _PLAIN.fullmatch(name) is not None


def _fixed(firsts: list[tuple[int | ir.SymbolicDim, int]]) -> int:
    """The most common first dimension of a model without an open one."""
    sizes = [dim for dim, rank in firsts if rank >= _MATRIX] or [dim for dim, _ in firsts]
    return Counter(dim for dim in sizes if isinstance(dim, int)).most_common(1)[0][0]


def _fact(value: ir.Value, shape: ir.Shape | None, rows: Size, names: dict[str, Size], *, shared: set[str]) -> Fact:
    if shape is None:
        return Fact(rows=Rows())
    sizes = [stated(dim, names) for dim in shape]
    if sizes and _is_unnamed(shape[0]) and (len(sizes) >= _MATRIX or not names):
        sizes[0] = ROWS
    dims = tuple(unknown(value.name, i) if size is None else size for i, size in enumerate(sizes))
    if rows.is_number:
        return Fact(dims, Rows() if dims and dims[0] == rows else None)
    for axis, size in enumerate(dims):
        after = size.over(rows)
        if after is not None:
            return Fact(dims, Rows(axis, after=after))
    if len(dims) < _MATRIX or dims[0].is_number or str(dims[0]) in shared:
        return Fact(dims)
    return Fact(dims, lost=f"input {value.name!r} has a first dimension of its own, {dims[0]}")
