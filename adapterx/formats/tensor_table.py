"""TensorTable: named tensors as a file holds them, and the one way from there to an adapter's sites.

Every format comes through :func:`low_ranks`, so that a fault is found, and named, the same way in each.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import numpy as np

from adapterx.adapter import LORA_A, LORA_B, PARTS, PROMPT, WHOLE_WEIGHT, Array, LowRank, frozen, tensor_name
from adapterx.faults import Faults
from adapterx.formats.dtypes import BY_DTYPE, NAMES
from adapterx.formats.finite import all_finite, count_nonfinite
from adapterx.limits import Limits

Nonfinite = Literal["refuse", "allow"]

# ``rank_first``: a [r, d_in], b [r, d_out], for certain.  ``by_shape``: that, or a [d_in, r], b [r, d_out] as
# other tools write it.  ``peft``: a [r, d_in], b [d_out, r], the scale not yet inside b.
Layout = Literal["rank_first", "by_shape", "peft"]
Scale = Callable[[str, int], float]

# Exporters name the node after the module (`lora_A.MatMul`), PEFT's raw state the adapter (`lora_A.default`).
_OTHER_NAME = re.compile(r"(?P<site>.+)\.(?P<side>lora_[AB])\.(?:MatMul|default)\.weight")
_ENDINGS = (tensor_name("", LORA_A), tensor_name("", LORA_B))
_PART_ENDINGS = {tensor_name("", part): part for part in PARTS}
PREFIX = "base_model.model."

_ADVICE = "Nothing was loaded. Export or convert the adapter again."


@dataclasses.dataclass(frozen=True, slots=True)
class TensorTable:
    """Tensors by name, read from one file whose structure is already known to be sound.

    Args:
        where: the file, for messages
        arrays: read-only tensors by the name that the file gives them
        metadata: what the file says about itself
        layout: how its matrices lie
        finite: every value has been seen to be finite already
    """

    where: str
    arrays: Mapping[str, Array]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layout: Layout = "by_shape"
    finite: bool = False


class _Pair(NamedTuple):
    """The two tensors of a site, and the names that the file gives them."""

    a_name: str
    a: Array
    b_name: str
    b: Array

    @property
    def shapes(self) -> str:
        return f"{LORA_A} is {self.a.shape}, {LORA_B} is {self.b.shape}"


def low_ranks(
    table: TensorTable, limits: Limits, *, nonfinite: Nonfinite = "refuse", scale: Scale | None = None
) -> dict[str, LowRank]:
    """The sites of a table.

    Args:
        table: tensors named ``<site>.lora_A.weight`` and ``<site>.lora_B.weight``, and parts (``<site>.gain.weight``)
        limits: names, number, rank and dimensions are checked against them
        nonfinite: ``"allow"`` lets NaN and infinity pass
        scale: factor for ``b`` by site and rank, folded in fp32 and then rounded to the tensor's own type; its
            ValueErrors become faults of the site

    Raises:
        FormatError: no tensors, a name or type or shape that no adapter has, half pairs, ranks that differ, values
            that are not finite (also after scaling): all of them in one message.
    """
    faults = Faults(table.where)
    if not table.arrays:
        faults.add("tensors", "there are none")
    if len(table.arrays) > limits.tensors:
        faults.add("tensors", f"{len(table.arrays)} of them, at most {limits.tensors} are read")
        faults.refuse("this adapter cannot be loaded", advice=_ADVICE)
    pairs, parts = _paired(table, limits, faults)
    if not table.finite and nonfinite == "refuse":
        refuse_nonfinite(table.arrays, faults)
    layout = _layout_of(pairs, table.layout)
    turned: dict[str, tuple[Array, Array]] = {}
    for site, pair in pairs.items():
        if not _fits(pair, layout):
            faults.add(site, _misfit(pair, layout))
            continue
        turned[site] = a, b = _turned(pair, layout)
        if len(a) > limits.rank:
            faults.add(site, f"its rank is {len(a)}, expected 1 to {limits.rank}")
        elif scale is not None:
            try:
                turned[site] = a, _scaled(b, scale(site, len(a)), faults, site)
            except ValueError as cause:
                faults.add(site, str(cause))
    faults.refuse("this adapter cannot be loaded", advice=_ADVICE)
    sites = {site: LowRank(a=a, b=b, parts=parts.pop(site, {})) for site, (a, b) in turned.items()}
    return sites | {site: LowRank.of_parts(alone) for site, alone in parts.items()}


def as_peft_writes(arrays: Mapping[str, Array]) -> bool:
    """Whether these are tensors as PEFT saves them: by the prefix of their names, unless the shapes say otherwise.

    Other tools keep PEFT's prefix for some models, and yet turn the matrices and fold the scale in.
    """
    prefixed = [name for name in arrays if name.startswith(PREFIX)]
    for name in prefixed:
        other = arrays.get(name.replace(f".{LORA_A}.", f".{LORA_B}."))
        if f".{LORA_A}." in name and other is not None and arrays[name].ndim == other.ndim == 2:
            pair = _Pair(name, arrays[name], name, other)
            return _fits(pair, "peft") or not (_fits(pair, "by_shape") or _fits(pair, "rank_first"))
    return bool(prefixed)


def tensors_to_write(sites: Mapping[str, LowRank], where: str) -> Iterator[tuple[str, Array]]:
    """An adapter's tensors by file name, once it is certain that a file can hold them all.

    Raises:
        FormatError: an element type that no format here holds, or a rank of 0.
    """
    faults = Faults(where)
    for site, low_rank in sites.items():
        if low_rank.dtype not in BY_DTYPE:
            faults.add(site, f"its element type is {low_rank.dtype}, files hold {NAMES}; cast it first")
        if any(not array.size for _, array in low_rank.tensors()):
            faults.add(site, f"it has no elements: a is {low_rank.a.shape}, b is {low_rank.b.shape}")
        if _place(tensor_name(site, LORA_A)) != (site, LORA_A) or not site.isprintable():
            faults.add(site, "a file would not give this name back")
    faults.refuse("this adapter cannot be written", advice="Nothing was written.")
    for site, low_rank in sites.items():
        for side, array in low_rank.tensors():
            yield tensor_name(site, side), array


_Parts = dict[str, dict[str, Array]]


def _paired(table: TensorTable, limits: Limits, faults: Faults) -> tuple[dict[str, _Pair], _Parts]:
    """Complete pairs by site, and parts by site; whatever is neither becomes a fault."""
    parts: _Parts = {}
    halves: dict[str, dict[str, str]] = {LORA_A: {}, LORA_B: {}}
    for name, array in table.arrays.items():
        place = _place(name)
        cause = name_fault(name, limits)
        part = next((part for ending, part in _PART_ENDINGS.items() if name.endswith(ending)), "")
        if part and not cause and (site := name.removesuffix(tensor_name("", part)).removeprefix(PREFIX)):
            cause = _tensor_fault(array, 2) or _part_fault(part, array)
            parts.setdefault(site, {})[part] = array
        elif place is None:
            cause = cause or f"unknown kind of tensor, expected names that end in {' or '.join(_ENDINGS)}"
        elif not cause:
            other = halves[place[1]].setdefault(place[0], name)
            most = limits.ndim if place[1] == LORA_A else 2
            cause = _tensor_fault(array, most) if other is name else f"{other} stands for the same matrix"
        if cause:
            faults.add(name, cause)
    pairs = {}
    for site, a_name in halves[LORA_A].items():
        b_name = halves[LORA_B].pop(site, None)
        if b_name is None:
            faults.add(a_name, f"its other half, {tensor_name(site, LORA_B)}, is missing")
            continue
        pair = _Pair(a_name, table.arrays[a_name], b_name, table.arrays[b_name])
        if pair.a.dtype is not pair.b.dtype and pair.a.dtype != pair.b.dtype:
            faults.add(a_name, f"its element type is {pair.a.dtype}, that of {b_name} is {pair.b.dtype}")
        # What is no matrix has been told already.
        elif pair.a.ndim >= 2 and pair.b.ndim == 2:
            pairs[site] = pair
    for site, b_name in halves[LORA_B].items():
        faults.add(b_name, f"its other half, {tensor_name(site, LORA_A)}, is missing")
    for site, alone in parts.items():
        dtypes = {array.dtype for array in alone.values()} | ({pairs[site].a.dtype} if site in pairs else set())
        if len(dtypes) > 1:
            faults.add(site, f"its tensors have several element types: {', '.join(sorted(map(str, dtypes)))}")
    return pairs, parts


def _part_fault(part: str, array: Array) -> str:
    if part in {WHOLE_WEIGHT, PROMPT} or len(array) == 1:
        return ""
    return f"expected one row, its shape is {array.shape}"


def _place(name: str) -> tuple[str, str] | None:
    """Site and side that a tensor's name speaks of."""
    if name.endswith(_ENDINGS) and len(name) > len(_ENDINGS[0]):
        site, side = name[: -len(_ENDINGS[0])], name[-len("lora_A.weight") : -len(".weight")]
    elif match := _OTHER_NAME.fullmatch(name):
        site, side = match["site"], match["side"]
    else:
        return None
    return site.removeprefix(PREFIX), side


def name_fault(name: str, limits: Limits) -> str:
    """Why a tensor cannot have this name, ``""`` when it can."""
    # No character has over 4 bytes in UTF-8.
    if 4 * len(name) > limits.name_bytes < len(name.encode("utf-8", "surrogatepass")):
        return f"the name has over {limits.name_bytes} bytes"
    return "" if name.isprintable() else "the name has characters that cannot be seen"


def _tensor_fault(array: Array, most: int) -> str:
    if not 2 <= array.ndim <= most:
        return f"expected a matrix, its shape is {array.shape}"
    if not array.size:
        return f"it has no elements, its shape is {array.shape}"
    if array.dtype not in BY_DTYPE and array.dtype.newbyteorder("=") not in BY_DTYPE:
        return f"its element type is {array.dtype}, expected one of {NAMES}; cast it before"
    return ""


def refuse_nonfinite(arrays: Mapping[str, Array], faults: Faults) -> None:
    """Add a fault for each tensor with values that are NaN or infinite."""
    for name, array in arrays.items():
        if array.dtype.newbyteorder("=") in BY_DTYPE and not all_finite(array.astype(array.dtype.newbyteorder("="))):
            faults.add(name, f"{count_nonfinite(array)} of {array.size} values are NaN or infinite")


def _layout_of(pairs: Mapping[str, _Pair], layout: Layout) -> Layout:
    """The file's one layout, since one file is written by one tool: turned only when some sites fit no other way.

    And when none needs the rank first, lest a broken site among sound ones turns them all.
    """
    if layout != "by_shape":
        return layout
    fits = [(_fits(pair, "rank_first"), _fits(pair, "by_shape")) for pair in pairs.values()]
    return "by_shape" if (False, True) in fits and (True, False) not in fits else "rank_first"


def _fits(pair: _Pair, layout: Layout) -> bool:
    (a0, a1, *kernel), (b0, b1) = pair.a.shape, pair.b.shape
    if layout == "rank_first":
        return bool(a0 == b0)
    if layout == "peft":
        return bool(a0 == b1)
    return bool(a1 == b0 and a1 <= min(a0, b1) and not kernel)


def _turned(pair: _Pair, layout: Layout) -> tuple[Array, Array]:
    """``a [r, d_in]`` and ``b [r, d_out]``, as views."""
    a, b = pair.a, pair.b
    if layout == "rank_first":
        return a, b
    return (a, b.T) if layout == "peft" else (a.T, b)


def _misfit(pair: _Pair, layout: Layout) -> str:
    if layout == "peft":
        return f"the ranks differ, expected [r, d_in] and [d_out, r]; {pair.shapes}"
    if _fits(pair, "peft"):
        return (
            f"the ranks agree only as PEFT's [r, d_in] and [d_out, r], whose scale is not known here; {pair.shapes}; "
            "pass the PEFT folder with adapter_config.json"
        )
    if _fits(pair, "by_shape"):
        return f"it fits only as [d_in, r] and [r, d_out], which this file does not use; {pair.shapes}"
    return f"the ranks differ, expected [r, d_in] and [r, d_out]; {pair.shapes}"


def _scaled(b: Array, scale: float, faults: Faults, site: str) -> Array:
    """``b * scale`` as a new read-only array; half types would lose bits were they multiplied as they are."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = np.multiply(b, np.float32(scale), dtype=np.float32, casting="unsafe", order="C")
        scaled = wide.astype(b.dtype, copy=False)
    if not all_finite(scaled) and (broken := count_nonfinite(scaled) - count_nonfinite(b)) > 0:
        faults.add(site, f"{broken} values of {LORA_B} overflow {b.dtype} when the scale {scale:g} is folded in")
    scaled.flags.writeable = False
    return frozen(scaled)
