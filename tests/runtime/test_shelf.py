"""One set of arrays: sizes, places, copies."""

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterx.adapter import Adapter, LowRank
from adapterx.manifest import Manifest
from adapterx.runtime.layout import Layout
from adapterx.runtime.resident import Resident
from adapterx.runtime.shelf import Shelf, size_class
from adapterx.site import AdapterSite, SiteTable
from tests.runtime.tenants import manifest_of, resident, whole


def shelf_of(manifest, rows=16, count=8):
    return Shelf(Layout.of(manifest), rows=rows, count=count)


def bare(rank):
    return Resident(None, 0, {}, {}, rank)


def put(shelf, *residents, evict=False):
    """Reserve and use, as a lease does that is given back at once; the moments of use count up."""
    gone = shelf.reserve(residents, evict=evict)
    if gone is not None:
        put.clock += 1
        for each in residents:
            shelf.slots[weakref.ref(each)].used = put.clock
    return gone


put.clock = 0


def place(shelf, each):
    slot = shelf.slots[weakref.ref(each)]
    return slot.start, slot.stop


@given(st.integers(0, 5000))
def test_a_size_holds_what_is_asked_for_and_wastes_at_most_a_third(rows):
    size = size_class(rows)
    assert rows <= size
    assert rows <= 16 or size - rows <= size / 3


def test_sizes_are_few():
    assert len({size_class(rows) for rows in range(4097)}) == 18


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int8"])
def test_ort_values_are_the_arrays_themselves(dtype):
    shelf = shelf_of(manifest_of(vectors=True, dtype=dtype))
    assert shelf.tensors.keys() == shelf.arrays.keys()
    for name, value in shelf.tensors.items():
        assert value.data_ptr() == shelf.arrays[name].ctypes.data
        assert value.data_ptr() % 64 == 0
        assert tuple(value.shape()) == shelf.arrays[name].shape
    assert shelf.nbytes == sum(array.nbytes for array in shelf.arrays.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_filled_slot_has_the_bytes_of_its_adapter_and_zeros_where_that_has_nothing(dtype):
    manifest = manifest_of(vectors=True, dtype=dtype)
    shelf = shelf_of(manifest)
    for array in shelf.arrays.values():
        array[...] = 7
    one = resident(manifest, 1, {"l.0.q": 2, "l.2.q": 3, "l.0.o": 4, "norm": 0})
    assert one.rank == 4
    shelf.reserve([bare(5), one], evict=False)
    slot = shelf.slots[weakref.ref(one)]
    shelf.fill(one, slot)
    held = one.adapter.sites
    packed = shelf.arrays["q.lora_A.weight.packed"].reshape(3, 16, 8)[:, slot.start : slot.stop]
    np.testing.assert_array_equal(packed[0, :2], held["l.0.q"].a)
    np.testing.assert_array_equal(packed[2, :3], held["l.2.q"].a)
    assert not packed[0, 2:].any()
    assert not packed[1].any()
    assert not packed[2, 3:].any()
    np.testing.assert_array_equal(shelf.arrays["l.0.o.lora_B.weight"][slot.start : slot.stop], held["l.0.o"].b)
    assert not shelf.arrays["head.lora_A.weight"][slot.start : slot.stop].any()
    np.testing.assert_array_equal(shelf.arrays["norm.gain.weight"][slot.row], held["norm"].parts["gain"][0])
    assert not shelf.arrays["head.gain.weight"][slot.row].any()
    for name, array in shelf.arrays.items():
        rows = np.moveaxis(array.reshape(3 if "packed" in name else 1, -1, array.shape[-1]), 1, 0)
        own = [slot.row] if "gain" in name else range(slot.start, slot.stop)
        assert (np.delete(rows, own, axis=0) == 7).all(), f"{name}: rows of others were written"


def test_the_rows_of_a_member_that_cannot_be_mixed_stay_zeros_and_a_plain_site_gets_none():
    everything = whole(manifest_of(), 1, 4)
    shelf = shelf_of(manifest_of(unmixed=["l.1.q", "head"]))
    assert not [name for name in shelf.arrays if name.startswith("head.")]
    shelf.reserve([everything], evict=False)
    shelf.fill(everything, shelf.slots[weakref.ref(everything)])
    members = shelf.arrays["q.lora_B.weight.packed"].reshape(3, 16, 10)
    assert members[0].any()
    assert not members[1].any()
    assert members[2].any()


def test_a_site_that_packs_tie_to_mixed_ones_has_rows_of_zeros():
    both = manifest_of()
    manifest = Manifest(
        both.sites, "packed", True, True, "", packs=both.packs[:1], unmixed={"l.1.q": "its rows are shuffled"}
    )
    shelf = shelf_of(manifest)
    everything = whole(both, 1, 4)
    plain = resident(manifest, 1, {"l.0.q": 4})
    shelf.reserve([plain, everything], evict=False)
    for each in (plain, everything):
        shelf.fill(each, shelf.slots[weakref.ref(each)])
    assert shelf.arrays["l.0.q.lora_B.weight"].any()
    assert shelf.arrays["l.1.q.lora_B.weight"].shape == (16, 10)
    assert not shelf.arrays["l.1.q.lora_B.weight"].any()


def test_mixed_ranks_lie_without_gaps():
    shelf = shelf_of(manifest_of(), rows=24)
    residents = [bare(rank) for rank in (3, 8, 1, 5, 7)]
    assert shelf.reserve(residents, evict=False) == 0
    assert sorted(row for each in residents for row in range(*place(shelf, each))) == list(range(24))


def test_of_free_places_the_smallest_is_taken():
    shelf = shelf_of(manifest_of(), rows=16)
    first, second, third = (bare(rank) for rank in (4, 8, 2))
    for each in (first, second, third):
        put(shelf, each)
    del first
    gc.collect()
    two = bare(2)
    assert put(shelf, two) == 0
    assert place(shelf, two) == (14, 16)


def test_who_was_used_longest_ago_makes_room_and_none_that_is_pinned():
    shelf = shelf_of(manifest_of(), rows=16)
    residents = [bare(4) for _ in range(4)]
    for each in residents:
        put(shelf, each)
    put(shelf, residents[0])
    shelf.slots[weakref.ref(residents[1])].pins = shelf.pins = 1
    new = bare(4)
    assert put(shelf, new) is None
    assert put(shelf, new, evict=True) == 1
    assert weakref.ref(residents[2]) not in shelf.slots
    assert place(shelf, new) == (8, 12)
    wide = bare(8)
    assert put(shelf, wide, evict=True) == 2
    assert weakref.ref(residents[1]) in shelf.slots
    assert place(shelf, wide) == (8, 16)
    assert put(shelf, bare(12), evict=True) is None


def test_room_in_pieces_is_joined_when_nothing_is_pinned():
    shelf = shelf_of(manifest_of(), rows=16)
    residents = [bare(4) for _ in range(4)]
    for each in residents:
        put(shelf, each)
    kept, wide = residents[1], bare(12)
    assert put(shelf, kept, wide, evict=True) == 3
    assert place(shelf, wide) == (0, 12)
    assert place(shelf, kept) == (12, 16)


def test_a_shelf_without_room_is_left_as_it_is():
    shelf = shelf_of(manifest_of(), rows=8)
    held = bare(6)
    put(shelf, held)
    shelf.slots[weakref.ref(held)].pins = shelf.pins = 1
    before = dict(shelf.slots)
    assert shelf.reserve([bare(2), bare(1)], evict=True) is None
    assert shelf.slots == before


def test_slots_are_counted_also_where_ranks_are_none():
    shelf = shelf_of(manifest_of(vectors=True), rows=8, count=2)
    residents = [bare(0) for _ in range(3)]
    put(shelf, residents[0])
    put(shelf, residents[1])
    assert put(shelf, residents[2]) is None
    assert put(shelf, residents[2], evict=True) == 1
    assert {slot.row for slot in shelf.slots.values()} == {0, 1}
    assert weakref.ref(residents[1]) in shelf.slots


def test_a_shelf_keeps_no_resident_alive_and_its_room_is_free():
    shelf = shelf_of(manifest_of(), rows=8)
    held = bare(8)
    put(shelf, held)
    del held
    gc.collect()
    assert put(shelf, bare(8)) == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.lists(st.integers(0, 11), max_size=4)), max_size=40), st.booleans())
def test_places_never_overlap_whatever_comes_and_goes(steps, evict):
    ranks = (0, 1, 2, 3, 5, 8, 1, 2, 4, 7, 16, 6)
    residents = [bare(rank) for rank in ranks]
    shelf = shelf_of(Manifest(SiteTable(), "input", True, True, ""), rows=16, count=5)
    for step, chosen in steps:
        wanted = list(dict.fromkeys(residents[index] for index in chosen))
        pinned = {key: place(shelf, key()) for key, slot in shelf.slots.items() if slot.pins}
        gone = put(shelf, *wanted, evict=evict)
        for key, was in pinned.items():
            assert place(shelf, key()) == was
        if gone is not None:
            assert all(weakref.ref(each) in shelf.slots for each in wanted)
        elif not pinned and evict:
            assert sum(each.rank for each in wanted) > 16
        taken = [row for slot in shelf.slots.values() for row in range(slot.start, slot.stop)]
        assert len(taken) == len(set(taken))
        assert all(0 <= row < 16 for row in taken)
        rows = [slot.row for slot in shelf.slots.values()]
        assert len(rows) == len(set(rows)) <= 5
        for index, slot in enumerate(shelf.slots.values()):
            slot.pins = int(index == step)
        shelf.pins = sum(slot.pins for slot in shelf.slots.values())


@pytest.mark.parametrize(
    ("op", "kernel", "ports", "skips"),
    [
        ("MatMul", (), ("lora_A", "lora_B"), True),
        ("Conv", (3, 3), ("lora_A", "lora_B"), False),
        ("Gather", (), ("lora_A", "lora_B"), False),
        ("MatMul", (), ("lora_A", "lora_B", "gain"), False),
    ],
)
def test_only_plain_linear_sites_can_skip_what_a_mask_leaves_out(op, kernel, ports, skips):
    place = AdapterSite("s", "", "lora", op, 4, 3, 2, 1.0, "float32", "initializer", "s", kernel=kernel, ports=ports)
    manifest = Manifest(SiteTable([place]), "input", True, True, "")
    assert Layout.of(manifest).can_skip == skips
    a = np.ones((2, 4, *kernel), np.float32)
    adapter = Adapter({"s": LowRank(a=a, b=np.ones((2, 3), np.float32))})
    one = Resident(adapter, 1, {}, {"s.lora_A.weight": a}, 2)
    shelf = shelf_of(manifest)
    shelf.reserve([bare(1), one], evict=False)
    slot = shelf.slots[weakref.ref(one)]
    shelf.fill(one, slot)
    np.testing.assert_array_equal(shelf.arrays["s.lora_A.weight"][slot.start : slot.stop], a)
