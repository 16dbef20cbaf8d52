"""AdapterBank: the adapters of a batch side by side in a few arrays, which no run ever sees change."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence

from adapterx.errors import OptionError, UnsupportedAdapter
from adapterx.manifest import Manifest
from adapterx.runtime.inference import ort
from adapterx.runtime.layout import Layout
from adapterx.runtime.resident import Resident
from adapterx.runtime.shelf import Shelf, Slot, size_class


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Lease:
    """What a run feeds for several adapters; good until it is given back.

    Args:
        tensors: every input of the bank: ``[rank, ...]``, packed ones ``[members * rank, ...]``, vectors ``[count, d]``
        rank: columns of ``adapter_mask``
        count: columns of ``adapter_row_mask``
        ranges: where an adapter's columns of ``adapter_mask`` lie
        rows: its column of ``adapter_row_mask``
    """

    tensors: Mapping[str, ort.OrtValue]
    rank: int
    count: int
    ranges: Mapping[Resident, slice]
    rows: Mapping[Resident, int]


@dataclasses.dataclass(frozen=True, slots=True)
class BankStats:
    """Counts since the bank was made.

    Args:
        hits: adapters of leases that lay there already
        loads: adapters that were copied in
        evictions: adapters that made room for others
        shelves: sets of arrays held now
    """

    hits: int
    loads: int
    evictions: int
    shelves: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Claim:
    """Slots that a lease has pinned, and those among them that it has to fill."""

    shelf: Shelf
    slots: Mapping[Resident, Slot]
    missing: Sequence[Resident]


class AdapterBank:
    """Adapters side by side along the rank axis, mixed ranks without padding. Safe to use from many threads.

    Its arrays come in sets of few fixed sizes (shelves), so that a batch pays for about what it uses and nothing
    recompiles. Putting an adapter in is copying its bytes, outside of any lock; an adapter that lies there is found by
    its :class:`Resident`, never by a name or number. Residents are not kept alive: what nobody has is free room.

    What a run may read is never written. Standard operators read every row, so a shelf with any lease on it stays as
    it is, and another set of adapters gets another shelf. A graph that reads nothing that its mask leaves out
    (``exact``) lets others fill rows of the same shelf meanwhile.

    Args:
        manifest: the model's
        max_loras: most adapters in one lease, and on one shelf of an exact bank
        max_bytes: most bytes of all shelves; a lease that finds no room waits for others to end
        device: name, or name and number, as ``OrtValue`` spells them. Elsewhere than on the CPU, shelves are staging
            memory on the host, copied whole when they change
        exact: our kernel runs every linear site. Ignored where the manifest has sites that it does not run
            (convolutions, embeddings, gains and shifts), and on devices

    Raises:
        OptionError: limits below 1.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        max_loras: int = 32,
        max_bytes: int | None = None,
        device: str | tuple[str, int] = "cpu",
        exact: bool = False,
    ) -> None:
        for option, limit in (("max_loras", max_loras), ("max_bank_bytes", max_bytes)):
            if limit is not None and limit < 1:
                raise OptionError(f"{option} must be 1 or more; got {limit}")
        self._layout = Layout.of(manifest)
        self._max_loras, self._max_bytes = max_loras, max_bytes
        self._device = (device, 0) if isinstance(device, str) else device
        self.exact = exact and self._layout.can_skip and self._device[0] == "cpu"
        self._shelves: list[Shelf] = []
        self._outgrown: list[Shelf] = []
        self._changed = threading.Condition(threading.Lock())
        self._clock = itertools.count(1)
        self._finite: weakref.WeakSet[Resident] = weakref.WeakSet()
        self._hits = self._loads = self._evictions = 0

    @contextlib.contextmanager
    def lease(self, residents: Iterable[Resident]) -> Iterator[Lease]:
        """Have adapters in the bank while a run needs them.

        Waits while others pin all the room that ``max_bytes`` leaves. A thread that takes a second lease inside of a
        first can so wait for itself.

        Args:
            residents: the adapters of one batch; the same one twice counts once

        Raises:
            OptionError: more adapters than ``max_loras``, or than ever fit into ``max_bytes``.
            UnsupportedAdapter: one that is not finite, in a bank that is not exact: its NaN would reach every row.
        """
        wanted = tuple(dict.fromkeys(residents))
        self._check(wanted)
        claim = self._ready(wanted)
        try:
            ranges = {resident: slice(slot.start, slot.stop) for resident, slot in claim.slots.items()}
            rows = {resident: slot.row for resident, slot in claim.slots.items()}
            yield Lease(claim.shelf.tensors, claim.shelf.rows, claim.shelf.count, ranges, rows)
        finally:
            with self._changed:
                self._release(claim)

    @property
    def nbytes(self) -> int:
        """Bytes of all shelves."""
        return sum(shelf.nbytes for shelf in (*self._shelves, *self._outgrown))

    @property
    def stats(self) -> BankStats:
        """Counts, for those who watch."""
        return BankStats(self._hits, self._loads, self._evictions, len(self._shelves) + len(self._outgrown))

    def _check(self, wanted: Sequence[Resident]) -> None:
        if len(wanted) > self._max_loras:
            raise OptionError(
                f"one batch has {len(wanted)} different adapters, and max_loras is {self._max_loras}; raise it, or "
                "split the batch"
            )
        need = self._nbytes(*self._size(wanted))
        if self._max_bytes is not None and need > self._max_bytes:
            rank = sum(resident.rank for resident in wanted)
            raise OptionError(
                f"{len(wanted)} adapters with {rank} ranks need {need:,} bytes of the bank, and max_bank_bytes is "
                f"{self._max_bytes:,}; raise it, or split the batch"
            )

        for resident in () if self.exact else wanted:
            self._check_finite(resident)

    def _check_finite(self, resident: Resident) -> None:
        """Looked at once a resident, since it costs as much as the copy."""
        if resident in self._finite:
            return
        place = self._layout.unbounded(resident.arrays)
        if place is not None:
            source = resident.adapter.metadata.get("source", "") if resident.adapter else ""
            raise UnsupportedAdapter(
                f"an adapter{source and f' from {source}'} has NaN or infinity in {place!r}, which standard operators "
                "would carry into every row of the batch; run it by itself with adapter=, or with the compiled kernels"
            )
        with self._changed:
            self._finite.add(resident)

    def _size(self, wanted: Sequence[Resident], more: int = 0) -> tuple[int, int]:
        """Rows and count of the smallest shelf for ``wanted`` and ``more`` rows."""
        count = size_class(len(wanted)) if self._layout.has_vectors else self._max_loras
        return size_class(sum(resident.rank for resident in wanted) + more), count

    def _nbytes(self, rows: int, count: int) -> int:
        return self._layout.nbytes(rows, count) * (1 if self._device[0] == "cpu" else 2)

    def _ready(self, wanted: Sequence[Resident]) -> _Claim:
        """Pinned slots that hold the adapters whole."""
        while True:
            claim = self._claim(wanted)
            try:
                self._fill(claim)
                if self._settled(claim):
                    return claim
            except BaseException:
                with self._changed:
                    for resident in claim.missing:
                        self._discard(claim, resident)
                    self._release(claim)
                raise
            with self._changed:
                # Whoever was filling a slot of ours has failed.
                self._release(claim)

    def _claim(self, wanted: Sequence[Resident]) -> _Claim:
        with self._changed:
            while (shelf := self._shelf(wanted)) is None:
                self._changed.wait()
            slots = {resident: shelf.slots[weakref.ref(resident)] for resident in wanted}
            missing = [resident for resident, slot in slots.items() if not slot.used]
            shelf.used, shelf.pins = next(self._clock), shelf.pins + 1
            for slot in slots.values():
                slot.used, slot.pins = shelf.used, slot.pins + 1
            self._hits += len(wanted) - len(missing)
            return _Claim(shelf, slots, missing)

    def _fill(self, claim: _Claim) -> None:
        for resident in claim.missing:
            claim.shelf.fill(resident, claim.slots[resident])
            if self.exact:
                self._finish(claim, [resident])
        if claim.missing and not self.exact:
            # Nobody reads a slot before its neighbours are whole, nor before the device has all of them.
            claim.shelf.publish()
            self._finish(claim, claim.missing)

    def _finish(self, claim: _Claim, residents: Sequence[Resident]) -> None:
        with self._changed:
            for resident in residents:
                claim.slots[resident].state = "ready"
            self._loads += len(residents)
            self._changed.notify_all()

    def _settled(self, claim: _Claim) -> bool:
        """Wait until nobody fills what the claim may read; whether all of its slots are ready."""
        with self._changed:
            while any(slot.state == "filling" for slot in self._read(claim)):
                self._changed.wait()
            return all(slot.state == "ready" for slot in claim.slots.values())

    def _read(self, claim: _Claim) -> Iterable[Slot]:
        return claim.slots.values() if self.exact else claim.shelf.slots.values()

    def _discard(self, claim: _Claim, resident: Resident) -> None:
        slot, key = claim.slots[resident], weakref.ref(resident)
        if slot.state == "filling":
            slot.state = "failed"
            if claim.shelf.slots.get(key) is slot:
                del claim.shelf.slots[key]

    def _release(self, claim: _Claim) -> None:
        claim.shelf.pins -= 1
        for slot in claim.slots.values():
            slot.pins -= 1
        self._outgrown = [shelf for shelf in self._outgrown if shelf.pins]
        self._changed.notify_all()

    def _shelf(self, wanted: Sequence[Resident]) -> Shelf | None:
        """A shelf with slots for all of ``wanted``, or ``None`` when everything is pinned."""
        rows, count = self._size(wanted)
        whole = sum(resident.rank + 1 for resident in wanted)
        holding = [shelf for shelf in self._shelves if shelf.overlap(wanted) == whole]
        if not self.exact:
            # A row that is there is a row that is read.
            holding = [shelf for shelf in holding if shelf.rows <= 2 * rows]
        if holding:
            return min(holding, key=lambda shelf: shelf.rows)
        for shelf in self._candidates(wanted):
            if self._reserved(shelf, wanted, evict=not self.exact):
                return shelf
        if self.exact and (grown := self._grown(wanted)):
            return grown
        for shelf in self._shelves if self.exact else ():
            if self._reserved(shelf, wanted, evict=True):
                return shelf
        return self._new(wanted, rows, count)

    def _candidates(self, wanted: Sequence[Resident]) -> list[Shelf]:
        usable = self._shelves
        if not self.exact:
            size = self._size(wanted)
            usable = [shelf for shelf in usable if not shelf.pins and (shelf.rows, shelf.count) == size]
        return sorted(usable, key=lambda shelf: -shelf.overlap(wanted))

    def _reserved(self, shelf: Shelf, wanted: Sequence[Resident], *, evict: bool) -> bool:
        gone = shelf.reserve(wanted, evict=evict)
        self._evictions += gone or 0
        return gone is not None

    def _grown(self, wanted: Sequence[Resident]) -> Shelf | None:
        """In place of the largest shelf, a larger one that has room for its adapters too."""
        if not self._shelves:
            return None
        old = max(self._shelves, key=lambda shelf: shelf.rows)
        here = {weakref.ref(resident) for resident in wanted}
        others = [slot for key, slot in old.slots.items() if key() is not None and key not in here]
        rows, count = self._size(wanted, more=sum(slot.stop - slot.start for slot in others))
        if rows <= old.rows or len(others) + len(wanted) > self._max_loras:
            return None
        new = self._new(wanted, rows, count)
        if new is not None and old in self._shelves:
            self._shelves.remove(old)
            if old.pins:
                self._outgrown.append(old)
        return new

    def _new(self, wanted: Sequence[Resident], rows: int, count: int) -> Shelf | None:
        if not self._made_room(self._nbytes(rows, count)):
            return None
        shelf = Shelf(self._layout, rows=rows, count=count, device=self._device)
        self._shelves.append(shelf)
        has_room = self._reserved(shelf, wanted, evict=True)
        assert has_room, "a shelf has room for what it was made for"
        return shelf

    def _made_room(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more fit, once shelves are gone that nobody uses, the least recently used first."""
        if self._max_bytes is None:
            return True
        pinned = sum(shelf.nbytes for shelf in (*self._shelves, *self._outgrown) if shelf.pins)
        if pinned + nbytes > self._max_bytes:
            return False
        while self.nbytes + nbytes > self._max_bytes:
            self._shelves.remove(min((s for s in self._shelves if not s.pins), key=lambda shelf: shelf.used))
        return True
