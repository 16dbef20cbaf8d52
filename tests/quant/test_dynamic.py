"""Dynamic int8 against ONNX DynamicQuantizeLinear's formula, for a whole input and by token."""

import pytest
import torch
from torch import nn

from adapterx.quant.configs import DynamicQuantConfig
from adapterx.quant.verbs import quantize
from tests.quant.tiny import bits_of, error, llama, logits


def layer(**fields):
    torch.manual_seed(0)
    return quantize(nn.Sequential(nn.Linear(16, 8, bias=False)), DynamicQuantConfig(**fields))[0]


def test_a_whole_input_has_one_grid_with_zero_on_it():
    found, x = layer(), torch.randn(4, 16) * torch.logspace(-3, 1, 4).unsqueeze(1)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 255
    zero = round(-low / scale)
    rounded = (torch.clamp(torch.round(x / scale) + zero, 0, 255) - zero) * scale
    assert torch.allclose(found(x), rounded @ found.weight.T, atol=1e-5)
    # The least row is lost in the grid of the largest.
    assert torch.equal(rounded[0], torch.zeros(16))


@pytest.mark.parametrize("act_sym", [False, True])
@pytest.mark.parametrize("act_dtype", ["uint8", "int8"])
def test_a_token_has_a_grid_of_its_own_so_its_company_changes_nothing(act_sym, act_dtype):
    found = layer(act_granularity="per_token", act_sym=act_sym, act_dtype=act_dtype)
    x = torch.randn(4, 16) * torch.logspace(-3, 1, 4).unsqueeze(1)
    rows = torch.cat([found(row.unsqueeze(0)) for row in x])
    assert torch.allclose(found(x), rows, rtol=1e-6, atol=0)
    assert torch.allclose(found(x), x @ found.weight.T, atol=1e-1 * float(x.abs().max()) / 127 * 16)
    assert float((found(x)[0] - x[0] @ found.weight.T).abs().max()) < 1e-4


def test_by_token_is_nearer_than_one_grid_for_all():
    model = llama()
    reference = logits(model)
    whole = quantize(model, DynamicQuantConfig(w_granularity="per_channel"), inplace=False)
    token = quantize(model, DynamicQuantConfig(w_granularity="per_channel", act_granularity="per_token"), inplace=False)
    assert len(bits_of(token)) == 15
    assert error(token, reference) < error(whole, reference) < 1e-3


def test_zeros_stay_zeros():
    assert torch.equal(layer()(torch.zeros(2, 16)), torch.zeros(2, 8))
