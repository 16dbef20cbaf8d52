"""Mixed batches: what is fed so that every row of a batch meets its own adapters.

Three plans: rows without adapters are the base, and nothing is fed; one adapter is fed as it is, with a mask only where
some rows have less than all of it; several lie side by side in the bank, and the mask picks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from adapterx.adapter import Array
from adapterx.errors import ModelError
from adapterx.manifest import Manifest
from adapterx.runtime.bank import AdapterBank, Lease
from adapterx.runtime.rows import Rows

Feeds = Mapping[str, Any]


def check_mixable(rows: Rows, manifest: Manifest) -> None:
    """Refuse rows that this model cannot tell apart.

    Raises:
        ModelError: says where, and why.
    """
    if rows.is_uniform and (rows.residents or not manifest.required):
        return
    if manifest.port == "external":
        raise ModelError(
            "the model's adapters are initializers, one for the whole batch; extract it with make_inputs=True to give "
            "rows different ones"
        )
    if not manifest.dynamic_rank and len(rows.residents) > 1:
        raise ModelError(
            "the model's ports have fixed ranks, so that one adapter fills them; extract it with dynamic_rank=True to "
            "give rows different ones"
        )
    for site in manifest.required:
        bare = np.flatnonzero(~rows.shares.any(axis=1))
        if len(bare):
            raise ModelError(f"row {bare[0]}: the model has no base at {site}, so that every row needs an adapter")
    touched = {site for resident in rows.residents if resident.adapter for site in resident.adapter.sites}
    for site, why in manifest.unmixed.items():
        if site in touched:
            others = sum(other in touched for other in manifest.unmixed) - 1
            more = f" (and {others} more such sites)" if others else ""
            raise ModelError(
                f"the rows of one batch cannot have different adapters at {site}{more}: {why}. "
                "Run rows of one adapter together with adapter="
            )


@contextlib.contextmanager
def mixed_feeds(rows: Rows, manifest: Manifest, bank: AdapterBank | None) -> Iterator[Feeds]:
    """The adapters' feeds for :class:`Rows` that :func:`check_mixable` let pass, valid inside the ``with`` block.

    Args:
        rows: at least one resident
        manifest: the model's
        bank: where adapters lie side by side
    """
    if len(rows.residents) == 1:
        yield {**rows.residents[0].tensors, **_one(rows.shares, manifest)}
        return
    assert bank is not None, "several adapters were let pass"
    with bank.lease(rows.residents) as lease:
        yield {**lease.tensors, **_many(rows, lease, manifest)}


def _one(shares: Array, manifest: Manifest) -> dict[str, Array]:
    """A column stands for all columns of the one adapter; its default is 1."""
    if (shares == 1).all():
        return {}
    return {name: shares for name in (manifest.mask, manifest.row_mask) if name}


def _many(rows: Rows, lease: Lease, manifest: Manifest) -> dict[str, Array]:
    masks = {}
    n = len(rows.shares)
    if manifest.mask:
        mask = masks[manifest.mask] = np.zeros((n, lease.rank), np.float32)
        for column, resident in enumerate(rows.residents):
            mask[:, lease.ranges[resident]] = rows.shares[:, column, None]
    if manifest.row_mask:
        row_mask = masks[manifest.row_mask] = np.zeros((n, lease.count), np.float32)
        for column, resident in enumerate(rows.residents):
            row_mask[:, lease.rows[resident]] = rows.shares[:, column]
    return masks
