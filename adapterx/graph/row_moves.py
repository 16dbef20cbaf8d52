"""What operators that move entries (Reshape, Transpose, Gather ...) do to the rows of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from adapterx.graph.facts import Dims, Fact, Rows, Step
from adapterx.graph.row_rules import Rule, broadcast, met
from adapterx.graph.sizes import ONE, Size, product

_COPY, _REST = Size(0), Size(-1)
_PICKS = "picks entries along the axis of the batch"


def _shape(step: Step) -> Fact:
    rank = step.first.rank
    return Fact(None if rank is None else (Size(rank),))


def _filled(step: Step) -> Fact:
    return Fact(step.first.numbers, lost=step.cause)


def _range(step: Step) -> Fact:
    parts = [fact.numbers[0] if fact is not None and fact.numbers else None for fact in step.operands]
    start, limit, delta = (*parts, None, None, None)[:3]
    simple = start == Size(0) and delta == ONE
    return Fact((limit if simple else None,), lost=step.cause, counts=0 if simple and limit == step.rows else None)


def _reshaped(step: Step) -> Fact:
    """Entries keep their order, so it is enough to find the axis that the boundaries of a row fall into."""
    x, target = step.first, _target(step)
    if x.is_shared:
        counts = 0 if x.counts == 0 and x.rank == 1 and target and target[0] == step.rows else None
        return Fact(target, counts=counts, stride=x.stride)
    if x.rows is None:
        return Fact(target, lost=x.lost)
    if x.dims is None or target is None:
        return step.lost("reshapes to dimensions that are not known")
    rows = rows_within(x.rows, x.dims, target, step.rows)
    if rows is None:
        written = ", ".join("?" if size is None else str(size) for size in target)
        return dataclasses.replace(step.lost(f"reshapes to [{written}]: no axis of it counts rows"), dims=target)
    return Fact(target, rows)


def rows_within(rows: Rows, dims: Dims, target: Dims, count: Size) -> Rows | None:
    """Where rows lie after a reshape, or ``None`` if no axis of ``target`` has whole rows.

    Args:
        rows: where they lie before
        dims: before
        target: after
        count: rows of the batch
    """
    outer = [dim for dim in dims[: rows.axis] if dim is not None]
    if len(outer) < rows.axis:
        return None
    outside = product(outer) * rows.before
    for axis, size in enumerate(target):
        if size is None:
            return None
        left = outside.over(size)
        if left is not None and not count == size == outside == ONE:
            outside = left
            continue
        whole = outside * count
        after = size.over(whole)
        return None if after is None else Rows(axis, outside, after)
    return None


def _target(step: Step) -> Dims | None:
    x, said = step.first, step.said(0)
    if step.node.op_type == "Flatten":
        if x.dims is None:
            return said
        axis = step.number("axis", 1)
        halves = x.dims[:axis], x.dims[axis:]
        return tuple(None if None in half else product([d for d in half if d is not None]) for half in halves)
    wanted = step.operand(1)
    numbers = None if wanted is None else wanted.numbers
    if "shape" in step.node.attributes:
        numbers = tuple(Size(number) for number in step.node.attributes["shape"].as_ints())
    if numbers is None:
        return said
    copies = not step.number("allowzero", 0)
    sizes = list(numbers)
    for axis, size in enumerate(sizes):
        if size == _COPY and copies:
            sizes[axis] = x.dims[axis] if x.dims is not None and axis < len(x.dims) else None
    if said is not None and len(said) == len(sizes):
        sizes = [there if size is None else size for size, there in zip(sizes, said, strict=True)]
    return _with_rest(sizes, x.dims, said)


def _with_rest(sizes: list[Size | None], dims: Dims | None, said: Dims | None) -> Dims:
    """What -1 stands for."""
    if _REST not in sizes:
        return tuple(sizes)
    at = sizes.index(_REST)
    others = [size for axis, size in enumerate(sizes) if axis != at]
    rest = None
    if dims is not None and None not in dims and None not in others:
        total = product([dim for dim in dims if dim is not None])
        rest = total.over(product([size for size in others if size is not None]))
    if rest is None and said is not None and len(said) == len(sizes):
        rest = said[at]
    sizes[at] = rest
    return tuple(sizes)


def _squeezed(step: Step) -> Fact:
    x, axes = step.first, step.ints("axes", 1)
    if x.rank is None or (axes is None and step.has("axes", 1)):
        return Fact(lost=step.cause) if x.rows is None else step.lost("squeezes axes that are not known")
    assert x.dims is not None, "its rank is known"
    if axes is None:
        if x.rows is not None and any(dim is None or not dim.is_number for dim in x.dims):
            return step.lost("squeezes every axis of one entry, perhaps that of the batch")
        axes = [axis for axis, dim in enumerate(x.dims) if dim == ONE]
    at = {axis % len(x.dims) for axis in axes}
    if x.rows is not None and x.rows.axis in at:
        return step.lost("squeezes the axis of the batch")
    dims = tuple(dim for axis, dim in enumerate(x.dims) if axis not in at)
    rows = None if x.rows is None else x.rows.at(x.rows.axis - sum(axis < x.rows.axis for axis in at))
    return met(step, [rows], dims)


def _unsqueezed(step: Step) -> Fact:
    x, axes = step.first, step.ints("axes", 1)
    if x.rank is None or axes is None:
        return Fact(lost=step.cause) if x.rows is None else step.lost("adds axes that are not known")
    assert x.dims is not None, "its rank is known"
    rank = len(x.dims) + len(axes)
    at = {axis % rank for axis in axes}
    kept = [axis for axis in range(rank) if axis not in at]
    dims: list[Size | None] = [ONE] * rank
    for axis, dim in zip(kept, x.dims, strict=True):
        dims[axis] = dim
    fact = met(step, [None if x.rows is None else x.rows.at(kept[x.rows.axis])], tuple(dims))
    return dataclasses.replace(fact, counts=None if x.counts is None else kept[x.counts], stride=x.stride)


def _transposed(step: Step) -> Fact:
    x, perm = step.first, step.ints("perm", len(step.operands))
    if perm is None and x.rank is not None:
        perm = list(range(x.rank))[::-1]
    if perm is None or (x.rank is not None and len(perm) != x.rank):
        return Fact(lost=step.cause) if x.rows is None else step.lost("turns an operand of unknown dimensions")
    rows = None if x.rows is None else x.rows.at(perm.index(x.rows.axis))
    return met(step, [rows], None if x.dims is None else tuple(x.dims[axis] for axis in perm))


def _expanded(step: Step) -> Fact:
    x, wanted, said = step.first, step.operand(1), step.said(0)
    dims = broadcast([x.dims, wanted.numbers]) if wanted is not None and wanted.numbers is not None else said
    if dims is None and x.rank is not None and wanted is not None and wanted.dims and wanted.dims[0] is not None:
        dims = (None,) * max(x.rank, wanted.dims[0].number) if wanted.dims[0].is_number else None
    if dims is None or x.rank is None:
        return Fact(dims, lost=step.cause) if x.rows is None else step.lost("expands to dimensions that are not known")
    shift = len(dims) - x.rank
    fact = met(step, [None if x.rows is None else x.rows.at(x.rows.axis + shift)], dims)
    return dataclasses.replace(fact, counts=None if x.counts is None else x.counts + shift, stride=x.stride)


def _tiled(step: Step) -> Fact:
    x, repeats = step.first, step.operand(1)
    times = None if repeats is None else repeats.numbers
    if times is None or x.dims is None or len(times) != len(x.dims):
        return Fact(lost=step.cause) if x.rows is None else step.lost("repeats an axis that is not known")
    dims = tuple(
        None if dim is None or often is None else dim * often for dim, often in zip(x.dims, times, strict=True)
    )
    if x.rows is None:
        return Fact(dims, lost=step.cause)
    often = times[x.rows.axis]
    if often is None:
        return step.lost("repeats the axis of the batch")
    return Fact(dims, dataclasses.replace(x.rows, before=x.rows.before * often))


def _gathered(step: Step) -> Fact:
    """``data`` along one axis, in the shape of the indices: rows of one of the two."""
    data, picks = step.first, step.operand(1) or Fact()
    if data.rank is None or picks.rank is None:
        return Fact(lost=step.cause) if step.is_shared else step.lost("has an operand of unknown dimensions")
    assert data.dims is not None and picks.dims is not None, "both ranks are known"  # noqa: PT018
    axis = step.number("axis", 0) % max(1, data.rank)
    dims = (*data.dims[:axis], *picks.dims, *data.dims[axis + 1 :])
    found = []
    if data.rows is not None:
        if data.rows.axis == axis:
            return _picked(step, data.rows, picks, dims)
        found.append(data.rows.at(data.rows.axis + (picks.rank - 1 if data.rows.axis > axis else 0)))
    if picks.rows is not None:
        found.append(picks.rows.at(picks.rows.axis + axis))
    return met(step, found, dims)


def _picked(step: Step, rows: Rows, picks: Fact, dims: Dims) -> Fact:
    """Entries along the axis of the batch: of their own row each, where the indices count the rows."""
    if picks.counts is None or picks.stride != rows.after or rows.before != ONE:
        return step.lost(_PICKS)
    return Fact(dims, Rows(rows.axis + picks.counts))


def _elements(step: Step) -> Fact:
    """GatherElements: both operands have the same axes."""
    data, picks = step.first, step.operand(1) or Fact()
    found = [fact.rows for fact in (data, picks) if fact.rows is not None]
    axis = step.number("axis", 0)
    if found and axis < 0:
        if picks.rank is None:
            return step.lost("has an operand of unknown dimensions")
        axis += picks.rank
    if data.rows is not None and data.rows.axis == axis:
        return step.lost(_PICKS)
    return met(step, found, picks.dims)


def _gathered_nd(step: Step) -> Fact:
    """``data[i, j ...]``; the rows are those of ``data`` only where ``i`` counts them."""
    data, picks = step.first, step.operand(1) or Fact()
    if step.number("batch_dims", 0):
        found = [fact.rows for fact in (data, picks) if fact.rows is not None]
        if any(rows.axis >= step.number("batch_dims", 0) for rows in found):
            return step.lost(_PICKS)
        return met(step, found, None)
    last = None if picks.rank is None else picks.rank - 1
    if data.rows is None:
        rows = picks.rows
        fits = data.is_shared and rows is not None and rows.axis != last
        return Fact(rows=rows) if fits else Fact(lost=step.cause) if step.is_shared else step.lost(_PICKS)
    if data.rows.axis or picks.counts == last or picks.stride != ONE or not data.rows.is_exact:
        return step.lost(_PICKS)
    return step.lost(_PICKS) if picks.counts is None else Fact(rows=Rows(picks.counts))


def _scattered(step: Step) -> Fact:
    """Entries of the first operand are overwritten; where they lie stays."""
    data = step.first
    if data.rows is None and not data.lost and not step.is_shared:
        return step.lost("writes rows of the batch to places that are computed")
    return met(step, [data.rows], data.dims)


def _summed(step: Step) -> Fact:
    """Einsum: the letter of the batch has to be the same in all operands, and in the result."""
    equation = step.node.attributes["equation"].as_string().replace(" ", "")
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    if "..." in equation or "->" not in equation or len(terms) != len(step.operands):
        return Fact(lost=step.cause) if step.is_shared else step.lost("is not read further")
    sizes: dict[str, Size | None] = {}
    found = []
    for fact, letters in zip(step.operands, terms, strict=True):
        if fact is not None and fact.dims is not None and len(fact.dims) == len(letters):
            sizes |= dict(zip(letters, fact.dims, strict=True))
        if fact is not None and fact.rows is not None:
            letter = letters[fact.rows.axis]
            if letter not in output:
                return step.lost("sums over the rows of the batch")
            found.append(fact.rows.at(output.index(letter)))
    return met(step, found, tuple(sizes.get(letter) for letter in output))


def _one_hot(step: Step) -> Fact:
    x, axis = step.first, step.number("axis", -1)
    rank = None if x.rank is None else x.rank + 1
    if x.rows is None or rank is None:
        return Fact(lost=step.cause) if x.rows is None else step.lost("has an operand of unknown dimensions")
    return met(step, [x.rows.at(x.rows.axis + (axis % rank <= x.rows.axis))], None)


def _recurrent(step: Step) -> list[Fact]:
    """LSTM and its kin: ``[t, n, d]`` in, ``[t, directions, n, d]`` and ``[directions, n, d]`` out."""
    rows = step.first.rows
    if rows is not None and (rows.axis != 1 or step.number("layout", 0)):
        return [step.lost("wants the batch as its second axis")] * len(step.node.outputs)
    places = [None if rows is None else rows.at(axis) for axis in (2, 1, 1)]
    return [met(step, [place], None) for place in places[: len(step.node.outputs)]]


MOVES: Mapping[str, Rule] = {
    **dict.fromkeys(("Reshape", "Flatten"), _reshaped),
    **dict.fromkeys(("Gather", "GatherBlockQuantized"), _gathered),
    **dict.fromkeys(("ScatterND", "ScatterElements", "Scatter", "TensorScatter"), _scattered),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
    "Shape": _shape,
    "Size": lambda _: Fact(()),
    "ConstantOfShape": _filled,
    "Range": _range,
    "Squeeze": _squeezed,
    "Unsqueeze": _unsqueezed,
    "Transpose": _transposed,
    "Expand": _expanded,
    "Tile": _tiled,
    "GatherElements": _elements,
    "GatherND": _gathered_nd,
    "Einsum": _summed,
    "OneHot": _one_hot,
}
