"""Adapter: named changes by site, immutable, known by the hash of their content."""

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
GAIN = "gain"
INPUT_GAIN = "input_gain"
SHIFT = "shift"
MAGNITUDE = "magnitude"
WHOLE_BIAS = "whole_bias"
WHOLE_WEIGHT = "whole_weight"
PROMPT = "prompt"

RELATIVE = (GAIN, INPUT_GAIN, SHIFT)
ABSOLUTE = (MAGNITUDE, WHOLE_BIAS, WHOLE_WEIGHT)
PARTS = (*RELATIVE, *ABSOLUTE, PROMPT)


_NO_PARTS: Mapping[str, Array] = MappingProxyType({})


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
    """What an adapter does at one site: the change ``b.T @ a`` of a weight (Hu et al., arXiv 2106.09685), and more.

    The scale (alpha / r) is already inside ``b``. Readers of adapter files fold it in once, at the door; nothing
    behind the door knows of it. What kinds other than plain LoRA need beside the two matrices lies in ``parts``, with
    the rows first, so that adapters can lie side by side in all of them::

        y = op(x * (1 + input_gain)) * (1 + gain) + shift + (x @ a.T) @ b

    Args:
        a: ``[r, d_in]``; of a convolution ``[r, c_in, *kernel]``; of an embedding ``[r, vocabulary]``
        b: ``[r, d_out]``
        parts: by name. Changes, zero being the base: ``gain`` ``[1, d_out]``, ``input_gain`` ``[1, d_in]``, ``shift``
            ``[1, d_out]``. What must meet a base weight first (:mod:`adapterx.kinds`): ``magnitude`` ``[1, d_out]`` of
            DoRA, ``whole_bias`` ``[1, d_out]`` and ``whole_weight`` ``[d_out, d_in]``, which stand in for the base's
            own. And ``prompt`` ``[tokens, width]``, which stands beside no weight. A site with parts only has
            matrices of no rows (and of no columns, where the file does not tell how many).

    Raises:
        MismatchError: ``a`` and ``b`` are not matrices that share ``r``, or differ in dtype; unknown parts.

    Example:
        >>> LowRank(a=np.ones((2, 4)), b=np.ones((2, 3))).rank
        2
    """

    a: Array
    b: Array
    parts: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.a.ndim < 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[0]:
            raise MismatchError(
                f"a and b must be matrices [r, d_in] and [r, d_out] of one rank; got {self.a.shape} and {self.b.shape}"
            )
        if self.a.dtype != self.b.dtype:
            raise MismatchError(f"a and b must share a dtype; got {self.a.dtype} and {self.b.dtype}")
        object.__setattr__(self, "a", frozen(self.a))
        object.__setattr__(self, "b", frozen(self.b))
        object.__setattr__(self, "parts", MappingProxyType(self._checked_parts()) if self.parts else _NO_PARTS)

    def _checked_parts(self) -> dict[str, Array]:
        unknown = [name for name in self.parts if name not in PARTS]
        if unknown:
            raise MismatchError(f"a site has no part {unknown[0]!r}; expected {', '.join(PARTS)}")
        rows = {name: part for name, part in self.parts.items() if name not in {WHOLE_WEIGHT, PROMPT}}
        for name, part in self.parts.items():
            if part.ndim != 2 or (name in rows and part.shape[0] != 1):
                raise MismatchError(f"{name} must be a matrix{' of one row' * (name in rows)}; got {part.shape}")
            if part.dtype != self.a.dtype:
                raise MismatchError(f"{name} must share the dtype of a and b, {self.a.dtype}; got {part.dtype}")
            width = self.a.shape[1] if name == INPUT_GAIN else self.b.shape[1]
            if width and name in rows and part.shape[1] != width:
                raise MismatchError(f"{name} must be [1, {width}] beside {self.a.shape} -> {width}; got {part.shape}")
        return {name: frozen(self.parts[name]) for name in PARTS if name in self.parts}

    @classmethod
    def of_parts(cls, parts: Mapping[str, Array]) -> LowRank:
        """A site that has no low-rank change.

        Example:
            >>> LowRank.of_parts({"gain": np.zeros((1, 3))}).rank
            0
        """
        first = next(iter(parts.values()))
        return cls(a=np.zeros((0, 0), first.dtype), b=np.zeros((0, 0), first.dtype), parts=parts)

    @property
    def rank(self) -> int:
        """``r``, the number of rows that ``a`` and ``b`` share."""
        return int(self.a.shape[0])

    @property
    def d_in(self) -> int:
        """Features (of a convolution channels, of an embedding words) that come in; 0 where parts do not tell."""
        return int(self.a.shape[1]) or self._width(INPUT_GAIN, WHOLE_WEIGHT)

    @property
    def d_out(self) -> int:
        """Features (of a convolution channels) that go out; 0 where parts do not tell."""
        whole = self.parts.get(WHOLE_WEIGHT)
        width = self._width(GAIN, SHIFT, MAGNITUDE, WHOLE_BIAS, PROMPT)
        return int(self.b.shape[1]) or (width if whole is None else int(whole.shape[0]))

    def _width(self, *names: str) -> int:
        return next((int(self.parts[name].shape[1]) for name in names if name in self.parts), 0)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of a convolution's kernel; empty for all else."""
        return tuple(int(size) for size in self.a.shape[2:])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The element type of all tensors (``ml_dtypes.bfloat16`` for bf16)."""
        return self.a.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.a.nbytes + self.b.nbytes + sum(part.nbytes for part in self.parts.values())

    @property
    def is_relative(self) -> bool:
        """Whether every tensor can be fed as it is, without a look at the base."""
        return not any(name in self.parts for name in ABSOLUTE)

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """Every tensor that has elements under the name of its side: ``lora_A``, ``lora_B``, then the parts."""
        if self.rank or not self.parts:
            yield LORA_A, self.a
            yield LORA_B, self.b
        yield from self.parts.items()


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """Changes by site; immutable. Two adapters are equal when their content is, wherever it came from.

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
            for side, array in low_rank.tensors():
                yield tensor_name(site, side), array

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
