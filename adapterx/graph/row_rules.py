"""What each operator does to the rows of a batch: for every rule, facts in and facts out.

Two operands that meet element by element are taken to be of the same rows: a model that is fed batches computes each
row by itself. So one operand whose rows are known tells where they are in the result, whatever became of the other's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from adapterx.graph.facts import Dims, Fact, Rows, Step
from adapterx.graph.shape_numbers import is_from_start
from adapterx.graph.sizes import ONE, ZERO, Size
from adapterx.graph.view import STANDARD

Rule = Callable[[Step], Fact | list[Fact]]

_MIXES = "works across the rows of the batch"
_MATRIX = 2
_SOFTMAX_OF_ONE_AXIS = 13


def met(step: Step, found: Iterable[Rows | None], dims: Dims | None) -> Fact:
    """What a result is whose operands have their rows there."""
    places = list(dict.fromkeys(rows for rows in found if rows is not None))
    if not places:
        return Fact(dims, lost=step.cause)
    first, *others = places
    for other in others:
        if (other.axis, other.before) != (first.axis, first.before):
            return dataclasses.replace(step.lost("brings rows of the batch together from two axes"), dims=dims)
        # Two sizes that meet are equal, or one of them is 1.
        first = other if first.after == ONE else first
    return Fact(dims, first)


def broadcast(operands: Iterable[Dims | None]) -> Dims | None:
    """Dimensions of what is computed element by element."""
    shapes = list(operands)
    known = [dims for dims in shapes if dims is not None]
    if len(known) < len(shapes) or not known:
        return None
    rank = max(map(len, known))
    result: list[Size | None] = [ONE] * rank
    for dims in known:
        for axis, dim in enumerate(dims, rank - len(dims)):
            result[axis] = _larger(result[axis], dim)
    return tuple(result)


def _larger(one: Size | None, other: Size | None) -> Size | None:
    """Of two sizes that meet: they are equal, or one of them is 1."""
    if other == ONE:
        return one
    if one == ONE or one is None or (other is not None and (other.is_number or not one.is_plain)):
        return other
    return one if one.is_number or other is not None else None


def elementwise(step: Step) -> Fact:
    """Operands broadcast against each other from the right."""
    operands = [fact for fact in step.operands if fact is not None]
    dims = broadcast(fact.dims for fact in operands)
    found = []
    for fact in operands:
        if fact.rows is not None and fact.rank is None and any(o is not fact and o.rank != 0 for o in operands):
            return step.lost("has an operand of unknown dimensions")
        rank = fact.rank if dims is None or fact.rank is None else len(dims)
        found.append(None if fact.rows is None else fact.rows.at(fact.rows.axis + (rank or 0) - (fact.rank or 0)))
    return _counting(step, operands, met(step, found, dims))


def _counting(step: Step, operands: list[Fact], fact: Fact) -> Fact:
    """``fact`` with what is left of an operand that counts the rows."""
    at = next((i for i, operand in enumerate(operands) if operand.counts is not None), None)
    if at is None or fact.dims is None or step.node.op_type not in {"Cast", "Identity", "Add", "Mul"}:
        return fact
    counting = operands[at]
    axis = (counting.counts or 0) + len(fact.dims) - (counting.rank or 0)
    stride: Size | None = counting.stride
    if step.node.op_type == "Mul":
        factor = operands[1 - at].numbers
        stride = counting.stride * factor[0] if factor is not None and len(factor) == 1 and factor[0] else None
    return fact if stride is None else dataclasses.replace(fact, counts=axis, stride=stride)


def matrix_product(step: Step) -> Fact:
    """``a @ b``: all axes but those that are summed over."""
    a, b = step.first, step.operand(1) or Fact()
    flips = (step.number("transA", 0), step.number("transB", 0))
    if step.number("transBatchA", 0) or step.number("transBatchB", 0) or a.rank is None or b.rank is None:
        return Fact(lost=step.cause) if step.is_shared else step.lost("is not read further")
    if 1 in {a.rank, b.rank}:
        return _vector_product(step, a, b)
    left, right = _turned(a, flips[0]), _turned(b, flips[1])
    assert left.dims is not None and right.dims is not None, "both ranks are known"  # noqa: PT018
    leading = broadcast([left.dims[:-2], right.dims[:-2]])
    dims = None if leading is None else (*leading, left.dims[-2], right.dims[-1])
    rank = max(a.rank, b.rank)
    found = []
    for fact, summed in ((left, -1), (right, -2)):
        if fact.rows is not None:
            axis = fact.rows.axis - len(fact.dims or ())
            if axis == summed:
                return step.lost("sums over the rows of the batch")
            found.append(fact.rows.at(axis + rank))
    return met(step, found, dims)


def _turned(fact: Fact, flip: int) -> Fact:
    if not flip or fact.dims is None:
        return fact
    last, other = len(fact.dims) - 1, len(fact.dims) - 2
    swap = {last: other, other: last}
    rows = None if fact.rows is None else fact.rows.at(swap.get(fact.rows.axis, fact.rows.axis))
    return Fact((*fact.dims[:-2], fact.dims[-1], fact.dims[-2]), rows, fact.lost)


def _vector_product(step: Step, a: Fact, b: Fact) -> Fact:
    """One operand is a vector, which is summed over whole."""
    vector, other = (a, b) if a.rank == 1 else (b, a)
    summed = (other.rank or 0) - (2 if a.rank == 1 and b.rank != 1 else 1)
    if vector.rows is not None or (other.rows is not None and other.rows.axis == summed) or other.dims is None:
        return step.lost("sums over the rows of the batch")
    dims = (*other.dims[:summed], *other.dims[summed + 1 :])
    return met(step, [_without(other.rows, [summed])], dims)


def gemm(step: Step) -> Fact:
    """``a @ b + c``."""
    total = matrix_product(step)
    addend = step.operand(2)
    if total.rows is None and addend is not None and addend.rows is not None and addend.rank == _MATRIX:
        return met(step, [addend.rows], total.dims)
    return total


def linear(step: Step) -> Fact:
    """A product with codes: the last axis changes."""
    x = step.first
    if x.rows is not None and x.rank is not None and x.rows.axis == x.rank - 1:
        return step.lost("sums over the rows of the batch")
    width = step.number("N", 0)
    dims = None if x.dims is None else (*x.dims[:-1], Size(width) if width else None)
    return met(step, [x.rows], dims)


def leading(step: Step) -> list[Fact]:
    """Rows first, in what comes in and in all that goes out."""
    found = next((fact.rows for fact in step.operands if fact is not None and fact.rows is not None), None)
    if found is not None and found.axis != 0:
        return [step.lost("wants rows first, and they are along another axis")] * len(step.node.outputs)
    return [met(step, [found], None)] * len(step.node.outputs)


def attention(step: Step) -> list[Fact]:
    """The same, but ONNX Runtime's own gives keys and values of the past as ``[2, n, heads, t, d]``."""
    facts = leading(step)
    if step.node.domain in STANDARD:
        return facts
    return [facts[0], *(dataclasses.replace(f, rows=f.rows and f.rows.at(1)) for f in facts[1:2]), *facts[2:]]


def first_alone(step: Step) -> Fact:
    """The first operand's, whatever the others say: weights, bounds, scales."""
    return met(step, [step.first.rows], step.first.dims)


def normalized(step: Step) -> list[Fact]:
    """Norms over ``axis`` and all after it."""
    x = step.first
    kept = x if x.rank is None or not _is_behind(x, step.number("axis", -1)) else step.lost(_MIXES)
    if x.rank is None and x.rows is not None and x.rows.axis:
        kept = step.lost("has an operand of unknown dimensions")
    return [_plain(kept, step)] * len(step.node.outputs)


def skip_normalized(step: Step) -> list[Fact]:
    """A norm over the last axis of a sum; the fourth output is the sum itself."""
    total = elementwise(dataclasses.replace(step, operands=step.operands[:2]))
    if total.rows is not None and total.rank is not None and total.rows.axis == total.rank - 1:
        total = step.lost(_MIXES)
    return [total] * len(step.node.outputs)


def softmax(step: Step) -> Fact:
    """Along one axis; before opset 13 along that and all after it."""
    x, one = step.first, step.opset >= _SOFTMAX_OF_ONE_AXIS
    axis = step.number("axis", -1 if one else 1)
    mixes = _is_at(x, axis) if one else _is_behind(x, axis)
    return step.lost(_MIXES) if mixes else _plain(x, step)


def along_axis(step: Step) -> Fact:
    """What works along one axis, an attribute or the second operand (CumSum, TopK, ArgMax, LpNormalization)."""
    x = step.first
    default = 0 if step.node.op_type in {"ArgMax", "ArgMin"} else -1
    axes = step.ints("", 1) if step.node.op_type == "CumSum" else [step.number("axis", default)]
    if x.rows is not None and (axes is None or _is_at(x, axes[0])):
        return step.lost(_MIXES)
    dims = x.dims
    if step.node.op_type == "TopK" and dims is not None and axes:
        dims = tuple(None if axis == axes[0] % len(dims) else dim for axis, dim in enumerate(dims))
    if step.node.op_type in {"ArgMax", "ArgMin"} and axes:
        return _reduced(step, axes, keep=bool(step.number("keepdims", 1)))
    return met(step, [x.rows], dims)


def reduced(step: Step) -> Fact:
    """Sums and the like over some axes."""
    axes = step.ints("axes", 1)
    if step.has("axes", 1) and axes is None:
        return Fact(lost=step.cause) if step.is_shared else step.lost("reduces axes that are not known")
    if not axes and step.number("noop_with_empty_axes", 0):
        return _plain(step.first, step)
    if not axes:
        axes = None if step.first.rank is None else list(range(step.first.rank))
    return _reduced(step, axes, keep=bool(step.number("keepdims", 1)))


def _reduced(step: Step, axes: list[int] | None, *, keep: bool) -> Fact:
    x = step.first
    if x.rows is not None and (axes is None or any(_is_at(x, axis) for axis in axes)):
        return step.lost(_MIXES)
    if x.dims is None or axes is None:
        kept_rank = keep and x.rows is not None
        return met(step, [x.rows], None) if kept_rank or x.rows is None else step.lost("reduces unknown dimensions")
    at = [axis % len(x.dims) for axis in axes] if x.dims else []
    if keep:
        return met(step, [x.rows], tuple(ONE if axis in at else dim for axis, dim in enumerate(x.dims)))
    dims = tuple(dim for axis, dim in enumerate(x.dims) if axis not in at)
    return met(step, [_without(x.rows, at)], dims)


def images(step: Step) -> Fact:
    """Convolutions, pools, resizing: ``[n, channels, ...]``."""
    x = step.first
    if x.rows is not None and x.rows.axis != 0:
        return step.lost("takes another axis than that of the batch as the first")
    scales = step.operand(2) if step.node.op_type == "Resize" else None
    if scales is not None and scales.numbers and scales.numbers[0] != ONE:
        return step.lost("resizes the axis of the batch")
    return met(step, [x.rows], None if x.dims is None else (x.dims[0], *(None for _ in x.dims[1:])))


def concatenated(step: Step) -> Fact:
    """One after another along ``axis``."""
    operands = [fact for fact in step.operands if fact is not None]
    known = next((fact.dims for fact in operands if fact.dims is not None), None)
    axis = step.number("axis", 0) if known is None else step.number("axis", 0) % max(1, len(known))
    if len(operands) > 1 and any(fact.rows is not None and fact.rows.axis == axis for fact in operands):
        return step.lost("puts other entries beside the rows of the batch, along their axis")
    dims = None
    if known is not None:
        ends = [None if fact.dims is None else fact.dims[axis] for fact in operands]
        whole = [end for end in ends if end is not None]
        total = sum(whole[1:], whole[0]) if len(whole) == len(ends) else None
        shapes = [f.dims for f in operands if f.dims is not None]
        dims = tuple(
            total if i == axis else next((d[i] for d in shapes if d[i] is not None), None) for i in range(len(known))
        )
    fact = met(step, [fact.rows for fact in operands], dims)
    # Behind each of the numbers others may stand: indices (row, place) for GatherND.
    counts = operands[0].counts if operands else None
    stride = operands[0].stride if operands else ONE
    return dataclasses.replace(fact, counts=None if counts == axis else counts, stride=stride)


def split(step: Step) -> list[Fact]:
    """Pieces along ``axis``."""
    x, count = step.first, len(step.node.outputs)
    if _is_at(x, step.number("axis", 0)) and count > 1:
        return [step.lost("cuts the rows of the batch apart")] * count
    dims = None
    if x.dims is not None and x.dims:
        axis = step.number("axis", 0) % len(x.dims)
        dims = tuple(None if i == axis else dim for i, dim in enumerate(x.dims))
    return [met(step, [x.rows], dims)] * count


def sliced(step: Step) -> Fact:
    """Part of some axes."""
    x = step.first
    if x.rows is None:
        return Fact(lost=step.cause)
    whole = None if x.rank is None else is_from_start(step, x.rows.axis, x.rank)
    if not whole:
        return step.lost("takes some of the rows of the batch" if whole is False else "may take some of the rows")
    assert x.dims is not None, "its rank is known"
    dims = tuple(dim if is_from_start(step, axis, len(x.dims)) else None for axis, dim in enumerate(x.dims))
    return met(step, [x.rows], dims)


def padded(step: Step) -> Fact:
    """More entries at the ends of some axes."""
    x = step.first
    if x.rows is None or x.dims is None:
        return Fact(lost=step.cause) if x.rows is None else step.lost("has an operand of unknown dimensions")
    ends = _pads(step, len(x.dims))
    if ends is None or ends[x.rows.axis] != (ZERO, ZERO):
        return step.lost("puts other entries beside the rows of the batch, along their axis")
    dims = tuple(
        dim
        if pads == (ZERO, ZERO)
        else None
        if dim is None or None in pads
        else dim + (pads[0] or ZERO) + (pads[1] or ZERO)
        for dim, pads in zip(x.dims, ends, strict=True)
    )
    return met(step, [x.rows], dims)


def _pads(step: Step, rank: int) -> list[tuple[Size | None, Size | None]] | None:
    """What is put at both ends of every axis, as far as that is known."""
    given = step.operand(1)
    pads = None if given is None else given.numbers
    if "pads" in step.node.attributes:
        pads = tuple(Size(number) for number in step.node.attributes["pads"].as_ints())
    axes = step.ints("", 3) if step.operand(3) is not None else list(range(rank))
    if pads is None or axes is None or len(pads) != 2 * len(axes):
        return None
    ends: list[tuple[Size | None, Size | None]] = [(ZERO, ZERO)] * rank
    for place, axis in enumerate(axes):
        ends[axis % rank] = pads[place], pads[place + len(axes)]
    return ends


def _plain(fact: Fact, step: Step) -> Fact:
    """A fact about other numbers: only where the rows are stays."""
    return fact if fact.lost else met(step, [fact.rows], fact.dims)


def _is_at(fact: Fact, axis: int) -> bool:
    if fact.rows is None:
        return False
    # Of a value of unknown dimensions an axis from the end may be any.
    return fact.rows.axis == (axis if axis >= 0 else axis + fact.rank if fact.rank is not None else fact.rows.axis)


def _is_behind(fact: Fact, axis: int) -> bool:
    if fact.rows is None:
        return False
    return fact.rows.axis >= (axis if axis >= 0 else axis + fact.rank if fact.rank is not None else 0)


def _without(rows: Rows | None, axes: list[int]) -> Rows | None:
    return None if rows is None else rows.at(rows.axis - sum(axis < rows.axis for axis in axes))


_ELEMENTWISE = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BiasGelu BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor "
    "Cast Ceil Celu Cos Cosh Div Dropout Elu Equal Erf Exp FastGelu Floor Gelu Greater GreaterOrEqual HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow "
    "QuickGelu Reciprocal Relu Round Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Tan Tanh "
    "ThresholdedRelu Where Xor BiasAdd BiasSplitGelu Swish SwiGLU"
)
_FIRST_ALONE = (
    "Clip CastLike QuantizeLinear DequantizeLinear RandomNormalLike RandomUniformLike Bernoulli Trilu "
    "RotaryEmbedding LowRankAdd"
)
_LEADING = (
    "MultiHeadAttention GroupQueryAttention EmbedLayerNormalization PagedAttention SparseAttention MoE QMoE "
    "GatedRelativePositionBias LinearAttention CausalConvWithState"
)
_IMAGES = (
    "Conv ConvInteger ConvTranspose FusedConv QLinearConv NhwcConv MaxPool AveragePool LpPool GlobalAveragePool "
    "GlobalMaxPool GlobalLpPool Resize Upsample BatchNormalization InstanceNormalization GroupNormalization "
    "GroupNorm SkipGroupNorm LRN DepthToSpace SpaceToDepth QLinearGlobalAveragePool QLinearAveragePool "
    "NhwcMaxPool Col2Im AffineGrid GridSample DeformConv"
)
_LINEAR = "MatMulNBits MatMulBnb4 MatMulFpQ4 DynamicQuantizeMatMul MatMulIntegerToFloat QLinearMatMul QGemm"
_REDUCED = "Max Mean Min Prod Sum SumSquare L1 L2 LogSum LogSumExp"

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise),
    **dict.fromkeys(_FIRST_ALONE.split(), first_alone),
    **dict.fromkeys(_LEADING.split(), leading),
    **dict.fromkeys(("Attention", "QAttention", "DecoderMaskedSelfAttention"), attention),
    **dict.fromkeys(_IMAGES.split(), images),
    **dict.fromkeys(_LINEAR.split(), linear),
    **dict.fromkeys((f"Reduce{name}" for name in _REDUCED.split()), reduced),
    **dict.fromkeys(("MatMul", "MatMulInteger", "FusedMatMul", "TransposeMatMul"), matrix_product),
    **dict.fromkeys(("Gemm", "FusedGemm"), gemm),
    **dict.fromkeys(
        ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"), normalized
    ),
    **dict.fromkeys(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"), skip_normalized),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), softmax),
    **dict.fromkeys(("CumSum", "TopK", "ArgMax", "ArgMin", "LpNormalization"), along_axis),
    "DynamicQuantizeLinear": lambda step: [_plain(step.first, step), *[Fact((), lost=step.cause)] * 2],
    "Concat": concatenated,
    "Split": split,
    "Slice": sliced,
    "Pad": padded,
}  # fmt: skip
