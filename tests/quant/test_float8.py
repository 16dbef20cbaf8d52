"""Float8 against torch's own float8 types, with scales from data, found at each call, or fixed."""

import pytest
import torch
from torch import nn

from adapterx.errors import FeedError, OptionError
from adapterx.quant.configs import FP8Config
from adapterx.quant.float8 import Float8, float8
from adapterx.quant.verbs import quantize
from tests.quant.tiny import bits_of, error, llama, logits, run

KINDS = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2}


def through(x, scale, kind):
    """``x`` in torch's float8, cut off at its largest; torch itself would give NaN or infinity."""
    limits = torch.finfo(kind)
    return (x / scale).clamp(limits.min, limits.max).to(kind).to(torch.float32) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["static", "tensor", "token", None])
def test_a_layer_computes_what_torchs_types_do(kind, activation):
    torch.manual_seed(0)
    x, largest = torch.randn(4, 32), torch.finfo(KINDS[kind]).max
    model = nn.Sequential(nn.Linear(32, 8))
    weight = model[0].weight.detach().clone()
    config = FP8Config(fp8_config=kind, activation=activation, hp_dtype="fp32")
    layer = quantize(model, config, lambda m: m(x))[0]
    expected = through(weight, weight.abs().max() / largest, KINDS[kind])
    assert torch.equal(layer.weight, expected)
    if activation is not None:
        most = x.abs().amax(-1, keepdim=True) if activation == "token" else x.abs().max()
        x = through(x, most / largest, KINDS[kind])
    assert torch.allclose(layer(x), nn.functional.linear(x, expected, layer.bias), rtol=1e-5, atol=1e-5)


def test_inputs_beyond_the_calibrated_range_are_cut_off():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
    quantize(model, FP8Config(hp_dtype="fp32"), lambda m: m(torch.ones(1, 4)))
    assert torch.equal(model(torch.full((1, 4), 9.0)), torch.ones(1, 4))


def test_scales_may_be_powers_of_two_or_one():
    weight = torch.tensor([[100.0, 3.0], [500.0, -7.0]])
    power = float8(weight, Float8(activation=None, scaling="power_of_two"))
    assert power.scales.flatten().tolist() == [2.0, 2.0]
    unit = float8(weight, Float8(activation=None, scaling="unit"))
    assert unit.scales.flatten().tolist() == [1.0, 1.0]
    assert unit.dequantized()[1, 0] == 448
    rows = float8(weight, Float8(activation=None, per_channel=True))
    assert rows.scales.flatten().tolist() == pytest.approx([100 / 448, 500 / 448])
    assert FP8Config(scale_method="maxabs_pow2").method().scaling == "power_of_two"


def test_results_have_the_high_precision_that_is_asked_for():
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    model = quantize(nn.Sequential(nn.Linear(32, 8)), FP8Config(), lambda m: m(x))
    assert torch.equal(model(x), model(x).bfloat16().float())


def test_models_stay_near_and_e4m3_is_nearer_than_e5m2():
    model = llama()
    reference = logits(model)
    four, five = (
        error(quantize(model, FP8Config(fp8_config=kind), run, inplace=False), reference) for kind in ("E4M3", "E5M2")
    )
    assert 0 < four < five < 0.05


def test_only_static_inputs_need_data():
    assert len(bits_of(quantize(llama(), FP8Config(activation="token")))) == 15
    with pytest.raises(FeedError, match="never called"):
        quantize(llama(), FP8Config())


def test_scalings_that_do_not_go_with_an_activation_are_an_error():
    with pytest.raises(OptionError, match="needs a static activation"):
        FP8Config(activation="token", scale_method="unit_scale").method()
    with pytest.raises(OptionError, match="'nf4' is no eight-bit float"):
        Float8("nf4")
