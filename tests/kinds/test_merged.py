"""A change beside a weight, all of it or a part, at once or by blocks, and back."""

import numpy as np
import pytest

from adapterx.adapter import LowRank
from adapterx.kinds.merged import merger

D_IN, D_OUT = 30, 20
rng = np.random.default_rng(5)
weight = rng.standard_normal((D_IN, D_OUT)).astype(np.float32)
bias = rng.standard_normal(D_OUT).astype(np.float32)


def row(width):
    return (0.3 * rng.standard_normal((1, width))).astype(np.float32)


def change(rank=3, **parts):
    a, b = (rng.standard_normal((rank, width)).astype(np.float32) for width in (D_IN, D_OUT))
    return LowRank(a=a, b=b, parts=parts)


def beside(one, amount=1.0, **options):
    return merger(one, (D_IN, D_OUT), amount=amount, weight=lambda: weight, bias=bias, **options)


@pytest.mark.parametrize("amount", [1.0, 0.5, -2.0])
def test_the_sum_is_what_the_formula_says(amount):
    one = change(gain=row(D_OUT), input_gain=row(D_IN), shift=row(D_OUT))
    done = beside(one, amount)
    gain, input_gain, shift = (amount * one.parts[name][0] for name in ("gain", "input_gain", "shift"))
    x = rng.standard_normal((4, D_IN)).astype(np.float32)
    y = ((x * (1 + input_gain)) @ weight + bias) * (1 + gain) + shift + amount * (x @ one.a.T) @ one.b
    np.testing.assert_allclose(x @ done.weight(weight) + done.bias(bias), y, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 16, 100])
@pytest.mark.parametrize("turned", [True, False])
def test_blocks_put_together_are_the_whole(rank, turned):
    one = change(rank, gain=row(D_OUT), input_gain=row(D_IN))
    done = beside(one)
    stored = np.asfortranarray(weight) if turned else weight
    whole = done.weight(stored)
    for rows in (slice(0, 7), slice(7, D_IN)):
        for columns in (slice(0, 11), slice(11, D_OUT)):
            part = done.weight(stored[rows, columns], rows, columns)
            np.testing.assert_allclose(part, whole[rows, columns], atol=1e-5)


@pytest.mark.parametrize(("d_in", "d_out"), [(3, 40_000), (40_000, 3), (700, 700)])
def test_products_of_many_tiles_have_no_seams(d_in, d_out):
    a, b = (rng.standard_normal((16, width)).astype(np.float32) for width in (d_in, d_out))
    base = np.zeros((d_in, d_out), np.float32)
    one = merger(LowRank(a=a, b=b), (d_in, d_out), amount=1, weight=lambda: base, bias=None)
    for stored in (base, np.asfortranarray(base)):
        np.testing.assert_allclose(one.weight(stored), a.T @ b, atol=1e-4)


def test_a_whole_weight_takes_the_place_of_the_base_to_the_bit():
    whole = rng.standard_normal((D_OUT, D_IN)).astype(np.float32)
    one = LowRank.of_parts({"whole_weight": whole, "whole_bias": row(D_OUT)})
    done = beside(one)
    np.testing.assert_array_equal(done.weight(weight), whole.T)
    np.testing.assert_allclose(done.bias(bias), one.parts["whole_bias"][0], atol=1e-6)
    half = beside(one, 0.5)
    np.testing.assert_allclose(half.weight(weight), (whole.T + weight) / 2, atol=1e-6)
    turned = LowRank.of_parts({"whole_weight": np.ascontiguousarray(whole.T)})
    np.testing.assert_array_equal(beside(turned, whole_rows_first=True).weight(weight), whole.T)


def test_undone_gives_back_what_was_there():
    done = beside(change(gain=row(D_OUT), input_gain=row(D_IN), shift=row(D_OUT)), 0.7)
    again = done.undone()
    np.testing.assert_allclose(again.weight(done.weight(weight)), weight, atol=1e-5)
    np.testing.assert_allclose(again.bias(done.bias(bias)), bias, atol=1e-5)
    with pytest.raises(ValueError, match="not in the merged weight any more"):
        beside(LowRank.of_parts({"gain": np.full((1, D_OUT), -1, np.float32)})).undone()


def test_what_does_not_fit_is_told_with_both_sizes():
    narrow = LowRank(a=np.ones((1, 7), np.float32), b=np.ones((1, D_OUT), np.float32))
    with pytest.raises(ValueError, match=r"the adapter is \(7,\) -> 20, the weight is 30 -> 20"):
        beside(narrow)
    with pytest.raises(ValueError, match=r"its gain is \(1, 9\), the weight is 30 -> 20"):
        beside(LowRank.of_parts({"gain": row(9)}))
