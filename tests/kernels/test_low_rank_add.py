"""The kernel of LowRankAdd in ONNX Runtime: the formula in all types, shapes and instruction sets; what is refused."""

import ctypes
import mmap
import os
import threading

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument

from adapterx.runtime.kernels import find_kernels
from tests.kernels.calls import PAIRS, assert_close, dtype, exact, some_call
from tests.kernels.cuda_host import forbidden
from tests.kernels.low_rank_add_session import low_rank_add, model_of, run, session_of, value

FLOATS = ("float32", "float32")
KERNELS = find_kernels()
assert KERNELS, "there is no kernel library to test; `make kernels` builds it"
# What this machine runs; the best is what it takes by itself.
ISAS = ["portable", "avx2", "avx512"]
ISAS = ISAS[: 1 + ISAS.index(KERNELS.isa)]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("ADAPTERX_KERNELS_ISA", request.param)
    return request.param


def lanes(adapters, rank, dim=1):
    """The mask of a batch in which each row has an adapter of its own, side by side in the bank."""
    return np.kron(np.eye(adapters), np.ones((1, rank))).reshape(adapters, *[1] * dim, adapters * rank)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_pair_of_types_is_the_formula(pair, isa) -> None:
    assert find_kernels().isa == isa
    for feeds in (
        some_call(pair, (3, 1), (24, 130, 77), lanes(3, 8)),
        some_call(pair, (2, 9), (20, 67, 530), (2, 1, 20), seed=1),
        some_call(pair, (5,), (7, 4100, 19), (5, 7), seed=2),
    ):
        assert_close(low_rank_add(feeds), exact(feeds))


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "bfloat16" not in pair[:1]], ids="-".join)
def test_the_models_own_function_gives_the_same(pair) -> None:
    feeds = some_call(pair, (3, 4), (12, 40, 33), (3, 1, 12))
    by_function = run(session_of(model_of(pair), kernels=False), feeds).astype("f8")
    # float16 is rounded after every step of the function.
    room = 0.02 if pair[0] == "float16" else 1e-5
    np.testing.assert_allclose(low_rank_add(feeds).astype("f8"), by_function, atol=room, rtol=room)


sizes = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 257, 511, 513, 1030, 4095, 4097]))


@given(
    st.sampled_from(PAIRS),
    st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 9]), min_size=0, max_size=3),
    st.tuples(st.one_of(st.integers(0, 20), st.sampled_from([31, 64, 65, 130])), sizes, sizes),
    st.data(),
)
def test_any_sizes_and_any_broadcast_of_the_mask(pair, lead, sizes, data) -> None:
    whole = [*lead, sizes[0]]
    mask = tuple(1 if data.draw(st.booleans()) else size for size in whole)[data.draw(st.integers(0, len(lead))) :]
    feeds = some_call(pair, lead, sizes, mask, seed=data.draw(st.integers(0, 9)))
    os.environ["ADAPTERX_KERNELS_ISA"] = data.draw(st.sampled_from(ISAS))
    try:
        assert_close(low_rank_add(feeds, threads=data.draw(st.sampled_from([1, 2]))), exact(feeds))
    finally:
        del os.environ["ADAPTERX_KERNELS_ISA"]


def test_a_mask_of_more_dimensions_makes_the_result_have_more() -> None:
    feeds = some_call(FLOATS, (3,), (4, 5, 6), (1, 1, 3, 4))
    assert_close(low_rank_add(feeds, shape=(1, 1, 3, 6)), exact(feeds))
    by_function = run(session_of(model_of(FLOATS), kernels=False), feeds, shape=(1, 1, 3, 6))
    assert_close(by_function, exact(feeds))


def test_masks_that_are_broadcast_in_the_middle_or_at_both_ends() -> None:
    for mask in [(3, 1, 5, 8), (1, 4, 1, 8), (3, 1, 1, 1), (4, 1, 8), (5, 1), (1,), (8,)]:
        feeds = some_call(FLOATS, (3, 4, 5), (8, 33, 20), mask)
        assert_close(low_rank_add(feeds), exact(feeds))


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("pair", [FLOATS, ("float16", "int8")], ids="-".join)
def test_weighted_sums_overlaps_and_base_rows_in_one_batch(tokens, pair, isa) -> None:
    mask = np.zeros((6, 1, 64))
    mask[0, 0, :16] = 1
    mask[1, 0, :16], mask[1, 0, 16:32] = 0.7, 0.3
    mask[2, 0, 8:40] = -2
    mask[3, 0, ::3] = 1
    mask[5, 0, 16:32] = 1
    feeds = some_call(pair, (6, tokens), (64, 256, 300), mask)
    y = low_rank_add(feeds, threads=2)
    assert_close(y, exact(feeds))
    assert y[4].tobytes() == feeds["base"][4].tobytes(), "a row without an adapter is exactly the base"


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize(
    ("lead", "rank", "mask"),
    [
        ((2, 3), 0, (2, 1, 0)),
        ((2, 3), 0, (1, 1, 1)),
        ((2, 3), 5, "zero"),
        ((0, 3), 5, (1, 1, 5)),
        ((2, 0), 5, (2, 1, 5)),
    ],
    ids=["R = 0", "R = 0, mask of 1", "mask of zeros", "n = 0", "t = 0"],
)
def test_nothing_to_add_is_exactly_the_base(pair, lead, rank, mask) -> None:
    feeds = some_call(pair, lead, (rank, 6, 40), np.zeros((2, 1, 5)) if mask == "zero" else mask)
    feeds["base"] = np.full_like(feeds["base"], np.nan)
    assert low_rank_add(feeds).tobytes() == feeds["base"].tobytes()


def test_a_dimension_of_zero_is_no_reason_to_fail() -> None:
    feeds = some_call(FLOATS, (2, 3), (4, 0, 6), (2, 1, 4))
    assert low_rank_add(feeds).tobytes() == feeds["base"].tobytes()
    assert low_rank_add(some_call(FLOATS, (2, 3), (4, 6, 0), (2, 1, 4))).shape == (2, 3, 0)


@pytest.mark.parametrize("tokens", [1, 9])
def test_columns_that_no_row_uses_are_never_read(tokens, isa) -> None:
    rank, dim = 12, mmap.PAGESIZE // 4
    mask = np.zeros((3, 1, rank))
    mask[0, 0, 2:5], mask[1, 0, 4:6], mask[2, 0, 9] = 1, 0.5, 1
    feeds = some_call(FLOATS, (3, tokens), (rank, dim, dim), mask)
    expected = exact(feeds)
    for name in "ab":
        pages = np.frombuffer(mmap.mmap(-1, rank * mmap.PAGESIZE), np.float32).reshape(rank, dim)
        pages[...] = feeds[name]
        feeds[name] = pages
    unused = [column for column in range(rank) if not mask[..., column].any()]
    session = session_of(model_of(FLOATS), threads=2)
    with forbidden([feeds[name][column] for name in "ab" for column in unused]):
        y = run(session, feeds, trap=False)
    assert_close(y, expected)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_what_stands_in_unused_columns_does_not_matter(pair) -> None:
    feeds = some_call(pair, (4, 5), (24, 50, 60), lanes(4, 6) * np.array([1, 0, 1, 1]).reshape(4, 1, 1))
    expected = exact(feeds)
    for name in "ab":
        feeds[name][6:12] = 127 if pair[1] == "int8" else np.nan
    assert_close(low_rank_add(feeds), expected)


@pytest.mark.parametrize(
    ("lead", "adapters"), [((1, 1), 1), ((8, 1), 8), ((3, 1), 3), ((2, 70), 2), ((1, 200), 1)], ids=str
)
def test_more_threads_change_no_bit(lead, adapters, isa) -> None:
    feeds = some_call(FLOATS, lead, (16 * lead[0], 2048, 1000), lanes(lead[0], 16))
    one, two = (low_rank_add(feeds, threads=threads) for threads in (1, 2))
    assert_close(one, exact(feeds))
    assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize("pair", [FLOATS, ("float64", "float64"), ("float16", "float16")], ids="-".join)
def test_it_is_right_where_the_result_takes_the_place_of_the_base(pair) -> None:
    # The first writes beside its base, which is fed; the second may write over its own; the last writes to the output.
    feeds = some_call(pair, (4, 3), (20, 40, 130), (4, 1, 20))
    expected = feeds["base"]
    for _ in range(3):
        expected = exact({**feeds, "base": expected}).astype(dtype(pair[0]))
    dims = {name: array.shape for name, array in feeds.items()}
    y = run(session_of(model_of(pair, nodes=3, dims=dims)), feeds)
    np.testing.assert_allclose(y.astype("f8"), expected.astype("f8"), atol=3e-2 if pair[0] == "float16" else 1e-5)
    idle = ~feeds["mask"].any(axis=(1, 2))
    assert y[idle].tobytes() == feeds["base"][idle].tobytes()


def test_many_callers_of_one_session_get_their_own_results() -> None:
    session = session_of(model_of(FLOATS), threads=2)
    shapes = [(1, 1), (3, 1), (4, 2), (2, 40), (8, 1), (1, 90)]
    calls = [some_call(FLOATS, shape, (8 * shape[0], 300, 200), lanes(shape[0], 8)) for shape in shapes]
    alone = [run(session, feeds, trap=False).tobytes() for feeds in calls]
    for feeds, y in zip(calls, alone, strict=True):
        assert_close(np.frombuffer(y, np.float32).reshape(feeds["base"].shape), exact(feeds))
    wrong = []

    def call(first):
        for turn in range(first, first + 150):
            which = turn % len(calls)
            if run(session, calls[which], trap=False).tobytes() != alone[which]:
                wrong.append(which)

    callers = [threading.Thread(target=call, args=(first,)) for first in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize(
    "pair", [FLOATS, ("float16", "int8"), ("bfloat16", "bfloat16"), ("float64", "float32")], ids="-".join
)
def test_nan_in_the_mask_is_refused_with_its_place(pair) -> None:
    feeds = some_call(pair, (2, 3), (70, 5, 6), np.zeros((2, 1, 70)))
    feeds["mask"][1, 0, 66] = np.nan
    values = {name: value(array) for name, array in feeds.items()}
    with pytest.raises(InvalidArgument, match="mask holds NaN, at row 1, column 66"):
        session_of(model_of(pair)).run_with_ort_values(None, values)


WRONG = [
    ({"a": (4, 7)}, r"a is \[4, 7\], expected \[R, d_in = 5\]"),
    ({"a": (4, 5, 1)}, r"a is \[4, 5, 1\]"),
    ({"b": (4, 5)}, r"b is \[4, 5\], expected \[R, d_out = 6\]"),
    ({"a": (3, 5)}, "a has R = 3 rows and b has 4"),
    ({"mask": (2, 1, 3)}, r"mask is \[2, 1, 3\], its last dimension must be R = 4 or 1"),
    ({"mask": (3, 1, 4)}, r"mask is \[3, 1, 4\], which does not broadcast against x \[2, 3, 5\]"),
    ({"mask": (2, 2, 3, 4)}, "does not broadcast"),
    ({"mask": ()}, "mask has no dimensions"),
    ({"base": (2, 6)}, r"base is \[2, 6\] beside x \[2, 3, 5\]"),
    ({"base": (2, 1, 6)}, "all but the last dimension must agree"),
]


@pytest.mark.parametrize(("wrong", "told"), WRONG, ids=[told for _, told in WRONG])
def test_shapes_that_do_not_fit_are_refused_by_name(wrong, told) -> None:
    feeds = some_call(FLOATS, (2, 3), (4, 5, 6), (2, 1, 4))
    feeds |= {name: np.ones(shape, np.float32) for name, shape in wrong.items()}
    with pytest.raises(InvalidArgument, match=told):
        session_of(model_of(FLOATS)).run(None, feeds)


def test_scales_are_for_codes_and_as_many_as_these() -> None:
    feeds = some_call(("float32", "int8"), (2, 3), (4, 5, 6), (2, 1, 4))
    session = session_of(model_of(("float32", "int8")))
    with pytest.raises(InvalidArgument, match=r"scale is \[3, 2\], expected \[R = 4, 2\]"):
        session.run(None, {**feeds, "scale": feeds["scale"][:3]})
    model = model_of(("float32", "int8"))
    del model.graph.node[0].input[5:]
    with pytest.raises(InvalidArgument, match="scale is missing"):
        session_of(model).run(None, feeds)


def test_a_mask_too_scattered_to_walk_is_refused_not_misread() -> None:
    lead = (2,) * 18
    feeds = some_call(FLOATS, lead, (1, 1, 1), (*(1, 2) * 9, 1))
    with pytest.raises(InvalidArgument, match="in more than 8 places"):
        session_of(model_of(FLOATS)).run(None, feeds)


def test_what_follows_knows_type_and_shape() -> None:
    dims = {"base": ["n", "t", 6], "x": ["n", "t", 5], "a": ["R", 5], "b": ["R", 6], "mask": ["n", 1, "R"]}
    for pair in PAIRS:
        (y,) = session_of(model_of(pair, dims=dims)).get_outputs()
        assert y.shape == ["n", "t", 6]
    (y,) = session_of(model_of(FLOATS, dims={**dims, "base": ["t", 6], "x": ["t", 5]})).get_outputs()
    assert y.shape == [1, "t", 6]


def test_an_unknown_instruction_set_is_an_error(monkeypatch) -> None:
    library = ctypes.CDLL(str(KERNELS.path))
    library.adapterx_kernels_isa.restype = ctypes.c_char_p
    for isa in ISAS:
        monkeypatch.setenv("ADAPTERX_KERNELS_ISA", isa)
        assert library.adapterx_kernels_isa() == isa.encode()
    monkeypatch.setenv("ADAPTERX_KERNELS_ISA", "avx1024")
    assert library.adapterx_kernels_isa() is None
    options = onnxruntime.SessionOptions()
    with pytest.raises(Exception, match="ADAPTERX_KERNELS_ISA is 'avx1024', expected portable, avx2 or avx512"):
        options.register_custom_ops_library(str(KERNELS.path))


def test_sizes_that_the_model_neither_says_nor_names_stay_unknown() -> None:
    feeds = some_call(FLOATS, (2, 3), (4, 6, 8), (2, 1, 4))
    dims = {name: [None] * array.ndim for name, array in feeds.items()}
    dims["base"] = [None, None, 8]
    model = model_of(FLOATS, dims=dims)
    # What computes with the shape of the result sees two sizes of -1, where they are taken for known.
    model.graph.node.append(onnx.helper.make_node("Shape", ["y"], ["shape"]))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["base", "shape"], ["same"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("same", onnx.TensorProto.FLOAT, None))
    got = session_of(model).run(["same"], {name: value(array) for name, array in feeds.items()})
    np.testing.assert_array_equal(got[0], feeds["base"])
