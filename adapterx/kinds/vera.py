"""VeRA: ``W + diag(lambda_b) @ B @ diag(lambda_d) @ A``, A and B random and shared by all sites (arXiv 2310.11454).

In a PEFT file: ``vera_lambda_d`` ``[r]`` and ``vera_lambda_b`` ``[d_out]`` a site; ``base_model.vera_A`` ``[r, widest
d_in]`` and ``base_model.vera_B`` ``[widest d_out, r]`` once, of which a site uses the first columns and rows. A file
without the two (``save_projection=False``) holds the seed of a random generator in their place and is refused.

In a graph: ``MatMul(A) -> Mul(lambda_d) -> MatMul(B) -> Mul(lambda_b)``. Each site gets the ports of plain LoRA, with
the lambdas multiplied in: exact, but the sites no longer share A and B, so an adapter takes as much memory as LoRA of
that rank.

In a mixed batch: as LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapterx.adapter import Array, LowRank
from adapterx.kinds.lora import cast, wide

KEYS = ("vera_lambda_b", "vera_lambda_d")
SHARED = ("vera_A", "vera_B")


def read(tensors: Mapping[str, Array], shared: Mapping[str, Array]) -> LowRank:
    """A site of a VeRA file. Its ``a`` has the columns of the widest site: how many are its own, only a model tells.

    Args:
        tensors: ``vera_lambda_b`` and ``vera_lambda_d`` of one module
        shared: ``vera_A`` and ``vera_B``

    Raises:
        ValueError: a tensor is missing or misshapen.
    """
    missing = [name for name in KEYS if name not in tensors]
    if missing:
        raise ValueError(f"its {missing[0]} is missing")
    if any(name not in shared for name in SHARED):
        raise ValueError("the file has no vera_A and vera_B (save_projection=False); save it with save_projection=True")
    lambda_b, lambda_d = wide(tensors["vera_lambda_b"]).reshape(-1), wide(tensors["vera_lambda_d"]).reshape(-1)
    a, b = wide(shared["vera_A"]), wide(shared["vera_B"])[: len(lambda_b)]
    if len(a) != len(lambda_d) or b.shape != (len(lambda_b), len(lambda_d)):
        raise ValueError(f"lambdas {lambda_b.shape}, {lambda_d.shape} do not fit A {a.shape} and B {b.shape}")
    dtype = tensors["vera_lambda_b"].dtype
    return LowRank(a=cast(a * lambda_d[:, None], dtype, "vera_A"), b=cast((b * lambda_b[:, None]).T, dtype, "vera_B"))


def cut(change: LowRank, d_in: int) -> LowRank:
    """``change`` for a site of ``d_in`` features: the first columns of A are its own."""
    return change if change.d_in <= d_in else LowRank(a=change.a[:, :d_in], b=change.b, parts=change.parts)
