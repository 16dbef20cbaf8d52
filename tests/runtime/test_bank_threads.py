"""Many leases at once: what waits, what does not, and that no run sees anything change."""

import random
import threading
import time
from collections.abc import Mapping

import numpy as np
import pytest

from adapterx.runtime.bank import AdapterBank
from adapterx.runtime.resident import Resident
from tests.runtime.crowd import in_threads
from tests.runtime.tenants import assert_holds, copies, leased, manifest_of, numbers, shelf_nbytes, whole

PATIENCE = 10
MOMENT = 0.05


class Slow(Mapping):
    """Arrays that are read only when they may be, or break."""

    def __init__(self, arrays, *, error=None):
        self.arrays, self.error = arrays, error
        self.begun, self.go = threading.Event(), threading.Event()

    def get(self, name, default=None):
        self.begun.set()
        assert self.go.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        return self.arrays.get(name, default)

    def __getitem__(self, name):
        return self.get(name)

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self):
        return len(self.arrays)


def slowed(bank, one, **how):
    arrays = Slow(one.arrays, **how)
    slow = Resident(one.adapter, one.generation, {}, arrays, one.rank)
    # The copy shall be slow, not the look at the numbers before it.
    bank._finite.add(slow)
    return slow, arrays


def started(work):
    """A thread, and the list that gets its result or error."""
    results = []

    def run():
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("max_bytes", [None, 90_000])
def test_no_lease_among_thousands_sees_a_torn_adapter(exact, max_bytes):
    # Wide enough that numpy copies without the interpreter's lock.
    manifest = manifest_of(d=64)
    residents = [whole(manifest, number, rank, number=number) for number, rank in enumerate([1, 2, 4, 7, 3, 5] * 3, 1)]
    bank = AdapterBank(manifest, max_loras=5, max_bytes=max_bytes, exact=exact)
    leases, end = [0] * 6, time.monotonic() + 1.5

    def reader(index):
        rng = random.Random(index)
        while time.monotonic() < end:
            wanted = rng.sample(residents, rng.randint(1, 4))
            if rng.random() < 0.05:
                swapped = rng.randrange(len(residents))
                residents[swapped] = whole(manifest, swapped + 1, rng.randint(1, 7), number=swapped + 1)
            with bank.lease(wanted) as lease:
                arrays = {name: numbers(value) for name, value in lease.tensors.items()}
                before = None if exact else copies(lease)
                for _ in range(2):
                    for name, array in arrays.items():
                        rows = array.reshape(3 if "packed" in name else 1, -1, array.shape[-1])
                        for each, place in lease.ranges.items():
                            assert (rows[:, place] == each.generation).all(), f"{name}: another's numbers"
                    time.sleep(0)
                if before is not None:
                    for name, array in arrays.items():
                        np.testing.assert_array_equal(array, before[name])
            leases[index] += 1

    in_threads(reader, 6)
    assert sum(leases) > 200
    assert bank.stats.evictions > 50
    assert max_bytes is None or bank.nbytes <= max_bytes


@pytest.mark.parametrize("exact", [False, True])
def test_a_lease_without_room_waits_until_another_ends(exact):
    manifest = manifest_of()
    bank = AdapterBank(manifest, max_bytes=shelf_nbytes(manifest, 8), exact=exact)
    one, two = whole(manifest, 1, 8), whole(manifest, 2, 8)
    with bank.lease([one]) as lease:
        thread, results = started(lambda: leased(bank, two))
        thread.join(MOMENT)
        assert thread.is_alive()
        with bank.lease([one]) as again:
            assert again.tensors is lease.tensors
        assert_holds(lease, [one], manifest)
    thread.join(PATIENCE)
    assert list(results[0].ranges) == [two]


@pytest.mark.parametrize("exact", [False, True])
def test_who_needs_an_adapter_that_is_being_copied_waits_for_it(exact):
    manifest = manifest_of()
    bank = AdapterBank(manifest, exact=exact)
    one, arrays = slowed(bank, whole(manifest, 1, 4))
    first, results = started(lambda: leased(bank, one))
    assert arrays.begun.wait(PATIENCE)
    second, more = started(lambda: leased(bank, one))
    second.join(MOMENT)
    assert second.is_alive()
    arrays.go.set()
    for thread in (first, second):
        thread.join(PATIENCE)
    for lease in (*results, *more):
        assert_holds(lease, [one], manifest)
    assert (bank.stats.loads, bank.stats.hits) == (1, 1)


@pytest.mark.parametrize(("exact", "waits"), [(False, True), (True, False)])
def test_a_run_that_reads_every_row_waits_also_for_the_copies_of_others(exact, waits):
    manifest = manifest_of()
    bank = AdapterBank(manifest, exact=exact)
    ready, other = whole(manifest, 1, 4), whole(manifest, 3, 1)
    one, arrays = slowed(bank, whole(manifest, 2, 3))
    # All on one shelf, which has room for the slow one left.
    leased(bank, ready, other)
    first, _ = started(lambda: leased(bank, ready, one))
    assert arrays.begun.wait(PATIENCE)
    second, results = started(lambda: leased(bank, ready))
    second.join(MOMENT if waits else PATIENCE)
    assert second.is_alive() == waits
    arrays.go.set()
    for thread in (first, second):
        thread.join(PATIENCE)
    assert_holds(results[0], [ready], manifest)
    assert bank.stats.shelves == 1


@pytest.mark.parametrize("exact", [False, True])
def test_a_copy_that_fails_leaves_nothing_in_use(exact):
    manifest = manifest_of()
    bank = AdapterBank(manifest, exact=exact)
    good = whole(manifest, 1, 4)
    broken, arrays = slowed(bank, whole(manifest, 2, 4), error=MemoryError("no pages"))
    first, errors = started(lambda: leased(bank, good, broken))
    assert arrays.begun.wait(PATIENCE)
    second, more = started(lambda: leased(bank, broken, good))
    third, well = started(lambda: leased(bank, good))
    arrays.go.set()
    for thread in (first, second, third):
        thread.join(PATIENCE)
    assert all(isinstance(error, MemoryError) for error in (*errors, *more))
    assert_holds(well[0], [good], manifest)
    assert not any(shelf.pins for shelf in bank._shelves)
    arrays.error = None
    with bank.lease([broken, good]) as lease:
        held = copies(lease)
        place = lease.ranges[broken]
        np.testing.assert_array_equal(held["head.lora_A.weight"][place], broken.adapter.sites["head"].a)


def test_what_was_outgrown_counts_until_its_lease_ends():
    manifest = manifest_of()
    bank = AdapterBank(manifest, max_loras=3, max_bytes=shelf_nbytes(manifest, 32), exact=True)
    one, two, three, four, five = (whole(manifest, number, 8) for number in range(5))
    with bank.lease([one]):
        with bank.lease([two, three]) as grown, bank.lease([four]) as beside:
            assert (grown.rank, beside.tensors) == (24, grown.tensors)
            assert bank.nbytes == shelf_nbytes(manifest, 32)
            thread, results = started(lambda: leased(bank, five))
            thread.join(MOMENT)
            assert thread.is_alive()
        thread.join(PATIENCE)
    assert list(results[0].ranges) == [five]
