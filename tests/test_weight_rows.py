"""A weight read and written a few rows at a time is the weight read and written at once."""

import numpy as np
import pytest

from adapterx.base_weight import read_weight, written
from adapterx.weight_rows import part_of, place_of, row_blocks, row_span
from tests.stored_weights import D_IN, D_OUT, INTEGER, LINEAR, packed, rng, stored

# Rows of axis 0 that belong together: one, or those of a block; all, where one scale is for all.
CUT = {
    **{"MatMul": 1, "Transpose": 1, "Gemm": 1, "MatMulNBits 4": 1, "MatMulNBits 2": 1, "QDQ int8 in blocks": 32},
    **{"MatMulNBits float zero point": 1, "QDQ int8 per row": 1, "QDQ uint4 in blocks along rows": 1},
    **{"QDQ uint4 blocked by the quantizer": 32, "QDQ int8": 0, "QDQ uint8 per column": 0, "MatMulInteger int8": 0},
}


@pytest.mark.parametrize("form", CUT)
def test_rows_can_be_read_and_written_apart(form, tmp_path):
    ref, tensor = stored({**LINEAR, **INTEGER}[form](tmp_path))
    raw = {role: raw_bytes(tensor(name)) for role, name in ref.tensors.items()}
    nbytes = {role: len(data) for role, data in raw.items()}
    rows = ref.shape[0]
    smallest = row_blocks(ref, nbytes, block_bytes=1)
    assert smallest[0] == slice(0, CUT[form] or rows)
    whole = read_weight(ref, tensor)
    other = rng.normal(size=whole.shape).astype(np.float32)
    expected = {role: raw_bytes(written(ref, other, tensor)[name]) for role, name in ref.tensors.items()}
    for block in row_blocks(ref, nbytes, block_bytes=40 * 4 * D_IN * D_OUT // rows):
        part, here = part_of(ref, block), place_of(ref, block)
        spans = {role: row_span(ref, role, size, block) for role, size in nbytes.items()}

        def cut(name, spans=spans):
            role = next(role for role, other_name in ref.tensors.items() if other_name == name)
            dtype = tensor(name).dtype
            packed_dtype = np.uint8 if dtype.name in {"int4", "uint4"} else dtype
            return np.frombuffer(raw[role][spans[role]], packed_dtype)

        np.testing.assert_array_equal(read_weight(part, cut), whole[here])
        for role, name in ref.tensors.items():
            assert raw_bytes(written(part, other[here], cut)[name]) == expected[role][spans[role]]


def raw_bytes(array):
    return packed(array) if array.dtype.name in {"int4", "uint4"} else array.tobytes()
