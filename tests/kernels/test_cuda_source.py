"""The CUDA kernels of LowRankAdd without a GPU: their source, compiled for the host and run thread by thread."""

import faulthandler
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from adapterx.ops import low_rank_add
from tests.kernels.cuda_host import CudaOnHost, close_to_traps, dtype, forbidden

KERNELS = Path(__file__).parents[2] / "kernels"
FLOATS = ["float32", "float16", "bfloat16"]
PAIRS = [(t, p) for t in FLOATS for p in (*FLOATS, "int8")]
PAIRS += [("float64", p) for p in ("float64", *FLOATS, "int8")]
# What one rounding of y costs, and beside it what float sums (of tf32 parts in tiles) cost in numbers near 1.
ROUNDING = {"float64": 1e-15, "float32": 1e-7, "float16": 2**-11, "bfloat16": 2**-8}
SUMMING = {"float64": 1e-13, "float32": 3e-6, "float16": 3e-6, "bfloat16": 3e-6}


def found(*names):
    """Compilers that are here; a test of none of them says so by its name, and has nothing to do."""
    return [name for name in names if shutil.which(name)] or [f"there is no {names[0]} here"]


@pytest.fixture(scope="session", params=found("g++", "clang++"))
def cuda(request, tmp_path_factory):
    library = tmp_path_factory.mktemp("cuda") / "libcuda_on_host.so"
    source = KERNELS / "harness" / "cuda_on_host.cc"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
    subprocess.run([request.param, *flags, "-shared", "-fPIC", source, "-o", library], check=True)
    return CudaOnHost(library)


def byte_limit(adapters, rank, d_in, d_out, width):
    return adapters * rank * (d_in + d_out) * width


def some_call(t, p, lead, sizes, mask_shape, *, living=0.4, seed=0):
    """base, x, a, b, mask, scale; weights of a size that makes deltas near 1."""
    rng = np.random.default_rng(seed)
    rank, d_in, d_out = sizes
    base = rng.normal(size=(*lead, d_out)).astype(dtype(t))
    x = rng.normal(size=(*lead, d_in)).astype(dtype(t))
    if p == "int8":
        a, b = (rng.integers(-127, 128, (rank, d)).astype(np.int8) for d in (d_in, d_out))
        scale = (rng.uniform(0.5, 1.5, (rank, 2)) / [60 * max(d_in, 1) ** 0.5, 60 * max(rank, 1) ** 0.5]).astype("f4")
    else:
        a = (rng.normal(size=(rank, d_in)) / max(d_in, 1) ** 0.5).astype(dtype(p))
        b = (rng.normal(size=(rank, d_out)) / max(rank, 1) ** 0.5).astype(dtype(p))
        scale = None
    mask = np.where(rng.random(mask_shape) < living, rng.choice([1.0, 1.0, -0.5, 0.75], mask_shape), 0).astype(dtype(t))
    return base, x, a, b, mask, scale


def reference(base, x, a, b, mask, scale=None):
    a, b = a.astype("f8"), b.astype("f8")
    if scale is not None:
        a, b = a * scale[:, :1], b * scale[:, 1:]
    return low_rank_add(base.astype("f8"), x.astype("f8"), a, b, mask.astype("f8"))


def assert_close(y, expected):
    name = y.dtype.name
    room = ROUNDING[name] * np.abs(expected) + SUMMING[name]
    worst = np.max(np.abs(y.astype("f8") - expected) / room, initial=0)
    assert worst <= 1, f"{worst:.2f} times what {name} may be off"


# [n, 1, R] beside [n, t, d]: few tokens go by rows, many by tiles. Sizes fill no tile, and more than one.
DECODE = ((5, 1), (40, 272, 528), (5, 1, 40))
PREFILL = ((3, 33), (20, 144, 80), (3, 1, 20))
# More columns than a block lists at once.
DECODE_OF_MANY = ((3, 1), (600, 24, 40), (3, 1, 600))
PREFILL_OF_MANY = ((3, 33), (300, 24, 40), (3, 1, 300))


@pytest.mark.parametrize(("t", "p"), PAIRS)
def test_few_rows_equal_the_reference_in_every_type(cuda, t, p):
    call = some_call(t, p, *DECODE)
    result = cuda(*call)
    assert not result.tiles
    assert_close(result.y, reference(*call))


@pytest.mark.parametrize(("t", "p"), PAIRS)
def test_many_rows_equal_the_reference_in_every_type(cuda, t, p):
    call = some_call(t, p, *PREFILL)
    result = cuda(*call)
    assert result.tiles == (t != "float64")
    assert_close(result.y, reference(*call))


@pytest.mark.parametrize("shapes", [DECODE_OF_MANY, PREFILL_OF_MANY])
@pytest.mark.parametrize("living", [0, 0.02, 1])
def test_a_bank_of_many_columns_equals_the_reference_however_few_of_them_live(cuda, shapes, living):
    call = some_call("float32", "float32", *shapes, living=living)
    assert_close(cuda(*call).y, reference(*call))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 17, 33), (7, 63, 65), (17, 130, 7), (5, 20, 12), (5, 0, 9)])
@pytest.mark.parametrize(
    ("t", "p"), [("float32", "float32"), ("float16", "int8"), ("bfloat16", "float32"), ("float64", "float16")]
)
@pytest.mark.parametrize("lead", [(3, 1), (2, 35)])
def test_sizes_that_no_vector_divides_are_read_and_written_to_their_end(cuda, t, p, sizes, lead):
    call = some_call(t, p, lead, sizes, (lead[0], 1, sizes[0]), living=0.7)
    assert_close(cuda(*call).y, reference(*call))


@pytest.mark.parametrize("lead", [(2, 3, 4), (2, 3, 20)])
@pytest.mark.parametrize(
    "form", ["n11R", "1t1R", "11sR", "ntsR", "n1sR", "nt1R", "n111", "nts1", "1111", "tsR", "sR", "s1", "R", "1"]
)
def test_a_mask_may_be_broadcast_in_any_way(cuda, form, lead):
    letters = dict(zip("nts", lead, strict=True)) | {"R": 9, "1": 1}
    call = some_call("float32", "float32", lead, (9, 24, 20), [letters[letter] for letter in form])
    assert_close(cuda(*call).y, reference(*call))


def test_rows_without_leading_dimensions_or_with_one_are_rows(cuda):
    for lead, mask in [
        ((), (6,)),
        ((), (1,)),
        ((4,), (4, 6)),
        ((4,), (1, 6)),
        ((150,), (150, 6)),
        ((1,), (1, 1, 1, 6)),
    ]:
        call = some_call("float32", "float32", lead, (6, 24, 20), mask)
        assert_close(cuda(*call).y, reference(*call).reshape(call[0].shape))


@pytest.mark.parametrize(
    ("lead", "sizes"), [((4, 1), (0, 8, 8)), ((0, 1), (4, 8, 8)), ((2, 20), (0, 8, 8)), ((2, 1), (4, 8, 0))]
)
@pytest.mark.parametrize("in_place", [False, True])
def test_no_ranks_or_no_rows_is_exactly_the_base(cuda, lead, sizes, in_place):
    call = some_call("float32", "float32", lead, sizes, (lead[0], 1, sizes[0]))
    assert cuda(*call, in_place=in_place).y.tobytes() == call[0].tobytes()


@pytest.mark.parametrize("lead", [(4, 1), (4, 33)])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_row_of_zeros_in_the_mask_is_exactly_the_base(cuda, lead, in_place):
    base, x, a, b, mask, _ = some_call("float16", "float16", lead, (12, 40, 72), (4, 1, 12), living=1)
    mask[1] = 0
    base[1] = -0.0  # base + 0 would be +0
    x[1] = np.inf
    y = cuda(base, x, a, b, mask, in_place=in_place).y
    assert y[1].tobytes() == base[1].tobytes()
    assert not np.array_equal(y[0], base[0])


@pytest.mark.parametrize("shapes", [DECODE, PREFILL])
def test_in_place_and_apart_give_the_same_bits(cuda, shapes):
    call = some_call("float16", "float32", *shapes)
    assert cuda(*call, in_place=True).y.tobytes() == cuda(*call).y.tobytes()


@pytest.mark.parametrize("shapes", [DECODE, PREFILL, DECODE_OF_MANY, PREFILL_OF_MANY])
@pytest.mark.parametrize(("t", "p"), [("float32", "float32"), ("bfloat16", "int8")])
def test_the_order_in_which_threads_come_to_a_barrier_changes_no_bit(cuda, t, p, shapes):
    call = some_call(t, p, *shapes)
    assert cuda(*call, order=1).y.tobytes() == cuda(*call, order=0).y.tobytes()


@pytest.mark.parametrize(("shapes", "most_rows"), [(DECODE, 2), (PREFILL, 35)])
def test_parts_of_the_depth_and_slabs_of_rows_change_nothing_but_rounding(cuda, shapes, most_rows):
    lead, (rank, _, d_out), mask = shapes
    call = some_call("float32", "float32", lead, (rank, 1100, d_out), mask)
    whole, cut = cuda(*call, processors=1), cuda(*call, processors=500, most_rows=most_rows)
    assert whole.splits < cut.splits
    for result in (whole, cut):
        assert_close(result.y, reference(*call))


@pytest.mark.parametrize("lead", [(5, 1), (150,)])
@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_weights_that_are_no_numbers_reach_no_row_but_their_own(cuda, lead, poison):
    # Every row weighs columns of its own, in groups and in tiles that rows share.
    rank = 9
    base, x, a, b, _, _ = some_call("float32", "float32", lead, (rank, 24, 72), (1,))
    mask = np.zeros((*lead, rank), np.float32)
    for row in range(lead[0]):
        mask[row, ..., row % 3 * 3 : row % 3 * 3 + 3] = 1
    clean = reference(base, x, a, b, mask)
    b[4, 5] = poison
    a[3, 2] = poison
    y = cuda(base, x, a, b, mask).y
    others = np.arange(lead[0]) % 3 != 1
    assert_close(y[others], clean[others])
    assert not np.isfinite(y[~others][..., 5]).any()


@pytest.mark.parametrize("lead", [(3, 1), (3, 33)])
@pytest.mark.parametrize(("t", "p"), [("float32", "float16"), ("float16", "int8"), ("bfloat16", "bfloat16")])
def test_an_infinite_activation_is_infinite_beside_half_ports(cuda, t, p, lead):
    base, x, a, b, mask, scale = some_call(t, p, lead, (1, 24, 72), (3, 1, 1), living=1)
    a[0, 5], b[b == 0] = 1, 1
    x[1, ..., 5] = np.inf
    y = cuda(base, x, a, b, mask, scale).y
    with np.errstate(all="ignore"):
        expected = reference(base, x, a, b, mask, scale)
    assert np.isinf(expected[1]).all()
    assert np.array_equal(y[1].astype("f8"), expected[1])
    assert_close(y[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("lead", [(5, 1), (5, 33)])
def test_a_nan_in_the_mask_is_nan_in_its_row_and_in_no_other(cuda, lead):
    base, x, a, b, mask, _ = some_call("float32", "float32", lead, (9, 24, 72), (5, 1, 9))
    clean = reference(base, x, a, b, mask)
    mask[2, 0, 4] = np.nan
    y = cuda(base, x, a, b, mask).y
    assert np.isnan(y[2]).all()
    assert_close(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("t", ["float16", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 130])
def test_a_delta_of_zero_gives_every_number_back(cuda, t, rows):
    base = np.tile(np.arange(2**16, dtype=np.uint16).view(dtype(t)), (rows, 1))[:, : 2**16 if rows == 1 else 2**15 :]
    x, a, b = np.zeros((rows, 8), base.dtype), np.ones((1, 8), base.dtype), np.ones((1, base.shape[1]), base.dtype)
    y = cuda(base, x, a, b, np.ones((rows, 1), base.dtype), trap=False).y
    np.testing.assert_array_equal(y.astype("f4"), base.astype("f4"))


def in_a_child(function):
    child = os.fork()
    if child == 0:
        status = 1
        faulthandler.disable()
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("lead", [(4, 1), (4, 20), (150,)])
def test_weights_that_no_row_weighs_are_never_read(cuda, lead):
    base, x, a, b, _, _ = some_call("float32", "float32", lead, (12, 1024, 1024), (1,))
    mask = np.zeros((lead[0], *(1,) * (len(lead) - 1), 12), np.float32)
    mask[::2, ..., 3:6] = 1
    mask[1::3, ..., 7] = -0.5
    expected = reference(base, x, a, b, mask)
    a, b = close_to_traps(a), close_to_traps(b)
    dead = [side[row] for side in (a, b) for row in range(12) if row not in (3, 4, 5, 7)]

    def call():
        with forbidden(dead):
            assert_close(cuda(base, x, a, b, mask, trap=False).y, expected)

    assert in_a_child(call) == 0
    assert in_a_child(lambda: [forbidden(dead).__enter__(), a.sum()]) != 0, "the traps do not work"


@pytest.mark.parametrize(("t", "p"), [("float32", "float32"), ("float16", "float16"), ("float16", "int8")])
def test_rows_with_adapters_of_their_own_read_each_weight_once(cuda, t, p):
    rank, d_in, d_out = 4, 1024, 1536
    base, x, a, b, _, scale = some_call(t, p, (6, 1), (10 * rank, d_in, d_out), (1,))
    mask = np.zeros((6, 1, 10 * rank), dtype(t))
    for row, adapter in enumerate([7, 2, 5, 0, 3]):  # the last row is the base's, and four adapters are nobody's
        mask[row, 0, adapter * rank : (adapter + 1) * rank] = 1
    result = cuda(base, x, a, b, mask, scale, processors=132)
    assert result.splits > 1
    assert result.read == byte_limit(5, rank, d_in, d_out, dtype(p).itemsize)


def test_shapes_that_do_not_fit_are_refused_by_name(cuda):
    base, x, a, b, mask, _ = some_call("float32", "float32", (2, 1), (4, 8, 8), (2, 1, 4))
    with pytest.raises(ValueError, match="mask"):
        cuda(base, x, a, b, mask[..., :3])
