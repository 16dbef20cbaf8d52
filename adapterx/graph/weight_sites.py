"""DoRA, VeRA, LoHa and LoKr in a graph: what changes a linear layer's weight, in another way than plain LoRA.

Each is a sum of its own shape beside a base (:mod:`adapterx.graph.sums`): DoRA multiplies the base, VeRA has vectors
between and behind its two matrices, LoHa and LoKr are one whole matrix. Structure tells DoRA and VeRA; one more matrix
beside a base is an adapter only if names, metadata or paths say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from adapterx.adapter import GAIN, SHIFT, Array, LowRank
from adapterx.graph.bases import Base
from adapterx.graph.conv_sites import group_of, placing
from adapterx.graph.evidence import Evidence, evidence
from adapterx.graph.exported import Exported
from adapterx.graph.folded import Folding
from adapterx.graph.hadamard import hadamard
from adapterx.graph.identity import Identity, agreed
from adapterx.graph.paths import Paths
from adapterx.graph.sums import Chain, Sum, find_sums
from adapterx.kinds.conv import spread
from adapterx.kinds.lora import cast, of_delta
from adapterx.site import Kind

# Norm and quotient are rounded in the graph's own type.
_SAME_RATIO = 1e-2
_MATRIX = 2


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Met:
    sum: Sum
    told: Evidence
    kind: Kind

    @property
    def base_first(self) -> bool:
        """The join adds something to the base, not the base to something."""
        return self.sum.join.inputs[0] is self.sum.value


def find_weight_changes(model: ir.Model, bases: Sequence[Base]) -> list[Exported]:
    """Every DoRA, VeRA, LoHa and LoKr of ``model``; without a module where nothing names it.

    Args:
        model: looked at
        bases: its base operations
    """
    folding = Folding(model)
    met = []
    for base in bases:
        for i, one in enumerate(() if base.kind == "embedding" else find_sums(base, folding)):
            told = evidence(base, one.join, one.nodes, folding)
            kind = _kind(one, told, first=i == 0)
            if kind is not None:
                met.append(_Met(one, told, kind))
    met = _one_a_join(met)
    if not met:
        return []
    places = [f"the {one.kind} at node {one.sum.join.name!r}" for one in met]
    who = agreed([one.told.claims for one in met], places, Paths.of(model), strict=False)
    return [_exported(one, identity, folding) for one, identity in zip(met, who, strict=True)]


def _one_a_join(met: list[_Met]) -> list[_Met]:
    """Of two matrices whose sum alone has a name, the second: PEFT adds its own to the base."""
    best: dict[ir.Node, _Met] = {}
    for one in met:
        before = best.setdefault(one.sum.join, one)
        if (bool(one.told.parts), one.base_first) > (bool(before.told.parts), before.base_first):
            best[one.sum.join] = one
    return [one for one in met if not one.told.claims or best[one.sum.join] is one]


def _exported(one: _Met, who: Identity | None, folding: Folding) -> Exported:
    change, scale = _change(one, folding)
    return Exported(
        module="" if who is None else who.module,
        adapter="" if who is None else who.adapter,
        source="structure" if who is None else who.source,
        kind=one.kind,
        op=one.sum.base.op,
        x=one.sum.chains[0].x,
        base=one.sum.value,
        join=one.sum.join,
        change=change,
        scale=scale,
        nodes=one.sum.nodes,
    )


def _kind(one: Sum, told: Evidence, *, first: bool) -> Kind | None:
    """What ``one`` can only be; ``None`` for plain LoRA, and for what is no adapter."""
    if len(one.chains) != 1 or not _goes_where_the_base_goes(one):
        return None
    chain = one.chains[0]
    plain = bool((one.gain == 1).all()) and not one.shift.any()
    match len(chain.matrices):
        case 2 if told.speaks_of("lora_magnitude_vector") or _is_normed(one.gain, chain.factors[-1]):
            return "dora"
        case 2 if plain and (told.speaks_of("vera_") or (not told.parts and any(f.ndim for f in chain.factors))):
            return "vera"
        case 1 if plain and (told.wrapped or (first and (told.claims or told.silent))):
            # The base's own name says no more than that PEFT wrapped it: then the adapter is what comes first.
            if told.speaks_of("hada_") or told.tuner == "loha":
                return "loha"
            return "lokr" if told.speaks_of("lokr_") or told.tuner == "lokr" else "lora"
    return None


def _goes_where_the_base_goes(one: Sum) -> bool:
    """A convolution has the base's kernel, strides and pads; one that follows it looks at single points."""
    kernel = one.base.kernel
    if not kernel:
        return True
    axes, chain = len(kernel), one.chains[0]
    first, *others = [(matrix.node, matrix.read().shape[2:]) for matrix in chain.matrices]
    point = (1,) * axes
    same = first[1] == kernel and placing(first[0], axes) == placing(one.base.op, axes) and group_of(first[0]) == 1
    return same and chain.factors[0].ndim == 0 and all(shape == point for _, shape in others)


def _is_normed(gain: Array, behind: Array) -> bool:
    """DoRA's mark: the base and the low-rank term are multiplied with one vector, but for the scale."""
    if gain.ndim == 0 or behind.ndim == 0 or not gain.all():
        return False
    ratio = behind / gain
    return bool(np.ptp(ratio) <= _SAME_RATIO * np.abs(ratio).max())


def _change(one: _Met, folding: Folding) -> tuple[LowRank, float]:
    """The exported adapter, and the scale that is in it as far as the graph still has it."""
    chain, gain, shift = one.sum.chains[0], one.sum.gain, one.sum.shift
    dtype = chain.matrices[0].dtype.numpy()
    if len(chain.matrices) == 1:
        return _delta(chain, folding)
    behind = chain.factors[-1]
    a, b = _low_rank(chain)
    parts: dict[str, Array] = {}
    if one.kind == "dora":
        d_out = b.shape[1]
        parts[GAIN] = np.broadcast_to(gain - 1, (1, d_out))
        # A magnitude that is the norm, as PEFT starts with, shifts nothing; another one does.
        if shift.any() or one.sum.base.bias is not None:
            parts[SHIFT] = np.broadcast_to(shift, (1, d_out))
    cut = {name: cast(part.astype(np.float32), dtype, name) for name, part in parts.items()}
    scale = float(np.median(behind / gain)) if one.kind == "dora" and gain.all() else 1.0
    return LowRank(a=cast(a, dtype, "a"), b=cast(b, dtype, "b"), parts=cut), scale


def _low_rank(chain: Chain) -> tuple[Array, Array]:
    """``a`` ``[r, d_in]`` and ``b`` ``[r, d_out]`` of two products, with the factors around them."""
    before, between, behind = chain.factors
    first, second = (matrix.read() for matrix in chain.matrices)
    if first.ndim > _MATRIX:
        ranks = between.reshape(-1, *[1] * (first.ndim - 1)) if between.ndim else between
        return first * before * ranks, spread(second, len(first)) * behind
    return (first * before.reshape(-1, 1) * between).T, second * behind


def _delta(chain: Chain, folding: Folding) -> tuple[LowRank, float]:
    """One matrix: as products where the graph still has them, else at full rank."""
    [matrix], (before, behind) = chain.matrices, chain.factors
    dtype = matrix.dtype.numpy()
    found = hadamard(matrix, folding) if before.ndim == 0 and behind.ndim == 0 else None
    if found is not None:
        low_rank, scale = found
        factor = float(before * behind)
        b = cast(low_rank.b * np.float32(factor), dtype, "b")
        return LowRank(a=cast(low_rank.a, dtype, "a"), b=b), scale * factor
    delta = matrix.read()
    if delta.ndim > _MATRIX:
        b = np.diag(np.broadcast_to(behind, len(delta)))
        return LowRank(a=cast(delta * before, dtype, "a"), b=cast(b, dtype, "b")), 1.0
    whole = (delta * before.reshape(-1, 1) * behind).T
    return of_delta(cast(whole, dtype, "the change"), dtype), 1.0
