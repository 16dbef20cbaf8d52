"""Adapters of fused layers over models that have them in parts, and the other way round: both exact.

Some checkpoints keep ``qkv_proj`` and ``gate_up_proj`` as one linear layer, and some exporters take it apart; others
keep the parts, and the genai builder fuses them. The rows of the fused weight are those of its parts, one after the
other. So the parts of a fused change share its ``a`` and cut its ``b``; the changes of parts lie side by side along
the rank, and the ``b`` of each is zero where the rows are another's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final, TypeVar

import numpy as np

from adapterx.adapter import ABSOLUTE, INPUT_GAIN, PARTS, WHOLE_WEIGHT, Array, LowRank
from adapterx.errors import MismatchError

T = TypeVar("T")

FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
# Parts of one width: with grouped-query attention, keys and values are narrower than queries, but alike.
_ALIKE: Final = (frozenset({"k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))


def fused_sites(sites: Mapping[str, T]) -> dict[str, tuple[T, ...]]:
    """Names of fused layers that a model has only in parts, with the parts in the order of the fused rows.

    Args:
        sites: the model's sites by name, or anything else that is by name

    Example:
        >>> fused_sites({"mlp.gate_proj": 1, "mlp.up_proj": 2})
        {'mlp.gate_up_proj': (1, 2)}
    """
    found: dict[str, tuple[T, ...]] = {}
    for name in sites:
        parent, dot, last = name.rpartition(".")
        for fused, parts in FUSED.items():
            members = [f"{parent}{dot}{part}" for part in parts]
            whole = f"{parent}{dot}{fused}"
            if last == parts[0] and whole not in sites and all(member in sites for member in members):
                found[whole] = tuple(sites[member] for member in members)
    return found


def split(low_rank: LowRank, widths: Iterable[int]) -> list[LowRank]:
    """The change of each part of a fused layer: one ``a`` for all, ``b`` cut by the parts' ``d_out``.

    Example:
        >>> import numpy as np
        >>> [part.d_out for part in split(LowRank(a=np.ones((2, 4)), b=np.ones((2, 5))), (3, 2))]
        [3, 2]
    """
    parts, start = [], 0
    for width in widths:
        columns = slice(start, start + width)
        cut = {name: _cut(name, part, columns) for name, part in low_rank.parts.items()}
        parts.append(LowRank(a=low_rank.a, b=low_rank.b[:, columns], parts=cut))
        start += width
    assert start == low_rank.d_out, "the caller checks that the parts' widths add up"
    return parts


def _cut(name: str, part: Array, columns: slice) -> Array:
    if name == INPUT_GAIN:
        return part
    return part[columns] if name == WHOLE_WEIGHT else part[:, columns]


def parts_of_fused(sites: Collection[str]) -> dict[str, str]:
    """Names of layers that a model has only fused: part -> the fused site.

    Args:
        sites: names of the model's sites

    Example:
        >>> parts_of_fused(["mlp.gate_up_proj"])
        {'mlp.gate_proj': 'mlp.gate_up_proj', 'mlp.up_proj': 'mlp.gate_up_proj'}
    """
    found: dict[str, str] = {}
    for name in sites:
        parent, dot, last = name.rpartition(".")
        members = [f"{parent}{dot}{part}" for part in FUSED.get(last, ())]
        if not any(member in sites for member in members):
            found.update(dict.fromkeys(members, name))
    return found


def joined(changes: Mapping[str, LowRank], fused: str, d_out: int) -> LowRank:
    """The change of a fused layer, of those of its parts. A part that is not given stays as it is.

    Args:
        changes: by the last part of their name, ``q_proj``
        fused: the last part of the fused layer's name, ``qkv_proj``
        d_out: features that the fused layer gives

    Raises:
        MismatchError: parts that do not add up to ``d_out``, that differ in ``d_in``, dtype or kind, or a part that
            replaces the base's own tensor while another part is not given.

    Example:
        >>> q = LowRank(a=np.ones((2, 4)), b=np.ones((2, 6)))
        >>> joined({"q_proj": q, "v_proj": LowRank(a=q.a, b=np.ones((2, 3)))}, "qkv_proj", 12).b.shape
        (2, 12)
    """
    widths = _widths({name: change.d_out for name, change in changes.items()}, fused, d_out)
    ends = np.cumsum(list(widths.values()))
    columns = {name: slice(end - widths[name], end) for name, end in zip(widths, ends, strict=True)}
    given = {name: changes[name] for name in widths if name in changes}
    first = next(iter(given.values()))
    for name, change in given.items():
        if change.dtype != first.dtype or (change.rank and first.rank and change.d_in != first.d_in):
            raise MismatchError(
                f"parts of {fused} must read one input in one dtype; {name} reads {change.d_in} in {change.dtype}, "
                f"{next(iter(given))} reads {first.d_in} in {first.dtype}"
            )
    # A fused adapter that was taken apart shares one `a`, and becomes again what it was.
    shared = all(np.array_equal(change.a, first.a) for change in given.values())
    rank = first.rank if shared else sum(change.rank for change in given.values())
    b, row = np.zeros((rank, d_out), first.dtype), 0
    for name, change in given.items():
        if change.rank:
            b[row : row + change.rank, columns[name]] = change.b
            row += 0 if shared else change.rank
    a = first.a if shared else np.concatenate([change.a for change in given.values() if change.rank])
    return LowRank(a=a, b=b, parts=_joined_parts(given, columns, d_out, fused))


def _widths(given: Mapping[str, int], fused: str, d_out: int) -> dict[str, int]:
    """Part -> width, in the order of the fused rows; of a part that is not given, by what is left for it."""
    widths = {name: given.get(name, 0) for name in FUSED[fused]}
    for group in _ALIKE:
        width = next((given[name] for name in widths if name in group and name in given), 0)
        widths |= {name: known or width for name, known in widths.items() if name in group}
    unknown = [name for name, width in widths.items() if not width]
    left = d_out - sum(widths.values())
    for name in unknown:
        widths[name] = left // len(unknown)
    if sum(widths.values()) != d_out or any(width <= 0 for width in widths.values()):
        told = ", ".join(f"{name} {width}" for name, width in given.items())
        raise MismatchError(f"widths of the parts must add up to {d_out}, those of {fused}; adapter has {told}")
    return widths


def _joined_parts(
    given: Mapping[str, LowRank], columns: Mapping[str, slice], d_out: int, fused: str
) -> dict[str, Array]:
    held = [name for name in PARTS if any(name in change.parts for change in given.values())]
    found: dict[str, Array] = {}
    for name in held:
        members = {part: change.parts[name] for part, change in given.items() if name in change.parts}
        first = next(iter(members.values()))
        everywhere = len(members) == len(columns)
        if name in ABSOLUTE and not everywhere:
            lacking = next(part for part in columns if part not in members)
            raise MismatchError(
                f"{name} replaces what the base has, so all of {fused} must have it; {lacking} has none"
            )
        if name == INPUT_GAIN:
            if not everywhere or not all(np.array_equal(first, other) for other in members.values()):
                raise MismatchError(
                    f"the parts of {fused} scale their one input differently, which a fused layer cannot"
                )
            found[name] = first
        elif name == WHOLE_WEIGHT:
            found[name] = np.concatenate([members[part] for part in columns])
        else:
            whole = np.zeros((len(first), d_out), first.dtype)
            for part, values in members.items():
                whole[:, columns[part]] = values
            found[name] = whole
    return found
