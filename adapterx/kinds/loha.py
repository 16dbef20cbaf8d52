"""LoHa: ``W + s * (w1_a @ w1_b) * (w2_a @ w2_b)``, the product of the two matrices taken element by element.

Hyeon-Woo et al., FedPara, arXiv 2108.06098; Yeh et al., LyCORIS, arXiv 2309.14859.

In a PEFT file: ``hada_w1_a`` ``[d_out, r]``, ``hada_w1_b`` ``[r, d_in]``, and ``hada_w2_a``, ``hada_w2_b`` alike.
Convolutions have their kernel flattened into ``d_in``; the decomposition with ``hada_t1`` and ``hada_t2`` is refused.

In a graph: TorchScript computes the change from the four factors at each run; dynamo folds it into one matrix
``[d_in, d_out]``. Either becomes the ports of plain LoRA: the elementwise product of two matrices of rank ``r`` is
exactly one of rank ``r * r``, whose factors are all products of a column of the one with a column of the other. A
folded change is taken as it lies, at full rank.

In a mixed batch: as LoRA, at rank ``min(r * r, d_in, d_out)``.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapterx.adapter import Array, LowRank
from adapterx.kinds.lora import Scale, cast, of_delta, wide

KEYS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")


def read(tensors: Mapping[str, Array], scale: Scale) -> LowRank:
    """A site of a LoHa file; arguments and errors as for :func:`adapterx.kinds.lora.read`."""
    if "hada_t1" in tensors:
        raise ValueError("LoHa with hada_t1 (use_effective_conv2d) is not known here; train it without, or merge it")
    missing = [name for name in KEYS[:4] if name not in tensors]
    if missing:
        raise ValueError(f"its {missing[0]} is missing; the file has {', '.join(sorted(tensors))}")
    first_a, first_b, second_a, second_b = (wide(tensors[name]) for name in KEYS[:4])
    rank, (d_out, d_in) = len(first_b), (len(first_a), first_b.shape[-1])
    shapes = {first_a.shape, second_a.shape, (d_out, rank)}, {first_b.shape, second_b.shape, (rank, d_in)}
    if any(len(same) > 1 for same in shapes):
        raise ValueError(f"expected [d_out, r] and [r, d_in], twice; got {[tensors[name].shape for name in KEYS[:4]]}")
    dtype, factor = tensors["hada_w1_a"].dtype, scale(rank)
    if rank * rank >= min(d_in, d_out):
        return of_delta(cast((first_a @ first_b) * (second_a @ second_b) * factor, dtype, "the change"), dtype)
    a = (first_b[:, None] * second_b[None]).reshape(rank * rank, d_in)
    b = (first_a.T[:, None] * second_a.T[None]).reshape(rank * rank, d_out) * factor
    return LowRank(a=cast(a, dtype, "hada_w1_b * hada_w2_b"), b=cast(b, dtype, "hada_w1_a * hada_w2_a"))
