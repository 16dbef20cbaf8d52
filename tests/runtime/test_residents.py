"""Which adapters lie in memory: the least recently used go into files, and nobody who runs them notices."""

import gc
import weakref

import numpy as np
import pytest

from adapterx.errors import OptionError, UnknownAdapter
from adapterx.runtime.resident import Resident
from adapterx.runtime.residents import Residents
from tests.runtime.chain import adapter_of


class Arrays:
    """Stands for a model whose ports are the adapter's own tensors."""

    def resident(self, adapter, generation):
        return Resident(adapter, generation, {}, dict(adapter.tensors()), rank=max(adapter.ranks))

    def values(self, arrays):
        return dict.fromkeys(arrays)

    def session(self, resident):
        raise AssertionError("nobody runs here")


def held(**limits):
    return Residents(Arrays(), max_loras=limits.get("max_loras"), max_bytes=limits.get("max_bytes"))


def in_file(resident):
    array = next(iter(resident.arrays.values()))
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, memoryview)


def names_in_memory(residents):
    return {name for name, resident in residents.held.items() if not in_file(resident)}


def test_without_limits_all_stay_in_memory():
    residents = held()
    for i in range(5):
        residents.load(f"a{i}", adapter_of(i))
    assert names_in_memory(residents) == {f"a{i}" for i in range(5)}
    assert residents.nbytes == sum(adapter_of(i).nbytes for i in range(5))


def test_the_least_recently_used_goes_into_a_file_first():
    residents = held(max_loras=2)
    residents.load("old", adapter_of(1))
    residents.load("new", adapter_of(2))
    residents.used([residents.find("old")])
    residents.load("newest", adapter_of(3))
    assert names_in_memory(residents) == {"old", "newest"}
    assert list(residents.held) == ["old", "new", "newest"]


def test_bytes_are_limited_too():
    size = adapter_of(1).nbytes
    residents = held(max_bytes=2 * size + 1)
    for i in range(4):
        residents.load(f"a{i}", adapter_of(i))
    assert names_in_memory(residents) == {"a2", "a3"}
    assert residents.nbytes == 2 * size


def test_what_lies_in_a_file_is_the_same_adapter_of_the_same_generation():
    residents = held(max_loras=0)
    residents.load("it", adapter_of(1))
    found = residents.find("it")
    assert in_file(found)
    assert found.adapter == adapter_of(1)
    assert found.generation == 1
    for name, array in adapter_of(1).tensors():
        np.testing.assert_array_equal(found.arrays[name], array)


def test_memory_is_given_back_when_an_adapter_goes_into_a_file():
    residents = held(max_loras=1)
    residents.load("first", adapter_of(1))
    gone = weakref.ref(residents.find("first"))
    residents.load("second", adapter_of(2))
    gc.collect()
    assert gone() is None


def test_one_of_a_name_replaces_the_other_and_counts_once():
    residents = held(max_loras=2)
    for seed in range(4):
        residents.load("it", adapter_of(seed))
    residents.load("other", adapter_of(9))
    assert names_in_memory(residents) == {"it", "other"}
    residents.unload("it")
    residents.load("third", adapter_of(8))
    assert names_in_memory(residents) == {"other", "third"}
    with pytest.raises(UnknownAdapter, match="no adapter 'it' is loaded; loaded: other, third"):
        residents.find("it")


def test_generations_never_repeat():
    residents = held()
    seen = []
    for seed in range(3):
        residents.load("it", adapter_of(seed))
        seen.append(residents.find("it").generation)
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("option", ["max_cpu_loras", "max_cpu_bytes"])
def test_limits_below_zero_are_refused(option):
    with pytest.raises(OptionError, match=f"{option} must be 0 or more, or None; got -1"):
        held(**{"max_loras" if option.endswith("loras") else "max_bytes": -1})
