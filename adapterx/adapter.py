"""Adapter: named low-rank changes by site, immutable, known by the hash of their content."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapterx.errors import FormatError, MismatchError

Array = NDArray[Any]

LORA_A = "lora_A"
LORA_B = "lora_B"


def tensor_name(site: str, side: str) -> str:
    """The one spelling of a tensor's name in files and of a port's name in graphs.

    Example:
        >>> tensor_name("model.layers.0.self_attn.q_proj", LORA_A)
        'model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    return f"{site}.{side}.weight"


def frozen(array: Array) -> Array:
    """``array`` as a C-contiguous, aligned, native-endian, read-only array.

    A writable array is copied, since its owner could still change it; a read-only one that is already in
    order (the readers make such) is taken as it is.
    """
    flags = array.flags
    if flags.c_contiguous and flags.aligned and not flags.writeable and array.dtype.isnative:
        # Files hold hundreds of tensors, and this is most of them.
        return array
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    in_order = np.require(np.asarray(array), requirements=["C", "ALIGNED"])
    if in_order.flags.writeable and (in_order is array or in_order.base is not None):
        in_order = in_order.copy()
    in_order.flags.writeable = False
    return in_order


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The change ``b.T @ a`` that an adapter makes to one linear weight (Hu et al., arXiv 2106.09685).

    The scale (alpha / r) is already inside ``b``. Readers of adapter files fold it in once, at the door; nothing
    behind the door knows of it.

    Args:
        a: ``[r, d_in]``
        b: ``[r, d_out]``

    Raises:
        MismatchError: ``a`` and ``b`` are not matrices that share ``r``, or differ in dtype.

    Example:
        >>> LowRank(a=np.ones((2, 4)), b=np.ones((2, 3))).rank
        2
    """

    a: Array
    b: Array

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[0]:
            raise MismatchError(
                f"a and b must be matrices [r, d_in] and [r, d_out] of one rank; got {self.a.shape} and {self.b.shape}"
            )
        if self.a.dtype != self.b.dtype:
            raise MismatchError(f"a and b must share a dtype; got {self.a.dtype} and {self.b.dtype}")
        object.__setattr__(self, "a", frozen(self.a))
        object.__setattr__(self, "b", frozen(self.b))

    @property
    def rank(self) -> int:
        """``r``, the number of rows that ``a`` and ``b`` share."""
        return int(self.a.shape[0])

    @property
    def d_in(self) -> int:
        """Features that come in."""
        return int(self.a.shape[1])

    @property
    def d_out(self) -> int:
        """Features that go out."""
        return int(self.b.shape[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type of both matrices (``ml_dtypes.bfloat16`` for bf16)."""
        return self.a.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return self.a.nbytes + self.b.nbytes


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank changes by site; immutable. Two adapters are equal when their content is, wherever it came from.

    Args:
        sites: module path of the source checkpoint (``model.layers.0.self_attn.q_proj``) -> :class:`LowRank`.
            Kept in sorted order, so that order in a file means nothing.
        metadata: where it came from (``source``, ``format``, ``base_model``, ``base_fingerprint`` where known).
            Not part of the content: it changes neither hash nor equality.

    Raises:
        FormatError: no sites at all.

    Example:
        >>> one = Adapter({"fc": LowRank(a=np.ones((2, 4)), b=np.ones((2, 3)))})
        >>> one.ranks, one == Adapter(dict(one.sites), {"source": "elsewhere"})
        ((2,), True)
    """

    sites: Mapping[str, LowRank]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sites:
            raise FormatError("an adapter needs at least one site; got none")
        ordered = {name: self.sites[name] for name in sorted(self.sites)}
        object.__setattr__(self, "sites", MappingProxyType(ordered))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 (hex) over names, dtypes, shapes and bytes in sorted order. Computed once, on first use."""
        digest = hashlib.sha256()
        for name, array in self.tensors():
            digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
            digest.update(array.reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Every tensor under its file name (``<site>.lora_A.weight`` ...), in sorted site order."""
        for site, low_rank in self.sites.items():
            yield tensor_name(site, LORA_A), low_rank.a
            yield tensor_name(site, LORA_B), low_rank.b

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({low_rank.rank for low_rank in self.sites.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(low_rank.nbytes for low_rank in self.sites.values())

    def __eq__(self, other: object) -> bool:
        return self.content_hash == other.content_hash if isinstance(other, Adapter) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.content_hash)

    def __repr__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"<Adapter {len(self.sites)} sites, rank {ranks}, {self.nbytes:,} bytes>"
