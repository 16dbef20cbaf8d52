"""Shelf: one set of arrays of a fixed size, where adapters lie side by side."""

from __future__ import annotations

import bisect
import dataclasses
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal, TypeAlias

import numpy as np

from adapterx.adapter import Array
from adapterx.runtime.inference import ort, ort_values
from adapterx.runtime.layout import BankInput, Layout
from adapterx.runtime.resident import Resident

Key: TypeAlias = "weakref.ReferenceType[Resident]"

_LEAST: Final = 8
_ALIGNED: Final = 64


def size_class(rows: int) -> int:
    """The least of 8, 16, 24, 32, 48, 64, 96, 128 ... that is ``rows`` or more.

    Few sizes, so that what compiles for shapes compiles seldom; from 16 on at most a third is wasted.

    Example:
        >>> [size_class(rows) for rows in (0, 9, 17, 33, 65, 97)]
        [8, 16, 24, 48, 96, 128]
    """
    power = max(_LEAST, 1 << max(rows - 1, 0).bit_length())
    less = power * 3 // 4
    return less if less >= rows and less > 2 * _LEAST else power


@dataclasses.dataclass(slots=True, eq=False)
class Slot:
    """Where an adapter lies.

    Args:
        start: first row a rank
        stop: after the last
        row: its row among the rows an adapter
        pins: leases on it
        used: when it was leased last
        state: only what is ready holds the whole adapter
    """

    start: int
    stop: int
    row: int
    pins: int = 0
    used: int = 0
    state: Literal["filling", "ready", "failed"] = "filling"


class Shelf:
    """Arrays that never change their size or place, and the OrtValues over them.

    The bookkeeping (:meth:`reserve` and all that reads ``slots``) is for the holder of the bank's lock;
    :meth:`fill` writes into slots that were reserved, outside of it.

    Args:
        layout: the inputs
        rows: of each input that has a row a rank (of each member of a packed one)
        count: of each that has a row an adapter, and the most slots
        device: where the OrtValues lie; elsewhere than on the CPU they are copies, made anew by :meth:`publish`
    """

    def __init__(self, layout: Layout, *, rows: int, count: int, device: tuple[str, int] = ("cpu", 0)) -> None:
        self.layout, self.rows, self.count, self._device = layout, rows, count, device
        self.arrays = _arrays(layout, rows, count)
        self._views = [(each, _by_member(self.arrays[each.name], each)) for each in layout.inputs]
        self.tensors: Mapping[str, ort.OrtValue] = ort_values(self.arrays) if device[0] == "cpu" else {}
        self.slots: dict[Key, Slot] = {}
        self.pins = self.used = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, and of their copies on a device."""
        return self.layout.nbytes(self.rows, self.count) * (1 if self._device[0] == "cpu" else 2)

    def overlap(self, residents: Iterable[Resident]) -> int:
        """Rows and slots of ``residents`` that need not be copied."""
        return sum(resident.rank + 1 for resident in residents if weakref.ref(resident) in self.slots)

    def live(self) -> list[Slot]:
        """Slots of residents that somebody still has."""
        return [slot for key, slot in self.slots.items() if slot.pins or key() is not None]

    def reserve(self, residents: Sequence[Resident], *, evict: bool) -> int | None:
        """Give every resident a slot; those that lie here keep theirs.

        Args:
            residents: all that shall lie here together
            evict: whether others may go that are not pinned, the least recently used first

        Returns:
            How many went, or ``None`` when there is no room; then nothing has changed.
        """
        kept = {weakref.ref(resident) for resident in residents}
        slots = {key: slot for key, slot in self.slots.items() if slot.pins or key() is not None}
        placed = self._placed(residents, slots, kept, evict=evict)
        if placed is None and evict and not self.pins:
            # In pieces there is no room: begin anew.
            placed = self._placed(residents, {}, kept, evict=evict)
        if placed is None:
            return None
        gone = len(slots.keys() - placed.keys())
        self.slots = placed
        return gone

    def _placed(
        self, residents: Iterable[Resident], slots: Mapping[Key, Slot], kept: set[Key], *, evict: bool
    ) -> dict[Key, Slot] | None:
        placed = dict(slots)
        missing = [resident for resident in residents if weakref.ref(resident) not in placed]
        for resident in sorted(missing, key=lambda each: -each.rank):
            movable = {key for key, slot in placed.items() if evict and not slot.pins and key not in kept}
            found = _room(placed, movable, size=resident.rank, rows=self.rows)
            if found is None:
                return None
            start, gone = found
            if not gone and len(placed) >= self.count:
                if not movable:
                    return None
                gone = [min(movable, key=lambda key: placed[key].used)]
            for key in gone:
                del placed[key]
            row = min(set(range(self.count)) - {slot.row for slot in placed.values()})
            placed[weakref.ref(resident)] = Slot(start, start + resident.rank, row)
        return placed

    def fill(self, resident: Resident, slot: Slot) -> None:
        """Copy an adapter into its slot; what it does not have becomes zeros."""
        for each, view in self._views:
            rows = view[:, slot.row : slot.row + 1] if each.is_vector else view[:, slot.start : slot.stop]
            _copy(resident.arrays.get(each.name), rows, each)

    def publish(self) -> None:
        """Bring what was filled to the device. What runs there keeps the copy that it has."""
        if self._device[0] != "cpu":
            self.tensors = ort_values(self.arrays, device=self._device)


def _room(placed: Mapping[Key, Slot], movable: set[Key], *, size: int, rows: int) -> tuple[int, list[Key]] | None:
    """Where ``size`` rows can begin, and who must go for it: nobody, or those whose last use lies furthest back.

    Of several places that are free, the smallest.
    """
    if not size:
        return 0, []
    ordered = sorted((slot.start, slot.stop, key) for key, slot in placed.items() if slot.stop > slot.start)
    starts, stops = [start for start, _, _ in ordered], [stop for _, stop, _ in ordered]
    best: tuple[tuple[int, int], int, list[Key]] | None = None
    for begin in sorted({0, *starts, *stops}):
        end = begin + size
        if end > rows:
            break
        first, after = bisect.bisect_right(stops, begin), bisect.bisect_left(starts, end)
        gone = [key for _, _, key in ordered[first:after]]
        if movable.issuperset(gone):
            free_until = starts[after] if after < len(starts) else rows
            cost = (max((placed[key].used for key in gone), default=-1), free_until - end)
            if best is None or cost < best[0]:
                best = cost, begin, gone
    return None if best is None else best[1:]


def _arrays(layout: Layout, rows: int, count: int) -> dict[str, Array]:
    """All inputs in one piece of zeros, each on the boundary of a cache line."""
    shapes = {each: (each.members * (count if each.is_vector else rows), *each.width) for each in layout.inputs}
    sizes = {each: math.prod(shape) * each.dtype.itemsize for each, shape in shapes.items()}
    memory = np.zeros(sum(size + _ALIGNED for size in sizes.values()) + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    arrays = {}
    for each, shape in shapes.items():
        arrays[each.name] = memory[start : start + sizes[each]].view(each.dtype).reshape(shape)
        start += -(-sizes[each] // _ALIGNED) * _ALIGNED
    return arrays


def _by_member(array: Array, each: BankInput) -> Array:
    return array.reshape(each.members, len(array) // each.members, *each.width)


def _copy(given: Array | None, rows: Array, each: BankInput) -> None:
    """``rows`` is ``[members, r, *width]``."""
    if not each.mixed:
        return
    if given is None:
        rows[list(each.mixed)] = 0
        return
    source = _by_member(given, each)
    least = source.shape[1]
    assert least <= rows.shape[1], f"{each.name} has {least} rows, and the slot {rows.shape[1]}"
    if len(each.mixed) == each.members:
        np.copyto(rows[:, :least], source, casting="no")
        rows[:, least:] = 0
    else:
        for member in each.mixed:
            np.copyto(rows[member, :least], source[member], casting="no")
            rows[member, least:] = 0
