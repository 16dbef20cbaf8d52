"""Truncation: the nearest change of a smaller rank, without ever forming the matrix ``[d_out, d_in]``."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable

import numpy as np

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import OptionError
from adapterx.kinds.lora import cast
from adapterx.progress import progress

# In the metadata of a truncated adapter: the error of the whole, and a JSON object of the errors by site.
ERROR = "truncation_error"
ERRORS = "truncation_errors"


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
    a, b = change.a.reshape(change.rank, -1).astype(np.float64), change.b.astype(np.float64)
    if change.rank <= rank:
        return Truncated(change, 0.0, float(np.vdot(a @ a.T, b @ b.T)))
    (q_in, r_in), (q_out, r_out) = np.linalg.qr(a.T), np.linalg.qr(b.T)
    u, values, v = np.linalg.svd(r_out @ r_in.T, full_matrices=False)
    root = np.sqrt(values[:rank])[:, None]
    near_a = (root * (v[:rank] @ q_in.T)).reshape(-1, *change.a.shape[1:])
    near_b = root * (u[:, :rank].T @ q_out.T)
    near = LowRank(a=cast(near_a, change.dtype, "a"), b=cast(near_b, change.dtype, "b"), parts=change.parts)
    squares = values * values
    return Truncated(near, float(squares[rank:].sum()), float(squares.sum()))


def truncated_adapter(adapter: Adapter, rank: int) -> Adapter:
    """Every site of ``adapter`` at ``rank`` or less, and what that costs.

    Args:
        adapter: any
        rank: the most that a site keeps, at least 1

    Returns:
        The adapter with two more metadata: ``truncation_error``, the Frobenius norm of all that is gone relative to
        all that was there, and ``truncation_errors``, a JSON object of the same for each site.

    Raises:
        OptionError: no such rank.
        ValueError: a value overflows its element type.
    """
    if type(rank) is not int or rank < 1:
        raise OptionError(f"rank={rank!r} is no rank; expected a whole number of at least 1")
    done: dict[str, Truncated] = {}
    with progress("truncating", adapter.nbytes) as advance:
        for site, change in adapter.sites.items():
            done[site] = truncated(change, rank)
            advance(change.nbytes)
    errors = {site: round(_relative([one]), 9) for site, one in done.items()}
    told = {ERROR: f"{_relative(done.values()):.9g}", ERRORS: json.dumps(errors, separators=(",", ":"))}
    return Adapter({site: one.change for site, one in done.items()}, {**adapter.metadata, **told})


def _relative(done: Iterable[Truncated]) -> float:
    lost, whole = (sum(numbers) for numbers in zip(*((one.lost, one.whole) for one in done), strict=True))
    return math.sqrt(lost / whole) if whole else 0.0
