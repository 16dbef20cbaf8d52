"""Static int8 against arithmetic in integers, and on models with outliers and silence."""

import pytest
import torch
from torch import nn

from adapterx.errors import FeedError
from adapterx.quant.activation_grid import int8_weight
from adapterx.quant.configs import StaticQuantConfig
from adapterx.quant.verbs import quantize
from tests.quant.tiny import bits_of, convolutional, error, llama, logits, run


def one_layer(x, **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    quantize(model, StaticQuantConfig(**fields), lambda m: m(x))
    return model[0]


def data(seed=0):
    return torch.randn(32, 16, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("act_dtype", ["uint8", "int8"])
@pytest.mark.parametrize("act_sym", [False, True])
@pytest.mark.parametrize("w_sym", [True, False])
@pytest.mark.parametrize("w_granularity", ["per_channel", "per_tensor"])
def test_a_layer_computes_what_integers_do(act_dtype, act_sym, w_sym, w_granularity):
    layer = one_layer(data(), act_dtype=act_dtype, act_sym=act_sym, w_sym=w_sym, w_granularity=w_granularity)
    x = data(1) * 1.5  # some of it is out of the calibrated range
    weight, act = layer.quantized, layer.quantized.activation
    low, high = (0, 255) if act_dtype == "uint8" else (-128, 127)
    zero = int(act.zero)
    codes = torch.clamp(torch.round(x / act.scale) + zero, low, high).to(torch.int64)
    zeros = 128 if weight.zeros is None else weight.zeros.to(torch.int64)
    products = (codes - zero) @ (weight.codes.to(torch.int64) - zeros).T
    expected = products * act.scale * weight.scales[:, 0] + layer.bias
    assert torch.allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    if act_sym:
        assert zero == (128 if act_dtype == "uint8" else 0)
    if w_granularity == "per_tensor":
        assert len(weight.scales.unique()) == 1


def test_the_range_is_that_of_all_calls():
    model = nn.Sequential(nn.Linear(16, 8))

    def twice(model):
        model(torch.full((1, 16), -1.0))
        model(torch.full((1, 16), 4.1))

    quantize(model, StaticQuantConfig(), twice)
    act = model[0].quantized.activation
    assert float(act.scale) == pytest.approx(5.1 / 255)
    assert int(act.zero) == 50


def test_inputs_that_were_always_zero_give_zeros():
    layer = one_layer(torch.zeros(4, 16))
    assert torch.equal(layer(torch.zeros(4, 16)), layer.bias.expand(4, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_an_error_naming_the_layer(value):
    with pytest.raises(FeedError, match="NaN or infinity to 0"):
        one_layer(torch.full((2, 16), value))


def test_one_scale_for_all_rows_is_coarser_than_one_a_row():
    weight = torch.randn(8, 16) * torch.logspace(-2, 0, 8).unsqueeze(1)
    by_row, by_layer = (
        int8_weight(weight, per_channel=rows, symmetric=True, name="a").dequantized() for rows in (True, False)
    )
    assert (by_row - weight).square().mean() < (by_layer - weight).square().mean() / 2


def test_a_model_stays_near():
    model = llama()
    reference = logits(model)
    quantize(model, StaticQuantConfig(), run)
    assert len(bits_of(model)) == 15
    assert 0 < error(model, reference) < 2e-3


def test_locals_keep_layers_float():
    model = convolutional()
    keep = StaticQuantConfig(w_dtype="fp32", act_dtype="fp32")
    quantize(model, StaticQuantConfig().set_local("4", keep), lambda m: m(torch.randn(2, 8, 8)))
    assert list(bits_of(model)) == ["3"]
