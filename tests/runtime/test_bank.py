"""Adapters side by side: what a lease holds, what goes for what comes, and within which limits."""

import gc
import random
import weakref
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterx.errors import OptionError, UnsupportedAdapter
from adapterx.runtime import shelf as shelf_module
from adapterx.runtime.bank import AdapterBank
from adapterx.runtime.inference import ort, ort_values
from adapterx.runtime.resident import Resident
from tests.runtime.tenants import assert_holds, copies, leased, manifest_of, numbers, resident, shelf_nbytes, whole


def assert_unchanged(lease, before, *, exact):
    for name, value in lease.tensors.items():
        now = numbers(value)
        if not exact:
            np.testing.assert_array_equal(now, before[name], err_msg=name)
            continue
        members = 3 if "packed" in name else 1
        now, was = (each.reshape(members, -1, each.shape[-1]) for each in (now, before[name]))
        for place in lease.ranges.values():
            np.testing.assert_array_equal(now[:, place], was[:, place], err_msg=name)


# What a lease holds


SETS = st.lists(st.integers(0, 9), max_size=5, unique=True)
STEPS = st.lists(st.one_of(SETS, st.integers(0, 3), st.just("replace")), max_size=25)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@given(steps=STEPS, seed=st.integers(0, 1 << 30))
def test_leases_hold_exactly_their_adapters_and_keep_them_to_the_end(steps, seed, vectors, exact, dtype):
    manifest = manifest_of(vectors=vectors, unmixed=["l.1.q"] if seed % 2 else [], dtype=dtype)
    rng = random.Random(seed)
    names = [site.name for site in manifest.sites if site.name not in manifest.unmixed]

    def new(number):
        chosen = rng.sample(names, rng.randint(1, len(names)))
        return resident(manifest, number, {name: rng.randint(0, 6) for name in chosen})

    residents = [new(number) for number in range(10)]
    bank = AdapterBank(manifest, max_loras=6, exact=exact)
    assert bank.exact == (exact and not vectors)
    held = []
    for number, step in enumerate(steps, 10):
        if step == "replace":
            residents[rng.randrange(10)] = new(number)
        elif isinstance(step, int):
            if step < len(held):
                held.pop(step)[0].close()
        else:
            stack, wanted = ExitStack(), [residents[index] for index in step]
            lease = stack.enter_context(bank.lease(wanted))
            assert_holds(lease, wanted, manifest)
            held.append((stack, lease, copies(lease)))
        for _, lease, before in held:
            assert_unchanged(lease, before, exact=bank.exact)
    for stack, lease, _ in held:
        assert_holds(lease, lease.ranges, manifest)
        stack.close()
    assert not any(shelf.pins for shelf in bank._shelves)
    assert not any(slot.pins for shelf in bank._shelves for slot in shelf.slots.values())
    assert not bank._outgrown


# What lies where


def test_an_adapter_that_lies_there_is_not_copied_again():
    manifest = manifest_of()
    one, two, three = (whole(manifest, number, 4) for number in range(3))
    bank = AdapterBank(manifest)
    first, again = leased(bank, one, two), leased(bank, two, one)
    assert first.ranges == again.ranges
    assert first.tensors is again.tensors
    assert (bank.stats.loads, bank.stats.hits) == (2, 2)
    with bank.lease([three, two]) as lease:
        # Sixteen rows would have held all three, but four and four need eight.
        assert lease.rank == 8
    assert (bank.stats.loads, bank.stats.hits, bank.stats.evictions) == (3, 3, 1)


def test_a_batch_reads_about_the_rows_that_it_uses():
    manifest = manifest_of()
    many = [whole(manifest, number, 8) for number in range(8)]
    bank = AdapterBank(manifest)
    assert leased(bank, *many).rank == 64
    assert leased(bank, many[0]).rank == 8
    assert leased(bank, *many[:2]).rank == 16
    assert leased(bank, many[1]).rank == 16, "it lies there already, and twice the rows cost less than a copy"


def test_shelves_grow_in_place_of_one_another_where_rows_are_skipped():
    manifest = manifest_of()
    residents = [whole(manifest, number, 8) for number in range(6)]
    bank = AdapterBank(manifest, max_loras=4, exact=True)
    ranks = []
    for each in 3 * residents:
        ranks.append(leased(bank, each).rank)
        assert bank.stats.shelves == 1
    assert ranks == sorted(ranks)
    assert set(ranks) == {8, 16, 24, 32}
    loads = bank.stats.loads
    assert leased(bank, *residents[2:]).rank == 32
    assert bank.stats.loads == loads


def test_a_lease_that_was_outgrown_is_kept_until_it_ends():
    manifest = manifest_of()
    one, two = (whole(manifest, number, 8) for number in range(2))
    bank = AdapterBank(manifest, exact=True)
    with bank.lease([one]) as old:
        with bank.lease([two, one]) as new:
            assert new.tensors is not old.tensors
            assert bank.stats.shelves == 2
            assert_holds(old, [one], manifest)
            assert_holds(new, [two, one], manifest)
        assert leased(bank, one).tensors is new.tensors
    assert bank.stats.shelves == 1


def test_rows_of_a_shelf_in_use_are_filled_where_its_graph_skips_them():
    manifest = manifest_of()
    residents = [whole(manifest, number, 4) for number in range(3)]
    bank = AdapterBank(manifest, exact=True)
    leased(bank, *residents[:2])
    del residents[0]
    gc.collect()
    with bank.lease(residents[:1]) as one, bank.lease(residents[1:]) as other:
        assert one.tensors is other.tensors
        assert_holds(one, residents[:1], manifest)
        assert_holds(other, residents[1:], manifest)


def test_the_same_adapter_twice_is_one():
    manifest = manifest_of()
    one = whole(manifest, 1, 4)
    assert list(leased(AdapterBank(manifest, max_loras=1), one, one).ranges) == [one]


def test_no_adapters_are_a_lease_too():
    lease = leased(AdapterBank(manifest_of()))
    assert lease.rank == 8
    assert not lease.ranges


@pytest.mark.parametrize("exact", [False, True])
def test_a_bank_keeps_no_adapter_alive_and_its_room_is_free(exact):
    manifest = manifest_of()
    one, other = whole(manifest, 1, 8), whole(manifest, 2, 8)
    bank = AdapterBank(manifest, exact=exact)
    leased(bank, one)
    watched = weakref.ref(one), weakref.ref(one.arrays["head.lora_A.weight"])
    del one
    gc.collect()
    assert [each() for each in watched] == [None, None]
    leased(bank, other)
    assert (bank.stats.evictions, bank.stats.shelves) == (0, 1)


@pytest.mark.parametrize("exact", [False, True])
def test_what_replaces_an_adapter_is_never_taken_for_it(exact):
    manifest = manifest_of()
    bank = AdapterBank(manifest, exact=exact)
    old = whole(manifest, 1, 4)
    leased(bank, old)
    new = whole(manifest, 2, 4)
    new = Resident(new.adapter, old.generation, {}, new.arrays, new.rank)
    with bank.lease([new]) as lease:
        assert_holds(lease, [new], manifest)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_an_adapter_that_is_not_finite_never_lies_where_rows_of_others_would_read_it(dtype):
    manifest = manifest_of(dtype=dtype)
    good = whole(manifest, 1, 4)
    name = "head.lora_scale.weight" if dtype == "int8" else "head.lora_B.weight"
    spoilt = good.arrays[name].copy()
    spoilt[1, 0] = np.nan
    bad = Resident(good.adapter, 2, {}, {**good.arrays, name: spoilt}, good.rank)
    bank = AdapterBank(manifest)
    with pytest.raises(UnsupportedAdapter, match=rf"an adapter has NaN or infinity in '{name}', .* with adapter="):
        leased(bank, good, bad)
    assert bank.stats.loads == 0
    leased(bank, good)
    exact = AdapterBank(manifest, exact=True)
    with exact.lease([good, bad]) as lease:
        assert np.isnan(numbers(lease.tensors[name])[lease.ranges[bad]].astype(np.float32)).any()


# Limits


def test_more_adapters_than_the_limit_are_refused_by_number():
    manifest = manifest_of()
    bank = AdapterBank(manifest, max_loras=2)
    with pytest.raises(OptionError, match="3 different adapters, and max_loras is 2"):
        leased(bank, *(whole(manifest, number, 1) for number in range(3)))
    assert bank.stats.shelves == 0


def test_adapters_that_never_fit_are_refused_with_the_bytes_that_would_do():
    manifest = manifest_of()
    residents = [whole(manifest, number, 5) for number in range(2)]
    need = AdapterBank(manifest)
    leased(need, *residents)
    with pytest.raises(OptionError, match=rf"need {need.nbytes:,} bytes .* max_bank_bytes is {need.nbytes - 1:,}"):
        leased(AdapterBank(manifest, max_bytes=need.nbytes - 1), *residents)
    leased(AdapterBank(manifest, max_bytes=need.nbytes), *residents)


@pytest.mark.parametrize("limits", [{"max_loras": 0}, {"max_bytes": 0}])
def test_limits_below_one_are_refused(limits):
    with pytest.raises(OptionError, match="must be 1 or more; got 0"):
        AdapterBank(manifest_of(), **limits)


@pytest.mark.parametrize("exact", [False, True])
def test_the_budget_holds_and_shelves_that_nobody_uses_go_first(exact):
    manifest = manifest_of()
    budget = shelf_nbytes(manifest, 24)
    bank = AdapterBank(manifest, max_bytes=budget, exact=exact)
    small, large = whole(manifest, 1, 8), whole(manifest, 2, 16)
    huge = whole(manifest, 3, 24)
    for each in (small, large, small, huge, large):
        with bank.lease([each]) as lease:
            assert_holds(lease, [each], manifest)
        assert bank.nbytes <= budget


# Devices


def test_on_a_device_runs_in_flight_keep_the_copy_that_they_have(monkeypatch):
    def copied(arrays, *, device=("cpu", 0)):
        assert device in {("cpu", 0), ("far", 1)}
        return ort_values({name: array.copy() if device[0] == "far" else array for name, array in arrays.items()})

    monkeypatch.setattr(shelf_module, "ort_values", copied)
    manifest = manifest_of()
    one, two = whole(manifest, 1, 8), whole(manifest, 2, 8)
    bank = AdapterBank(manifest, device=("far", 1), exact=True)
    assert not bank.exact
    with bank.lease([one]) as lease:
        assert_holds(lease, [one], manifest)
        assert bank.nbytes == 2 * shelf_nbytes(manifest, 8)
    again = leased(bank, one)
    assert again.tensors is lease.tensors
    with bank.lease([two]) as other:
        assert bank.stats.shelves == 1
        assert_holds(other, [two], manifest)
        assert_holds(lease, [one], manifest)


@pytest.mark.parametrize("exact", [False, True])
def test_onnx_runtime_reads_a_lease_where_it_lies(exact):
    manifest = manifest_of()
    residents = [whole(manifest, number, 4) for number in range(3)]
    bank = AdapterBank(manifest, exact=exact)
    with bank.lease(residents) as lease:
        for name, value in lease.tensors.items():
            assert isinstance(value, ort.OrtValue)
            assert value.data_ptr() == bank._shelves[0].arrays[name].ctypes.data


def test_what_did_not_get_to_a_device_is_copied_again(monkeypatch):
    broken = []

    def copied(arrays, *, device=("cpu", 0)):
        if broken:
            raise MemoryError(broken.pop())
        return ort_values({name: array.copy() for name, array in arrays.items()})

    monkeypatch.setattr(shelf_module, "ort_values", copied)
    manifest = manifest_of()
    residents = [whole(manifest, number, 4) for number in range(2)]
    bank = AdapterBank(manifest, device="far")
    broken.append("no room there")
    with pytest.raises(MemoryError, match="no room there"):
        leased(bank, *residents)
    with bank.lease(residents) as lease:
        assert_holds(lease, residents, manifest)
