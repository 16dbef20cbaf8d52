"""LoHa's product of products, where a graph computes it at each run: its factors instead of the whole matrix."""

from __future__ import annotations

import onnx_ir as ir

from adapterx.adapter import LowRank
from adapterx.graph.folded import Folding
from adapterx.graph.sums import Matrix
from adapterx.graph.view import SAME_VALUE, attribute, is_op, times
from adapterx.kinds import loha


def hadamard(matrix: Matrix, folding: Folding) -> tuple[LowRank, float] | None:
    """``(w1_a @ w1_b) * (w2_a @ w2_b) * s`` behind ``matrix`` as a change of rank ``r * r``, and ``s``; else ``None``.

    A matrix of 4096 features each way is 64 MiB, its factors of rank 8 are 2 MiB.
    """
    value, scale = matrix.weight, 1.0
    shapes: list[ir.Value | None] = []
    # The file's is [d_out, d_in], the operation's [d_in, d_out] unless it turns it itself.
    turned = not attribute(matrix.node, "transB", 0)
    while value is not None and (node := value.producer()) is not None:
        if (step := times(node)) is not None:
            value, scale = step[0], scale * step[1]
            continue
        if is_op(node, "Mul"):
            found = None if turned else _read(node, scale, folding)
            return found if found is None or _keep(shapes, found[0], folding) else None
        if is_op(node, "Transpose") and _swaps(node) and not shapes:
            turned = not turned
        elif is_op(node, "Reshape"):
            shapes.append(node.inputs[1])
        elif not is_op(node, *SAME_VALUE):
            return None
        value = node.inputs[0]
    return None


def _swaps(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return perm is None or list(perm.as_ints()) == [1, 0]


def _keep(shapes: list[ir.Value | None], change: LowRank, folding: Folding) -> bool:
    """The reshapes on the way change nothing."""
    shape = [change.d_out, change.d_in]
    return all(one is not None and folding.holds(one) and folding.array(one).tolist() == shape for one in shapes)


def _read(node: ir.Node, scale: float, folding: Folding) -> tuple[LowRank, float] | None:
    tensors = {}
    for name, value in zip(("hada_w1", "hada_w2"), node.inputs, strict=True):
        product = None if value is None else value.producer()
        if product is None or not is_op(product, "MatMul"):
            return None
        for side, factor in zip("ab", product.inputs, strict=True):
            if factor is None or not folding.holds(factor):
                return None
            tensors[f"{name}_{side}"] = folding.array(factor)
    try:
        return loha.read(tensors, lambda _: scale), scale
    except ValueError:
        return None
