"""SmoothQuant: the formula, its alpha, and what it saves a model with outliers."""

import pytest
import torch
from torch import nn

from adapterx.errors import ModelError, OptionError
from adapterx.quant import SmoothQuantConfig, StaticQuantConfig, quantize
from adapterx.quant.linear import as_quantized, linear_weight, replace
from adapterx.quant.rounding import rounded
from adapterx.quant.smoothquant import SmoothQuant, smoothquant
from adapterx.quant.static import StaticInt8, static_int8
from tests.quant import tiny
from tests.quant.language import language, perplexity, text
from tests.quant.shown import block_of, first_block, same, weight


def outliers(count=256, inputs=64):
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(0))
    x[:, [3, 17]] *= 100
    return x


X = outliers()


def block(x=X):
    module = nn.Sequential(nn.Linear(64, 24))
    with torch.no_grad():
        module[0].weight.copy_(weight(24, 64))
        # What reads large inputs has small weights, in a model that was trained.
        module[0].weight[:, [3, 17]] /= 100
    return block_of(module, x.split(64))


def lost(found, shown, x=X):
    """Of the layer's outputs, its inputs rounded too."""
    truth = x @ linear_weight(shown.module[0]).T
    scaled = x if found.pre_scale is None else x * found.pre_scale
    got = rounded(scaled, found.activation) @ found.values().T
    return float((got - truth).square().mean() / truth.square().mean())


def test_the_scale_is_that_of_the_paper():
    shown = block()
    original = linear_weight(shown.module[0])
    for alpha in (0.0, 0.3, 0.5, 1.0):
        found = smoothquant(shown, {"0": SmoothQuant(alpha=alpha)})["0"]
        scale = X.abs().amax(0) ** alpha / original.abs().amax(0) ** (1 - alpha)
        assert torch.allclose(1 / found.pre_scale, scale, rtol=1e-5)
        assert float((found.dequantized() - original).abs().max()) < 0.03
        assert (found.bits, found.group, found.activation.per) == (8, 64, "static")


@pytest.mark.parametrize("per", ["static", "tensor", "token"])
def test_outliers_cost_much_less(per):
    shown = block()
    plain = smoothquant(shown, {"0": SmoothQuant(alpha=0.0, per=per)})["0"]
    before = lost(static_int8(shown, {"0": StaticInt8()})["0"], shown)
    assert lost(smoothquant(shown, {"0": SmoothQuant(per=per)})["0"], shown) < 1e-3 * before
    assert plain.activation.per == per


@pytest.mark.parametrize("blockwise", [False, True])
def test_auto_takes_the_alpha_with_the_least_error(blockwise):
    shown = block()
    tried = (0.0, 0.2, 0.5, 0.8, 1.0)
    errors = [lost(smoothquant(shown, {"0": SmoothQuant(alpha=alpha)})["0"], shown) for alpha in tried]
    best = tried[errors.index(min(errors))]
    auto = smoothquant(shown, {"0": SmoothQuant(alpha="auto", alphas=tried, blockwise=blockwise)})["0"]
    assert same(auto, smoothquant(shown, {"0": SmoothQuant(alpha=best)})["0"])
    assert min(errors) < 0.9 * max(errors)


def test_channels_that_are_never_used_stay_as_they_are():
    x = X.clone()
    x[:, 5] = 0
    shown = block(x)
    with torch.no_grad():
        shown.module[0].weight[:, 9] = 0
    found = smoothquant(shown, {"0": SmoothQuant()})["0"]
    assert found.pre_scale[[5, 9]].tolist() == [1, 1]
    assert bool(torch.isfinite(found.dequantized()).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["uint8", "int8"])
def test_the_calibrated_range_of_the_smoothed_inputs_is_the_grid(format, symmetric):
    method = SmoothQuant(format=format, activation_symmetric=symmetric)
    found = smoothquant(block(), {"0": method})["0"]
    smooth = X * found.pre_scale
    error = float((rounded(smooth, found.activation) - smooth).abs().max())
    assert error <= 0.501 * float(found.activation.scale)
    assert found.activation.format == format


def test_layers_that_read_one_tensor_share_a_scale_and_the_block_is_left_as_it_was():
    shown, names = first_block(tiny.llama())
    before = {name: part.clone() for name, part in shown.module.state_dict().items()}
    for method in (SmoothQuant(), SmoothQuant(alpha="auto"), SmoothQuant(alpha="auto", blockwise=True)):
        found = smoothquant(shown, dict.fromkeys(names, method))
        assert sorted(found) == sorted(names)
        q, k, v = (found[f"self_attn.{letter}_proj"] for letter in "qkv")
        assert torch.equal(q.pre_scale, k.pre_scale)
        assert torch.equal(q.pre_scale, v.pre_scale)
        assert torch.equal(q.activation.scale, k.activation.scale)
        assert all(torch.equal(before[name], part) for name, part in shown.module.state_dict().items())


def test_the_layer_computes_with_rounded_smoothed_inputs():
    shown = block()
    found = smoothquant(shown, {"0": SmoothQuant()})["0"]
    original = shown.module[0]
    replace(shown.module, "0", as_quantized(original, found))
    expected = rounded(X * found.pre_scale, found.activation) @ found.values().T + original.bias
    assert torch.allclose(torch.cat(shown.outputs()), expected, atol=1e-4)


def test_what_cannot_be_smoothed_is_refused():
    with pytest.raises(OptionError, match=r"alpha=1\.2"):
        SmoothQuant(alpha=1.2)
    with pytest.raises(OptionError, match=r"\(0\.5, 7\)"):
        SmoothQuant(alpha="auto", alphas=(0.5, 7))
    with pytest.raises(OptionError, match="alpha='best'"):
        SmoothQuant(alpha="best")
    with pytest.raises(ModelError, match="calibration gives it inputs that are NaN"):
        smoothquant(block(torch.full_like(X, float("nan"))), {"0": SmoothQuant()})


def test_a_language_model_with_outliers_keeps_its_perplexity():
    shown, tokens = text().calibration(16, 64).split(8), text().evaluation(16, 128)
    found = {
        label: perplexity(quantize(language(twin=True), config, run_fn=tiny.run, run_args=(shown,)), tokens)
        for label, config in (("static", StaticQuantConfig()), ("smooth", SmoothQuantConfig()))
    }
    known = perplexity(language(), tokens)
    assert found["static"] > 1.05 * known
    assert found["smooth"] < 1.01 * known
