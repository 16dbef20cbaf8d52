"""rebase_adapter: an adapter of a float base, for the same base with scales folded into its producers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch

from adapterx.adapter import (
    MAGNITUDE,
    PROMPT,
    SHIFT,
    WHOLE_BIAS,
    WHOLE_WEIGHT,
    Adapter,
    Array,
    LowRank,
)
from adapterx.errors import MismatchError
from adapterx.quant.fold import Fold


def rebase_adapter(
    adapter: Adapter, scales: Iterable[Fold], *, weights: Mapping[str, torch.Tensor] | None = None
) -> Adapter:
    """``adapter`` as it would be, had it been trained on the base after ``scales`` were folded into it.

    Folding divides the inputs of some layers by ``s``, so ``a' = a * s`` there; and the outputs of their producers,
    so ``b' = b / s`` there, where the producer is a linear layer with a site of its own. Weights, biases and shifts
    follow in the same way, and gains, which are relative, stay. The float models with their adapters then agree exactly
    but for rounding.

    Args:
        adapter: as it was trained
        scales: of every fold, by names in the model (`Fold.within`); several of one layer are multiplied
        weights: float weights ``[d_out, d_in]`` of the base before folding, by site: DoRA divides by the length of the
            adapted rows, which change when their inputs are scaled. Only looked at for such sites

    Raises:
        MismatchError: widths that do not fit, a DoRA site without its weight, values that overflow the adapter's
            dtype, prompts at a layer that was folded. All sites at once.

    Example:
        >>> plain = Adapter({"fc": LowRank(a=np.ones((1, 2)), b=np.ones((1, 3)))})
        >>> rebased = rebase_adapter(plain, [Fold("norm", ("fc",), torch.tensor([2.0, 4.0]))])
        >>> rebased.sites["fc"].a
        array([[2., 4.]])
    """
    inputs: dict[str, Array] = {}
    outputs: dict[str, Array] = {}
    for fold in scales:
        scale = fold.scale.detach().cpu().numpy().astype(np.float64)
        for name in fold.consumers:
            inputs[name] = inputs[name] * scale if name in inputs else scale
        outputs[fold.producer] = outputs[fold.producer] * scale if fold.producer in outputs else scale
    sites: dict[str, LowRank] = {}
    faults = []
    for site, change in adapter.sites.items():
        try:
            weight = None if weights is None or site not in weights else _wide(weights[site].detach().cpu().numpy())
            sites[site] = _rebased(change, inputs.get(site), outputs.get(site), weight)
        except ValueError as wrong:
            faults.append(f"{site}: {wrong}")
    if faults:
        raise MismatchError("\n  ".join(["the adapter cannot follow these folds:", *faults]))
    return Adapter(sites, adapter.metadata)


def _rebased(change: LowRank, before: Array | None, after: Array | None, weight: Array | None) -> LowRank:
    """``change`` at a layer whose inputs were divided by ``before``, and whose outputs by ``after``."""
    if before is None and after is None:
        return change
    if PROMPT in change.parts:
        raise ValueError("a prompt stands beside a layer that was folded")
    _fits(change, before, after)
    ins = np.ones(change.d_in) if before is None else before
    outs = np.ones(change.d_out) if after is None else after
    kernel = (1,) * len(change.kernel)
    rules: dict[str, Callable[[Array], Array]] = {
        SHIFT: lambda part: part / outs,
        WHOLE_BIAS: lambda part: part / outs,
        WHOLE_WEIGHT: lambda part: part * ins / outs[:, None],
        MAGNITUDE: lambda part: part * _lengthened(change, before, weight) / outs,
    }
    return LowRank(
        a=_narrow(_wide(change.a) * ins.reshape(1, -1, *kernel), change) if change.rank else change.a,
        b=_narrow(_wide(change.b) / outs, change) if change.rank else change.b,
        parts={
            name: _narrow(rules[name](_wide(part)), change) if name in rules else part
            for name, part in change.parts.items()
        },
    )


def _fits(change: LowRank, before: Array | None, after: Array | None) -> None:
    if before is not None and change.d_in not in (0, len(before)):
        raise ValueError(f"it reads {change.d_in} features, and {len(before)} were folded")
    if after is not None and change.d_out not in (0, len(after)):
        raise ValueError(f"it gives {change.d_out} features, and {len(after)} were folded")


def _lengthened(change: LowRank, before: Array | None, weight: Array | None) -> Array | float:
    """By how much the rows of the adapted weight become longer when its inputs are divided by ``before``."""
    if before is None:
        return 1.0
    if weight is None:
        raise ValueError("DoRA's magnitude belongs to the length of the adapted rows; pass the base's weight")
    if change.kernel:
        raise ValueError("DoRA of a convolution cannot follow a fold of its inputs")
    adapted = weight + _wide(change.b).T @ _wide(change.a)
    found: Array = np.linalg.norm(adapted * before, axis=1) / np.linalg.norm(adapted, axis=1)
    return found


def _wide(part: Array) -> Array:
    return part.astype(np.float64)


def _narrow(part: Array, change: LowRank) -> Array:
    with np.errstate(over="ignore"):
        found = part.astype(change.dtype)
    if not np.isfinite(found.astype(np.float64)).all():
        raise ValueError(f"a value of up to {np.abs(part).max():.3g} does not fit {change.dtype}")
    return found
