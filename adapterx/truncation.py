"""Truncation: the nearest change of a smaller rank, without ever forming the matrix ``[d_out, d_in]``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from adapterx.adapter import Adapter, Array, LowRank
from adapterx.errors import OptionError
from adapterx.kinds.lora import cast
from adapterx.progress import progress

# In the metadata of a truncated adapter: the error of the whole, and a JSON object of the errors by site.
ERROR = "truncation_error"
ERRORS = "truncation_errors"

# Wider matrices are looked at through a random subspace of the rank and a few more.
_DENSE, _MORE, _POWERS = 1024, 16, 4


@dataclasses.dataclass(frozen=True, slots=True)
class Truncated:
    """A change of a smaller rank, and what was lost.

    Args:
        change: the nearest of its rank in the Frobenius norm (Eckart and Young, 1936)
        lost: squared Frobenius norm of what is gone
        whole: squared Frobenius norm of what was there
    """

    change: LowRank
    lost: float
    whole: float


_NONE: Mapping[str, Truncated] = MappingProxyType({})


def truncated(change: LowRank, rank: int) -> Truncated:
    """``change`` at ``rank`` or less, by SVD in float64.

    ``b.T @ a`` has the singular values of the small matrix between the QR decompositions of the two factors, so the
    cost is that of two tall matrices of ``r`` columns. The singular values go into both factors alike, which keeps
    half types in range. Parts other than ``a`` and ``b`` stay. What the element type rounds away is not counted.

    Args:
        change: a small enough one is returned as it is
        rank: at least 1

    Raises:
        ValueError: a value overflows the element type of ``change``.

    Example:
        >>> cut = truncated(LowRank(a=np.diag([3.0, 4.0]), b=np.eye(2)), 1)
        >>> cut.change.rank, round(cut.lost), round(cut.whole)
        (1, 9, 25)
    """
    a, b = _rows(change.a), _rows(change.b)
    if change.rank <= rank:
        return Truncated(change, 0.0, _squared(a, b))
    (q_in, r_in), (q_out, r_out) = np.linalg.qr(a.T), np.linalg.qr(b.T)
    u, values, v = np.linalg.svd(r_out @ r_in.T, full_matrices=False)
    root = np.sqrt(values[:rank])[:, None]
    near_a = (root * (v[:rank] @ q_in.T)).reshape(-1, *change.a.shape[1:])
    near_b = root * (u[:, :rank].T @ q_out.T)
    near = LowRank(a=cast(near_a, change.dtype, "a"), b=cast(near_b, change.dtype, "b"), parts=change.parts)
    squares = values * values
    return Truncated(near, float(squares[rank:].sum()), float(squares.sum()))


def nearest(delta: Array, rank: int, dtype: np.dtype[Any]) -> Truncated:
    """The change of ``rank`` that is nearest to a whole matrix.

    Up to 1024 wide, by SVD. A wider matrix goes through a random subspace with four power iterations (Halko et al.,
    arXiv 0909.4061), whose result is a little off the best there is; ``lost`` is that of the result.

    Args:
        delta: ``[d_out, d_in]``
        rank: at least 1
        dtype: of the result

    Raises:
        ValueError: a value overflows ``dtype``.

    Example:
        >>> cut = nearest(np.diag([3.0, 4.0]), 1, np.dtype("float32"))
        >>> cut.change.rank, round(cut.lost), round(cut.whole)
        (1, 9, 25)
    """
    wide = delta.astype(np.float64)
    basis = _range(wide, rank + _MORE) if min(delta.shape) > _DENSE else None
    u, values, v = np.linalg.svd(wide if basis is None else basis.T @ wide, full_matrices=False)
    root, left = np.sqrt(values[:rank])[:, None], u[:, :rank] if basis is None else basis @ u[:, :rank]
    near = LowRank(a=cast(root * v[:rank], dtype, "a"), b=cast(root * left.T, dtype, "b"))
    whole, kept = float(np.vdot(wide, wide)), float(np.vdot(values[:rank], values[:rank]))
    # What a projection leaves has the norm that is missing; rounding may take it below 0.
    return Truncated(near, max(whole - kept, 0.0), whole)


def _range(matrix: Array, width: int) -> Array:
    """An orthonormal basis ``[d_out, width]`` of about what ``matrix`` does most."""
    start = np.random.default_rng(0).normal(size=(matrix.shape[1], width))
    basis = np.linalg.qr(matrix @ start).Q
    for _ in range(_POWERS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis).Q).Q
    return np.asarray(basis)


def truncated_adapter(adapter: Adapter, rank: int, done: Mapping[str, Truncated] = _NONE) -> Adapter:
    """Every site of ``adapter`` at ``rank`` or less, and what that costs.

    Args:
        adapter: any
        rank: the most that a site keeps, at least 1
        done: what was lost before, by site

    Returns:
        The adapter with two more metadata: ``truncation_error``, the Frobenius norm of all that is gone relative to
        all that was there, and ``truncation_errors``, a JSON object of the same for each site.

    Raises:
        OptionError: no such rank.
        ValueError: a value overflows its element type.
    """
    if type(rank) is not int or rank < 1:
        raise OptionError(f"rank={rank!r} is no rank; expected a whole number of at least 1")
    cut: dict[str, Truncated] = {}
    with progress("truncating", adapter.nbytes) as advance:
        for site, change in adapter.sites.items():
            cut[site] = truncated(change, rank)
            advance(change.nbytes)
    losses = {**cut, **done}
    errors = {site: round(_relative([one]), 9) for site, one in losses.items()}
    told = {ERROR: f"{_relative(losses.values()):.9g}", ERRORS: json.dumps(errors, separators=(",", ":"))}
    return Adapter({site: one.change for site, one in cut.items()}, {**adapter.metadata, **told})


def distance(adapter: Adapter, other: Adapter) -> float:
    """How far the low-rank changes of ``other`` are from those of ``adapter``: relative, in the Frobenius norm.

    Args:
        adapter: the truth
        other: of the same sites and widths
    """
    return _relative(_apart(change, other.sites[site]) for site, change in adapter.sites.items())


def _apart(change: LowRank, other: LowRank) -> Truncated:
    """``other`` and the squared norms of the difference and of ``change``, by way of small matrices."""
    a, b, near_a, near_b = (_rows(one) for one in (change.a, change.b, other.a, other.b))
    whole = _squared(a, b)
    if not change.rank or not other.rank:
        return Truncated(other, whole, whole)
    if change.rank != other.rank:
        # The difference is b.T @ a of both, one under the other. Its norm is that of the small matrix between two QRs,
        # which keeps the digits that a sum of squares would cancel.
        core = np.linalg.qr(np.concatenate([b, -near_b]).T).R @ np.linalg.qr(np.concatenate([a, near_a]).T).R.T
        return Truncated(other, float(np.vdot(core, core)), whole)
    # b'.T @ a' - b.T @ a, spelled so that small numbers come from small differences.
    return Truncated(other, _squared(np.concatenate([near_a - a, near_a]), np.concatenate([b, near_b - b])), whole)


def _squared(a: Array, b: Array) -> float:
    """The squared Frobenius norm of ``b.T @ a``."""
    return float(np.vdot(a @ a.T, b @ b.T))


def _rows(array: Array) -> Array:
    return array.reshape(len(array), math.prod(array.shape[1:])).astype(np.float64)


def _relative(done: Iterable[Truncated]) -> float:
    lost, whole = (sum(numbers) for numbers in zip(*((one.lost, one.whole) for one in done), strict=True))
    # Rounding may leave a norm of nothing below 0.
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 else 0.0
