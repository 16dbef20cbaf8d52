"""A combination does at each site what its adapters do there, weighted."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapterx as ax
from adapterx.adapter import GAIN, INPUT_GAIN, MAGNITUDE, SHIFT, Adapter, LowRank
from adapterx.combination import combine
from adapterx.truncation import truncated, truncated_adapter


def change(seed: int = 0, rank: int = 3, d_in: int = 8, d_out: int = 6, dtype: type = np.float32) -> LowRank:
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(rank, d_in)), random.normal(size=(rank, d_out))
    return LowRank(a=a.astype(dtype), b=b.astype(dtype))


def delta(site: LowRank) -> np.ndarray:
    rank = site.rank
    return site.b.astype(np.float64).T @ site.a.reshape(rank, -1).astype(np.float64)


def only(part: str, width: int) -> LowRank:
    return LowRank.of_parts({part: np.ones((1, width))})


weights = st.floats(-4, 4, width=32)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 9), weights), min_size=1, max_size=4))
def test_the_change_is_the_weighted_sum_of_the_changes(members):
    adapters = [(Adapter({"fc": change(seed, rank)}), weight) for seed, rank, weight in members]
    site = combine(adapters).sites["fc"]
    expected = sum(weight * delta(one.sites["fc"]) for one, weight in adapters)
    np.testing.assert_allclose(delta(site), expected, rtol=1e-5, atol=1e-5)
    assert site.rank == sum(rank for _, rank, _ in members)


def test_a_site_of_one_adapter_alone_is_kept():
    both = combine([(Adapter({"a": change(1), "c": change(2)}), 0.5), (Adapter({"b": change(3)}), 2)])
    assert list(both.sites) == ["a", "b", "c"]
    np.testing.assert_allclose(delta(both.sites["b"]), 2 * delta(change(3)), rtol=1e-6)


def test_weight_zero_is_the_base():
    site = combine([(Adapter({"fc": change()}), 0)]).sites["fc"]
    assert site.rank == 3
    assert not site.b.any()


@pytest.mark.parametrize(
    ("first", "second", "sum_of"),
    [
        (np.float16, np.float16, np.float16),
        (np.float16, ml_dtypes.bfloat16, np.float32),
        (ml_dtypes.bfloat16, np.float32, np.float32),
        (np.float16, np.float64, np.float64),
    ],
)
def test_the_element_type_holds_both(first, second, sum_of):
    adapters = [(Adapter({"fc": change(1, dtype=first)}), 0.7), (Adapter({"fc": change(2, dtype=second)}), 0.3)]
    site = combine(adapters).sites["fc"]
    assert site.dtype == np.dtype(sum_of)
    expected = sum(weight * delta(one.sites["fc"]) for one, weight in adapters)
    np.testing.assert_allclose(delta(site), expected, rtol=1e-2, atol=1e-2)


def test_a_smaller_rank_is_the_best_there_is_and_says_what_it_costs():
    whole = combine([(Adapter({"fc": change(1), "other": change(4)}), 1), (Adapter({"fc": change(2)}), -0.5)])
    small = combine([(Adapter({"fc": change(1), "other": change(4)}), 1), (Adapter({"fc": change(2)}), -0.5)], rank=2)
    assert small.ranks == (2,)
    errors = json.loads(small.metadata["truncation_errors"])
    for site, exact in whole.sites.items():
        values = np.linalg.svd(delta(exact), compute_uv=False)
        best = np.sqrt((values[2:] ** 2).sum() / (values**2).sum())
        met = np.linalg.norm(delta(small.sites[site]) - delta(exact)) / np.linalg.norm(delta(exact))
        np.testing.assert_allclose([errors[site], met], best, rtol=1e-5)
    lost = sum(np.linalg.norm(delta(small.sites[s]) - delta(whole.sites[s])) ** 2 for s in whole.sites)
    there = sum(np.linalg.norm(delta(one)) ** 2 for one in whole.sites.values())
    np.testing.assert_allclose(float(small.metadata["truncation_error"]), np.sqrt(lost / there), rtol=1e-5)


def test_a_rank_that_suffices_costs_nothing():
    one = change(rank=5)
    doubled = LowRank(a=np.concatenate([one.a, one.a]), b=np.concatenate([one.b, one.b]))
    cut = truncated_adapter(Adapter({"fc": doubled}), 5)
    np.testing.assert_allclose(delta(cut.sites["fc"]), 2 * delta(one), rtol=1e-5, atol=1e-5)
    assert float(cut.metadata["truncation_error"]) < 1e-7


def test_a_convolution_keeps_its_kernel_and_a_wide_rank_is_no_matter():
    conv = LowRank(
        a=np.random.default_rng(0).normal(size=(12, 2, 3, 1)), b=np.random.default_rng(1).normal(size=(12, 4))
    )
    cut = truncated(conv, 3).change
    assert cut.a.shape == (3, 2, 3, 1)
    u, s, v = np.linalg.svd(delta(conv), full_matrices=False)
    np.testing.assert_allclose(delta(cut), (u[:, :3] * s[:3]) @ v[:3], atol=1e-9)


def test_gains_and_shifts_add_up_as_changes():
    parts = [{GAIN: np.full((1, 6), g), SHIFT: np.full((1, 6), g + 1)} for g in (0.5, -0.25)]
    one = Adapter({"fc": LowRank(a=change().a.astype(float), b=change().b.astype(float), parts=parts[0])})
    other = Adapter({"fc": LowRank.of_parts({GAIN: parts[1][GAIN]}), "only": LowRank.of_parts(parts[1])})
    both = combine([(one, 2), (other, 4)]).sites
    np.testing.assert_allclose(both["fc"].parts[GAIN], np.full((1, 6), 2 * 0.5 - 4 * 0.25))
    np.testing.assert_allclose(both["fc"].parts[SHIFT], np.full((1, 6), 2 * 1.5))
    np.testing.assert_allclose(delta(both["fc"]), 2 * delta(change()), rtol=1e-6)
    assert (both["only"].rank, float(both["only"].parts[SHIFT][0, 0])) == (0, 3.0)


@pytest.mark.parametrize(
    ("sites", "cause"),
    [
        ([{"fc": change()}, {"fc": change(d_in=9)}], r"fc: its shapes differ: \(8, 6\), \(9, 6\)"),
        ([{"fc": only(MAGNITUDE, 6)}], "fc: it holds magnitude, .* for its model first"),
        (
            [{"x": LowRank.of_parts({GAIN: np.ones((1, 6))})}, {"x": LowRank.of_parts({INPUT_GAIN: np.ones((1, 8))})}],
            "x: ",
        ),
        (
            [{"x": LowRank.of_parts({GAIN: np.ones((1, 6))})}, {"x": LowRank.of_parts({GAIN: np.ones((1, 7))})}],
            "x: .*gain",
        ),
    ],
)
def test_what_has_no_sum_is_refused_with_its_site(sites, cause):
    with pytest.raises(ax.MismatchError, match=cause):
        combine([(Adapter(one), 0.5) for one in sites])


def test_an_overflow_is_refused_with_its_site():
    with pytest.raises(ax.MismatchError, match="fc: b overflows float16"):
        combine([(Adapter({"fc": change(dtype=np.float16)}), 1e6)])


@pytest.mark.parametrize("weight", [np.nan, np.inf, "much", None])
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(ax.OptionError, match="is no finite number"):
        combine([(Adapter({"fc": change()}), weight)])


def test_nothing_cannot_be_combined_and_no_rank_is_below_one():
    with pytest.raises(ax.OptionError, match="at least one adapter"):
        combine([])
    with pytest.raises(ax.OptionError, match="rank=0 is no rank"):
        combine([(Adapter({"fc": change()}), 1)], rank=0)


def test_adapters_of_different_bases_are_combined_only_when_asked_for():
    ours, theirs = (Adapter({"fc": change()}, {"base_model": name, "task_type": "X"}) for name in ("org/a", "org/b"))
    assert combine([(ours, 1), (ours, 1)]).metadata == {"base_model": "org/a", "task_type": "X"}
    with pytest.raises(ax.MismatchError, match="base_model: 'org/a', 'org/b'"):
        combine([(ours, 1), (theirs, 1)])
    assert combine([(ours, 1), (theirs, 1)], allow_other_base=True).metadata == {"task_type": "X"}
