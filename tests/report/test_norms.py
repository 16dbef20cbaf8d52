"""Frobenius norms from factors, against the product."""

import ml_dtypes
import numpy as np
import pytest

from adapterx.adapter import LowRank
from adapterx.report.norms import delta_norm, norm


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(24,), (6, 3, 3)], ids=["linear", "convolution"])
def test_the_norm_of_a_change_is_that_of_its_product(dtype, shape):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((5, *shape)).astype(dtype), rng.standard_normal((5, 17)).astype(dtype)
    product = b.astype(np.float64).T @ a.reshape(5, -1).astype(np.float64)
    assert delta_norm(LowRank(a=a, b=b)) == pytest.approx(np.linalg.norm(product), rel=1e-12)


def test_factors_that_cancel_leave_no_norm_of_their_own():
    a, b = np.ones((2, 8), np.float32), np.array([[1.0] * 4, [-1.0] * 4], np.float32)
    assert delta_norm(LowRank(a=a, b=b)) == 0.0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_does_not_pass_for_a_number(value):
    a = np.array([[1.0, value]])
    assert not np.isfinite(delta_norm(LowRank(a=a, b=np.ones((1, 3)))))


def test_a_site_of_parts_only_has_no_change_of_low_rank():
    assert delta_norm(LowRank.of_parts({"gain": np.ones((1, 3), np.float32)})) == 0.0


def test_the_norm_of_half_a_million_halfs_does_not_overflow_and_ignores_layout():
    weight = np.full((1500, 1000), 200.0, np.float16)
    assert norm(weight) == norm(weight.T) == pytest.approx(200 * np.sqrt(weight.size), rel=1e-12)
