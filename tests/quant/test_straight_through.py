"""Fake quantization: the numbers of the real one, and the gradients of none."""

import pytest
import torch

from adapterx.quant.affine import codes_of, grid_between, grid_of
from adapterx.quant.scheme import Scheme
from adapterx.quant.straight_through import grid_through, on_grid_through
from tests.quant.shown import weight

GROUPS = weight(6, 32).reshape(6, 2, 16)
SCHEMES = [Scheme(bits=bits, symmetric=symmetric) for bits in (1, 2, 3, 4, 8) for symmetric in (True, False)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_values_are_those_that_are_written_bit_for_bit(scheme):
    scale, zero = grid_of(GROUPS, scheme)
    expected = (codes_of(GROUPS, scale, zero, scheme.bits) - zero) * scale
    assert torch.equal(on_grid_through(GROUPS, scale, zero, bits=scheme.bits), expected)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_grid_is_the_same_bits_and_zero_points_are_whole(scheme):
    low, high = -GROUPS.abs().amax(-1, keepdim=True), 0.77 * GROUPS.abs().amax(-1, keepdim=True)
    for got, expected in zip(grid_through(low, high, scheme), grid_between(low, high, scheme), strict=True):
        assert torch.equal(got, expected)


def test_gradients_are_those_of_the_formula_without_its_rounding():
    parts = [GROUPS.double(), 0.2 + torch.rand(6, 2, 1).double(), torch.full((6, 2, 1), 7.0).double()]
    parts += [0.3 * torch.randn(6, 2, 16).double()]
    seen = torch.randn(6, 2, 16).double()

    def ours(x, scale, zero, offset):
        return on_grid_through(x, scale, zero, bits=4, offset=offset)

    def written_out(x, scale, zero, offset):
        wide = x / scale
        code = wide + (torch.round(wide + offset) - wide).detach() + (offset - offset.detach()) + zero
        return (code.clamp(0, 15) - zero) * scale

    found = []
    for function in (ours, written_out):
        leaves = [part.clone().requires_grad_() for part in parts]
        found.append(torch.autograd.grad((function(*leaves) * seen).sum(), leaves))
    for got, expected in zip(*found, strict=True):
        assert torch.allclose(got, expected, atol=1e-9)


def test_an_end_of_the_range_that_moves_moves_the_zero_point():
    low = torch.tensor([[[-1.0]]], requires_grad=True)
    _, zero = grid_through(low, torch.tensor([[[3.0]]]), Scheme(bits=4, symmetric=False))
    (gradient,) = torch.autograd.grad(zero.sum(), low)
    # -15 low / (high - low), by low
    assert torch.allclose(gradient, torch.tensor(-15 * 3.0 / 16))
