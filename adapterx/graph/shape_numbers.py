"""The numbers that a graph computes shapes with: what Shape, Gather, Concat and arithmetic between them make."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from adapterx.graph.facts import Dims, Step
from adapterx.graph.sizes import ONE, Size, named, product

_MOST = 64
_MATRIX = 2
_END = 2**31 - 1

Numbers = Dims | None


def numbers_of(step: Step) -> Numbers:
    """The elements of a node's first output, if it is small, as far as they are known.

    A matrix (of the two ends of each axis, say) is followed through what keeps it one, row after row.
    """
    flat = all(one is None or one.numbers is None or (one.rank or 0) < _MATRIX for one in step.operands)
    rule = (_RULES if flat else _MATRIX_RULES).get(step.node.op_type)
    return None if rule is None else rule(step)


def is_from_start(step: Step, axis: int, rank: int) -> bool | None:
    """Whether a Slice takes everything along ``axis``; ``None`` if that is not known."""
    starts, ends, axes, steps = _slice(step)
    if axes is None or starts is None or ends is None or steps is None:
        return None
    at = [a % rank for a in axes]
    if axis not in at:
        return True
    place = at.index(axis)
    start, end = starts[place], ends[place]
    dim = None if step.first.dims is None else step.first.dims[axis]
    whole = end is not None and ((end.is_number and end.number >= _END) or end == dim)
    return whole and start == Size(0) and steps[place] == 1


def _slice(step: Step) -> tuple[Dims | None, Dims | None, list[int] | None, list[int] | None]:
    def given(name: str, index: int) -> Dims | None:
        if name in step.node.attributes:
            return tuple(Size(number) for number in step.node.attributes[name].as_ints())
        operand = step.operand(index)
        return None if operand is None else operand.numbers

    starts, ends = given("starts", 1), given("ends", 2)
    count = len(starts) if starts is not None else 0
    axes = step.ints("axes", 3) if step.has("axes", 3) else list(range(count))
    steps = step.ints("steps", 4) if step.has("steps", 4) else [1] * count
    return starts, ends, axes, steps


def _first(step: Step) -> Numbers:
    return step.first.numbers


def _shape(step: Step) -> Numbers:
    dims = step.first.dims
    end = step.node.attributes.get("end")
    return None if dims is None else dims[step.number("start", 0) : None if end is None else int(end.as_int())]


def _size(step: Step) -> Numbers:
    return _whole(step.first.dims)


def _whole(sizes: Dims | None) -> Numbers:
    if sizes is None or None in sizes:
        return None
    return (product([size for size in sizes if size is not None]),)


def _gather(step: Step) -> Numbers:
    numbers, picks = step.first.numbers, step.ints("", 1)
    if numbers is None or picks is None or any(not -len(numbers) <= pick < len(numbers) for pick in picks):
        return None
    return tuple(numbers[pick] for pick in picks)


def _sliced(step: Step) -> Numbers:
    numbers = step.first.numbers
    starts, ends, axes, steps = _slice(step)
    if numbers is None or starts is None or ends is None or steps is None or axes != [0]:
        return None
    start, end = starts[0], ends[0]
    if start is None or end is None or not (start.is_number and end.is_number):
        return None
    rows = _lines(numbers, step)[start.number : end.number : steps[0]]
    return tuple(number for row in rows for number in row)


def _lines(numbers: Dims, step: Step) -> list[Dims]:
    """The rows of a matrix, or the elements of a vector, each a row of its own."""
    last = step.first.dims[-1] if step.first.rank == _MATRIX and step.first.dims else None
    width = 1 if last is None else last.number
    return [numbers[i : i + width] for i in range(0, len(numbers), width)] if width else []


def _turned(step: Step) -> Numbers:
    numbers, perm = step.first.numbers, step.ints("perm", len(step.operands))
    if numbers is None or perm not in (None, [1, 0]):
        return None
    return tuple(number for column in zip(*_lines(numbers, step), strict=True) for number in column)


def _concat(step: Step) -> Numbers:
    joined: list[Size | None] = []
    for operand in step.operands:
        if operand is None or operand.numbers is None:
            return None
        joined += operand.numbers
    return tuple(joined) if len(joined) <= _MOST else None


def _pairwise(compute: Callable[[Size, Size], Size | None]) -> Callable[[Step], Numbers]:
    def rule(step: Step) -> Numbers:
        left, right = step.first.numbers, (step.operand(1) or step.first).numbers
        if left is None or right is None or (len(left) != len(right) and 1 not in {len(left), len(right)}):
            return None
        count = max(len(left), len(right)) if left and right else 0
        pairs = zip(left * count if len(left) == 1 else left, right * count if len(right) == 1 else right, strict=True)
        return tuple(None if a is None or b is None else compute(a, b) for a, b in pairs)

    return rule


def _quotient(a: Size, b: Size) -> Size | None:
    exact = a.over(b)
    return exact if exact is not None or b.number == 0 else named(f"({a}//{b})")


def _remainder(a: Size, b: Size) -> Size | None:
    return Size(a.number % b.number) if a.is_number and b.is_number and b.number else None


def _equal(a: Size, b: Size) -> Size | None:
    if a == b:
        return ONE
    # No dimension is negative.
    differ = (a.is_number and b.is_number) or (a.is_number and a.number < 0) or (b.is_number and b.number < 0)
    return Size(0) if differ else None


def _where(step: Step) -> Numbers:
    parts = [operand.numbers for operand in step.operands if operand is not None and operand.numbers is not None]
    if len(parts) != len(("condition", "then", "otherwise")):
        return None
    count = max(map(len, parts))
    if any(len(part) not in {1, count} for part in parts):
        return None
    condition, then, otherwise = (part * count if len(part) == 1 else part for part in parts)
    triples = zip(condition, then, otherwise, strict=True)
    return tuple((b if c == Size(0) else a if c == ONE or a == b else None) for c, a, b in triples)


def _filled(step: Step) -> Numbers:
    count = step.ints("", 0)
    value = step.node.attributes.get("value")
    if count is None or len(count) > 1 or (count and not 0 <= count[0] <= _MOST):
        return None
    number = 0 if value is None else value.as_tensor().numpy().reshape(-1)[0]
    return (Size(int(number)),) * (count[0] if count else 1) if number == int(number) else None


def _expanded(step: Step) -> Numbers:
    numbers, count = step.first.numbers, step.ints("", 1)
    if numbers is None or count is None or len(count) > 1:
        return None
    return numbers * max(1, count[0]) if len(numbers) == 1 and count and count[0] <= _MOST else numbers


def _range(step: Step) -> Numbers:
    bounds = [step.ints("", index) for index in range(3)]
    start, limit, delta = (bound[0] if bound else None for bound in bounds)
    if start is None or limit is None or not delta or abs(limit - start) > _MOST * abs(delta):
        return None
    return tuple(Size(number) for number in range(start, limit, delta))


_RULES: Mapping[str, Callable[[Step], Numbers]] = {
    **dict.fromkeys(("Identity", "Cast", "CastLike", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Dropout"), _first),
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _sliced,
    "Concat": _concat,
    "Mul": _pairwise(lambda a, b: a * b),
    "Add": _pairwise(lambda a, b: a + b),
    "Sub": _pairwise(lambda a, b: a - b),
    "Div": _pairwise(_quotient),
    "Mod": _pairwise(_remainder),
    "Equal": _pairwise(_equal),
    "Where": _where,
    "ReduceProd": lambda step: _whole(step.first.numbers),
    "ConstantOfShape": _filled,
    "Expand": _expanded,
    "Range": _range,
}
_MATRIX_RULES: Mapping[str, Callable[[Step], Numbers]] = {
    **dict.fromkeys(("Identity", "Cast", "CastLike", "Reshape", "Flatten"), _first),
    "Slice": _sliced,
    "Transpose": _turned,
}
