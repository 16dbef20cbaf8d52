"""Weights that are read by plain reads are those that onnx_ir's own reader gives."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from adapterx.graph.weights import moved, read, read_diagonal

DTYPES = ["float32", "float16", "bfloat16", "float64", "int8", "uint4", "int4"]


def array_of(dtype):
    numbers = np.random.default_rng(0).integers(0, 7, (5, 8))
    return numbers.astype(getattr(ml_dtypes, dtype) if dtype in {"bfloat16", "uint4", "int4"} else dtype)


@pytest.fixture(params=DTYPES)
def pair(request, tmp_path):
    """A tensor in a file, behind 3 bytes of something else, and the same in memory."""
    inline = ir.tensor(array_of(request.param), name="w")
    raw = inline.tobytes()
    (tmp_path / "w.bin").write_bytes(b"\xff" * 16 + raw + b"\xff" * 64)
    return ir.ExternalTensor(
        "w.bin", 16, len(raw), inline.dtype, shape=inline.shape, name="w", base_dir=tmp_path
    ), inline


def test_a_tensor_in_a_file_reads_as_the_one_in_memory(pair):
    stored, inline = pair
    for tensor in (stored, inline):
        assert read(tensor).dtype == inline.numpy().dtype
        np.testing.assert_array_equal(read(tensor), inline.numpy())


def test_a_diagonal_reads_as_that_of_the_whole_matrix(pair):
    stored, inline = pair
    picks = np.array([0, 2, 4])
    for tensor in (stored, inline):
        np.testing.assert_array_equal(read_diagonal(tensor, picks), inline.numpy()[picks, picks])


def test_a_moved_tensor_has_the_same_bytes_in_another_place(pair, tmp_path):
    stored, inline = pair
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "w.bin").rename(tmp_path / "elsewhere" / "v.bin")
    there = moved(stored, "v.bin", tmp_path / "elsewhere")
    assert (there.name, there.location, there.dtype) == ("w", "v.bin", stored.dtype)
    np.testing.assert_array_equal(read(there), inline.numpy())


def test_a_number_and_an_empty_matrix_have_their_shapes(tmp_path):
    (tmp_path / "w.bin").write_bytes(np.float32(7).tobytes())
    one = ir.ExternalTensor("w.bin", 0, 4, ir.DataType.FLOAT, shape=ir.Shape([]), name="s", base_dir=tmp_path)
    none = ir.ExternalTensor("w.bin", 0, 0, ir.DataType.FLOAT, shape=ir.Shape([0, 4]), name="e", base_dir=tmp_path)
    assert (read(one).shape, float(read(one)), read(none).shape) == ((), 7.0, (0, 4))
