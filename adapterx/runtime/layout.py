"""Layout: which graph inputs a bank feeds, and how the rows of each are divided."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (numpy knows the name "bfloat16" only after this import)
import numpy as np

from adapterx.adapter import PROMPT, Array, tensor_name
from adapterx.manifest import Manifest
from adapterx.site import VECTORS, AdapterSite, by_name


@dataclasses.dataclass(frozen=True, slots=True)
class BankInput:
    """One graph input, as a bank has it.

    Args:
        name: of the input
        is_vector: a row an adapter; else a row a rank
        members: how many sites a packed input stacks, else 1
        mixed: the members that adapters are copied to; the others' rows stay zeros
        width: dimensions after the rows
        dtype: element type
    """

    name: str
    is_vector: bool
    members: int
    mixed: tuple[int, ...]
    width: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row, of all members."""
        return self.members * math.prod(self.width) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Layout:
    """Every input of a bank.

    Args:
        inputs: in the order of the sites, packed ones last
        can_skip: a graph whose kernel skips what a mask leaves out skips it at every site: all are one ``LowRankAdd``
    """

    inputs: tuple[BankInput, ...]
    can_skip: bool

    @classmethod
    def of(cls, manifest: Manifest) -> Layout:
        """What the manifest says.

        A site that cannot be mixed has no rows in a bank: its mask is a constant 1, so that the adapter of one row
        would act on all. Where it shares a pack, or the rank of a pack, with sites that can, it has rows of zeros.
        """
        sites = by_name(manifest.sites)
        packed = {(site, pack.side): pack for pack in manifest.packs for site in pack.sites}
        held = _held(manifest)
        inputs = []
        for name in (name for name in sites if name in held):
            mixed = () if name in manifest.unmixed else (0,)
            for port in sites[name].graph_ports:
                if port != PROMPT and (name, port) not in packed:
                    inputs.append(_input(tensor_name(name, port), sites[name], port, members=1, mixed=mixed))
        for pack in manifest.packs:
            if held.intersection(pack.sites):
                own = tuple(i for i, name in enumerate(pack.sites) if name not in manifest.unmixed)
                first = sites[pack.sites[0]]
                inputs.append(_input(pack.name, first, pack.side, members=len(pack.sites), mixed=own))
        multiplied = all(sites[name].is_multiplied for name in held if PROMPT not in sites[name].ports)
        return cls(tuple(inputs), multiplied and not any(each.is_vector for each in inputs))

    @functools.cached_property
    def has_vectors(self) -> bool:
        """Whether any input has a row an adapter."""
        return any(each.is_vector for each in self.inputs)

    def nbytes(self, rows: int, count: int) -> int:
        """Bytes of a bank of ``rows`` rows a rank and ``count`` rows an adapter."""
        a_rank, an_adapter = self._row_nbytes
        return rows * a_rank + count * an_adapter

    def unbounded(self, arrays: Mapping[str, Array]) -> str | None:
        """The first input where an adapter has NaN or infinity, which times a mask of 0 is not 0."""
        given = ((each, arrays.get(each.name)) for each in self.inputs)
        return next(
            (each.name for each, array in given if array is not None and not np.isfinite(array).all()),
            None,
        )

    @functools.cached_property
    def _row_nbytes(self) -> tuple[int, int]:
        a_rank = sum(each.row_nbytes for each in self.inputs if not each.is_vector)
        return a_rank, sum(each.row_nbytes for each in self.inputs) - a_rank


def _held(manifest: Manifest) -> frozenset[str]:
    """Sites with rows in the bank: those that can be mixed, and those that packs tie to them."""
    held = {site.name for site in manifest.sites} - manifest.unmixed.keys()
    while True:
        tied = {name for pack in manifest.packs if held.intersection(pack.sites) for name in pack.sites}
        if tied <= held:
            return frozenset(held)
        held |= tied


def _input(name: str, site: AdapterSite, port: str, *, members: int, mixed: tuple[int, ...]) -> BankInput:
    return BankInput(name, port in VECTORS, members, mixed, site.width(port), np.dtype(site.dtype_of(port)))
