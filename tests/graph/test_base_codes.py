"""Codes of numbers, at the edges: groups of nothing, of one number, of odd sizes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adapterx.errors import ModelError
from adapterx.graph.base_codes import block_codes, column_codes, finite, flat_codes
from adapterx.graph.base_methods import HQQ, RTN, Bnb4, KQuant

FLOAT = np.dtype(np.float32)
METHODS = [cls(bits=bits) for cls in (RTN, KQuant, HQQ) for bits in (2, 4, 8)] + [RTN(symmetric=False)]
number = st.floats(-1000, 1000, width=32)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@given(st.data())
def test_no_number_is_farther_off_than_the_span_of_its_group_allows(method, data):
    rows = data.draw(arrays(np.float32, (2, data.draw(st.integers(1, 100))), elements=number))
    found = block_codes(rows, method, stored=FLOAT)
    values = found.values(method.bits)
    assert np.isfinite(values).all()
    assert found.codes.max(initial=0) < 1 << method.bits
    span = np.maximum(rows.max(axis=1), 0) - np.minimum(rows.min(axis=1), 0)
    # A symmetric grid spends half of its codes on each side; k-quant and HQQ give up outliers for the rest.
    step = 2 * span / ((1 << method.bits) - 1)
    allowed = 1.01 * step if isinstance(method, RTN) else span
    assert (np.abs(values[:, : rows.shape[1]] - rows) <= allowed[:, None] + 1e-30).all()
    # What fills the last block stands for zero, or for what is nearest to it.
    fractional = isinstance(method, HQQ) and method.bits == 4
    assert (np.abs(values[:, rows.shape[1] :]) <= fractional * span[:, None]).all()


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("value", [0.0, 3.0, -0.5])
def test_a_group_of_one_number_is_exact(method, value):
    rows = np.full((2, 40), value, np.float32)
    np.testing.assert_allclose(block_codes(rows, method, stored=FLOAT).values(method.bits)[:, :40], rows, rtol=1e-5)


def test_groups_of_any_multiple_of_sixteen_have_their_own_scales():
    rows = np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32)
    found = block_codes(rows, RTN(block_size=48), stored=FLOAT)
    assert found.codes.shape == (3, 7, 16)
    for first, last in ((0, 3), (3, 6), (6, 7)):
        assert (found.scales[:, first:last] == found.scales[:, first : first + 1]).all()
        group = rows[:, 16 * first : 16 * last]
        np.testing.assert_allclose(np.abs(found.scales[:, first]), np.abs(group).max(axis=1) / 8, rtol=1e-6)


@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_an_odd_number_of_weights_ends_in_half_a_byte(table):
    packed, largest = flat_codes(np.arange(35, dtype=np.float32).reshape(5, 7) - 17, Bnb4(table, 16))
    assert packed.shape == (18,)
    assert list(largest) == [17, 14, 17]


def test_columns_of_zeros_have_a_scale_that_can_be_divided_by():
    codes, scale = column_codes(np.zeros((2, 4), np.float32))
    assert not codes.any()
    assert scale.tolist() == [1, 1]


def test_what_is_no_number_is_counted():
    with pytest.raises(ModelError, match="w: 2 of 4 weights"):
        finite(np.array([[1, np.inf], [np.nan, 2]]), "w")
