"""Adapters as pages of a file: the same bytes, written once, and gone with the last reader."""

import gc
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import OptionError
from adapterx.runtime import mapped as mapped_module
from adapterx.runtime.inference import ort_values
from adapterx.runtime.mapped import mapped, mapped_resident, resident_nbytes
from adapterx.runtime.ports import port_arrays
from adapterx.runtime.resident import Resident
from tests.runtime.chain import Chain, adapter_of
from tests.runtime.tenants import numbers

DTYPES = [np.float32, np.float16, np.float64, ml_dtypes.bfloat16, np.int8, np.uint8, np.int64, np.bool_]


def descriptors():
    return len(list(Path("/dev/fd").iterdir()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_mapped_arrays_have_the_same_bytes_and_cannot_be_written(dtype):
    rng = np.random.default_rng(0)
    given = {str(shape): rng.integers(-3, 3, shape).astype(dtype) for shape in [(5, 7), (3,), (0, 4), (), (2, 0)]}
    given["turned"] = given["(5, 7)"].T
    for name, array in mapped(given).items():
        assert (array.dtype, array.shape) == (given[name].dtype, given[name].shape)
        np.testing.assert_array_equal(array, given[name])
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
        assert not array.size or array.ctypes.data % 64 == 0


def test_memory_with_two_names_is_written_once():
    one = np.arange(1000.0)
    found = mapped({"a": one, "b": one, "c": one.view(np.int64), "head": one[:10]})
    assert found["a"].ctypes.data == found["b"].ctypes.data == found["c"].ctypes.data
    np.testing.assert_array_equal(found["head"], one[:10])


def test_nothing_is_mapped_where_there_is_nothing():
    assert mapped({}) == {}
    assert mapped({"none": np.zeros((0, 3), np.float32)})["none"].shape == (0, 3)


def test_pages_live_as_long_as_the_last_who_reads_them_and_hold_no_file_open():
    before = descriptors()
    values = ort_values(mapped({"a": np.full((512, 512), 3, np.float32)}))
    kept = mapped({"b": np.full(100_000, 4, np.int8)})["b"][5:]
    assert descriptors() == before
    gc.collect()
    mapped({"c": np.zeros(1 << 20, np.int8)})
    gc.collect()
    assert (values["a"].numpy() == 3).all()
    assert (kept == 4).all()


def test_pages_go_with_the_last_who_reads_them():
    size = 5_000_000 + 1_000_000  # of the pages, but of neither array: what numpy frees may stay mapped for a while

    def mappings():
        ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        return sum(int(end, 16) - int(start, 16) == -(-size // 4096) * 4096 for start, end in ranges)

    # Something else in the process may happen to have a mapping of this size.
    others = mappings()
    found = mapped({"a": np.zeros(5_000_000, np.int8), "b": np.zeros(1_000_000, np.int8)})
    assert mappings() == others + 1
    del found
    gc.collect()
    assert mappings() == others


@pytest.mark.parametrize("port", ["input", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resident_moves_with_its_adapter_and_what_both_share_once(port, dtype, monkeypatch):
    manifest = Chain(port=port, dtype=dtype).manifest()
    sites = dict(adapter_of(1, 3, dtype=dtype).sites)
    parts = {"shift": np.ones((1, 5), np.dtype(dtype))}
    sites["model.head"] = LowRank(a=sites["model.head"].a, b=sites["model.head"].b, parts=parts)
    adapter = Adapter(sites, {"source": "here"})
    arrays = port_arrays(Adapter(adapter_of(1, 3, dtype=dtype).sites), manifest)
    if port == "input":
        arrays = {f"{site}.{side}.weight": array for site, c in sites.items() for side, array in c.tensors()}
    one = Resident(adapter, 7, ort_values(arrays), arrays, 3)
    sizes = []
    monkeypatch.setattr(
        mapped_module, "_map", lambda fd, size, real=mapped_module._map: (sizes.append(size), real(fd, size))[1]
    )
    moved = mapped_resident(one, ort_values)
    assert (moved.generation, moved.rank, moved.adapter) == (7, 3, adapter)
    assert moved.adapter.metadata == {"source": "here"}
    assert moved.arrays.keys() == arrays.keys() == moved.tensors.keys()
    for name, array in moved.arrays.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert moved.tensors[name].data_ptr() == array.ctypes.data != arrays[name].ctypes.data
        np.testing.assert_array_equal(numbers(moved.tensors[name]), arrays[name])
    if port == "input":
        assert moved.adapter.sites["model.head"].a.ctypes.data == moved.arrays["model.head.lora_A.weight"].ctypes.data
        assert resident_nbytes(one) == adapter.nbytes
    else:
        assert resident_nbytes(one) == adapter.nbytes + sum(array.nbytes for array in arrays.values())
    assert resident_nbytes(one) == resident_nbytes(moved) <= sizes[0] < resident_nbytes(one) + 64 * 20


def test_the_base_moves_too():
    arrays = {"a": np.ones((1, 2), np.float32)}
    moved = mapped_resident(Resident(None, 0, {}, arrays), ort_values)
    assert moved.adapter is None
    np.testing.assert_array_equal(moved.arrays["a"], arrays["a"])


def test_a_folder_that_takes_no_files_is_named_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OptionError, match=r"64 bytes, .* in .*nowhere .* set TMPDIR .* or raise max_cpu_loras"):
        mapped({"a": np.zeros(10, np.int8)})


def test_a_file_that_cannot_be_mapped_is_told(monkeypatch):
    def refuse(*_):
        raise OSError(19, "No such device")

    monkeypatch.setattr(mapped_module, "_map", refuse)
    with pytest.raises(OptionError, match="No such device"):
        mapped({"a": np.zeros(10, np.int8)})
    monkeypatch.undo()
    with pytest.raises(OSError, match=r"Bad file descriptor|Invalid"):
        mapped_module._map(-1, 64)
