"""HQQ: fitted zero points, as the authors' package fits them."""

import pytest
import torch

from adapterx.errors import ModelError, OptionError
from adapterx.quant.hqq import HQQ, hqq
from adapterx.quant.rtn import RTN, rtn
from adapterx.quant.scheme import Scheme
from tests.quant.shown import same, weight

# Heavy tails, as weights of large models have.
W = (weight(48, 64, seed=2) * weight(48, 64, seed=3).abs() * 0.1).contiguous()


def method(bits, group=16, **options):
    return HQQ(Scheme(bits=bits, group_size=group, symmetric=False), **options)


def reference(weight, bits, group, *, p=0.7, beta=10.0, kappa=1.01, iters=20):
    """The authors' solver, written down from the paper: rows are groups, and the scale is inverted."""
    rows = weight.reshape(-1, group).double()
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (2**bits - 1) / (high - low)
    zero, best = -low * scale, float("inf")
    zero = zero.round() if bits == 4 else zero
    for _ in range(iters):
        codes = torch.round(rows * scale + zero).clamp(0, 2**bits - 1)
        error = rows - (codes - zero) / scale
        shrunk = torch.sign(error) * (error.abs() - error.abs() ** (p - 1) / beta).clamp(min=0)
        zero = (codes - (rows - shrunk) * scale).mean(1, keepdim=True)
        beta *= kappa
        if error.abs().mean() >= best:
            break
        best = error.abs().mean()
    codes = torch.round(rows * scale + zero).clamp(0, 2**bits - 1)
    return ((codes - zero) / scale).reshape(weight.shape).float()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_is_what_the_authors_solver_gives(bits):
    wrong = (hqq(W, method(bits)).dequantized() - reference(W, bits, 16)).abs()
    # Where a weight lies between two codes, rounding decides.
    assert float(wrong.gt(1e-5).float().mean()) < 0.002


def test_where_zero_points_begin_can_be_chosen():
    assert same(hqq(W, method(4)), hqq(W, method(4, round_zero=True)))
    assert not same(hqq(W, method(4)), hqq(W, method(4, round_zero=False)))
    assert same(hqq(W, method(3)), hqq(W, method(3, round_zero=False)))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_mean_error_is_less_than_by_rounding_to_nearest(bits):
    scheme = Scheme(bits=bits, group_size=16, symmetric=False)
    mean = [(found.dequantized() - W).abs().mean() for found in (hqq(W, HQQ(scheme)), rtn(W, RTN(scheme)))]
    assert mean[0] < mean[1]


@pytest.mark.parametrize("group", [-1, 1, 24, 48])
def test_any_group_fits(group):
    found = hqq(W, method(8, group))
    assert float((found.dequantized() - W).abs().max()) <= 0.51 * float(found.scales.max())


def test_a_short_last_group_is_fitted_to_its_own_weights_alone():
    # The group before it has no error, so it has no say in when to stop.
    last = W[:, :16]
    found, alone = hqq(torch.cat([torch.zeros(48, 24), last], 1), method(3, 24)), hqq(last, method(3, -1))
    assert torch.allclose(found.zeros[:, 1:], alone.zeros, atol=1e-5)
    assert torch.equal(found.codes[:, 24:], alone.codes)


def test_rounded_zero_points_take_256_values_and_codes_follow_them():
    found = hqq(W, method(4, quant_zero=True))
    assert len(found.zeros.unique()) <= 256
    assert float((found.dequantized() - W).abs().mean()) < 1.1 * float(
        (hqq(W, method(4)).dequantized() - W).abs().mean()
    )


def test_rounded_scales_are_double_scales():
    found = hqq(W, method(4, quant_scale=True, scale_group=16))
    assert (found.double.bits, found.double.group) == (8, 16)
    assert torch.equal(found.scales, found.double.values())


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_a_constant_weight_is_kept(value):
    assert torch.allclose(hqq(torch.full((3, 32), value), method(4)).dequantized(), torch.full((3, 32), value))


def test_tiny_weights_are_not_lost():
    found = hqq(W * 1e-6, method(8))
    assert float((found.dequantized() - W * 1e-6).abs().max()) < 1e-8


def test_the_same_bits_each_time():
    assert same(hqq(W, method(3)), hqq(W, method(3)))


def test_weights_that_are_not_finite_are_refused():
    broken = W.clone()
    broken[0, 0] = float("inf")
    with pytest.raises(ModelError, match="fc: 1 of"):
        hqq(broken, method(4), name="fc")


@pytest.mark.parametrize("scheme", [Scheme(symmetric=True), Scheme(format="nf4"), Scheme(symmetric=False, mse=True)])
def test_a_scheme_without_zero_points_to_fit_is_refused(scheme):
    with pytest.raises(OptionError, match="HQQ fits zero points"):
        HQQ(scheme)
