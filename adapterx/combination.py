"""combine: the weighted sum of adapters, as one adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from adapterx.adapter import ABSOLUTE, PROMPT, RELATIVE, Adapter, Array, LowRank
from adapterx.errors import MismatchError, OptionError
from adapterx.kinds.lora import cast
from adapterx.truncation import truncated_adapter

# What all adapters must agree on, and what speaks of one file only.
_BASES = ("base_fingerprint", "base_model", "model_version")
_KEPT = ("base_fingerprint", "base_model", "task_type")
_SHOWN = 20


class _Term(NamedTuple):
    change: LowRank
    weight: float


def combine(
    adapters: Iterable[tuple[Adapter, float]], *, rank: int | None = None, allow_other_base: bool = False
) -> Adapter:
    """The adapter whose change is the weighted sum of the changes of others: exact, by ranks one after another.

    It does what ``AdapterSession.run(adapters=[{"a": 0.7, "b": 0.3}])`` does, for a whole batch and at the price of one
    adapter. The weights go into ``b``. A site that only some of the adapters have keeps what those do there. Where
    element types differ, the sum is in float32 (float64 if one is).

    Args:
        adapters: adapters and their weights, which may be negative, 0, or add up to anything
        rank: the most that a site keeps, by SVD; ``None`` keeps all, the sum of the ranks. The relative errors are in
            the metadata ``truncation_error`` and ``truncation_errors`` (:func:`adapterx.truncation.truncated_adapter`)
        allow_other_base: take adapters that say that they were made for different bases

    Raises:
        OptionError: no adapters, a weight that is no finite number, or no such rank.
        MismatchError: sites of one name and different shapes, other bases, values that overflow, or changes that are
            not linear: DoRA, whole weights and prompts (a weight on them has no meaning), and input gains beside
            output gains. All sites at once.

    Example:
        >>> one = Adapter({"fc": LowRank(a=np.ones((2, 4), np.float32), b=np.ones((2, 3), np.float32))})
        >>> combine([(one, 0.7), (one, 0.3)]).ranks, combine([(one, 0.7), (one, 0.3)], rank=1).ranks
        ((4,), (1,))
    """
    pairs = [(adapter, _weight(weight)) for adapter, weight in adapters]
    if not pairs:
        raise OptionError("combine needs at least one adapter and its weight; got none")
    terms: dict[str, list[_Term]] = {}
    for adapter, weight in pairs:
        for site, change in adapter.sites.items():
            terms.setdefault(site, []).append(_Term(change, weight))
    faults = [] if allow_other_base else _other_bases([adapter for adapter, _ in pairs])
    sites = {}
    for site, members in terms.items():
        try:
            sites[site] = _sum(members)
        except ValueError as cause:
            faults.append(f"{site}: {cause}")
    if faults:
        shown = [*faults[:_SHOWN], *([f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else [])]
        raise MismatchError("\n  ".join(["these adapters cannot be combined:", *shown]))
    whole = Adapter(sites, _metadata([adapter for adapter, _ in pairs]))
    return whole if rank is None else truncated_adapter(whole, rank)


def _weight(weight: float) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"the weight {weight!r} is no finite number")
    return number


def _other_bases(adapters: Sequence[Adapter]) -> list[str]:
    found = []
    for key in _BASES:
        told = sorted({adapter.metadata[key] for adapter in adapters if adapter.metadata.get(key)})
        if len(told) > 1:
            shown = ", ".join(repr(one[:40]) for one in told)
            found.append(f"base: they were made for different ones ({key}: {shown}); allow_other_base=True takes them")
    return found


def _metadata(adapters: Sequence[Adapter]) -> dict[str, str]:
    """What all say alike."""
    first, *others = (adapter.metadata for adapter in adapters)
    return {key: first[key] for key in _KEPT if key in first and all(one.get(key) == first[key] for one in others)}


def _sum(terms: Sequence[_Term]) -> LowRank:
    """Raises ValueError with the cause."""
    _refuse_nonlinear(terms)
    shapes = {(*term.change.a.shape[1:], term.change.d_out) for term in terms if term.change.rank}
    if len(shapes) > 1:
        raise ValueError(f"its shapes differ: {', '.join(str(shape) for shape in sorted(shapes))}")
    dtype = _common_dtype({term.change.dtype for term in terms})
    low_rank = [term for term in terms if term.change.rank] or terms[:1]
    a = np.concatenate([term.change.a.astype(dtype) for term in low_rank])
    b = np.concatenate([_weighted(term.change.b, term.weight, dtype, "b") for term in low_rank])
    parts = {name: _part(name, terms, dtype) for name in RELATIVE if any(name in term.change.parts for term in terms)}
    return LowRank(a=a, b=b, parts=parts)


def _common_dtype(dtypes: set[np.dtype[Any]]) -> np.dtype[Any]:
    # numpy knows no promotion between float16 and bfloat16.
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return np.dtype(np.float64 if max(dtype.itemsize for dtype in dtypes) > 4 else np.float32)


def _part(name: str, terms: Sequence[_Term], dtype: np.dtype[Any]) -> Array:
    held = [(term.change.parts[name], term.weight) for term in terms if name in term.change.parts]
    widths = {part.shape for part, _ in held}
    if len(widths) > 1:
        raise ValueError(f"the shapes of its {name} differ: {', '.join(map(str, sorted(widths)))}")
    with np.errstate(over="ignore", invalid="ignore"):
        total = sum(part.astype(np.float64) * weight for part, weight in held)
    return cast(np.asarray(total), dtype, name)


def _refuse_nonlinear(terms: Sequence[_Term]) -> None:
    names = {name for term in terms for name in term.change.parts}
    absolute = sorted(names & {*ABSOLUTE, PROMPT})
    if absolute:
        raise ValueError(f"it holds {', '.join(absolute)}, which has no weighted sum; convert it for its model first")
    if {"gain", "input_gain"} <= names and (len(terms) > 1 or terms[0].weight != 1):
        raise ValueError("it has gains in front of and behind the layer, whose product is not linear")


def _weighted(array: Array, weight: float, dtype: np.dtype[Any], what: str) -> Array:
    if weight == 1:
        return array.astype(dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        return cast(np.multiply(array, weight, dtype=wide, casting="unsafe"), dtype, what)
