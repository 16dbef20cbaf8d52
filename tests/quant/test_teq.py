"""TEQ: learnt scales of inputs change nothing in float, and lose less once weights are rounded."""

import pytest
import torch
from torch import nn

from adapterx.errors import ModelError, OptionError
from adapterx.quant import RTNConfig, quantize
from adapterx.quant.blocks import walk
from adapterx.quant.calibration import Calibration
from adapterx.quant.linear import as_quantized, is_linear, linear_weight, replace
from adapterx.quant.rtn import RTN, rtn
from adapterx.quant.scheme import Scheme
from adapterx.quant.teq import TEQ, teq
from tests.quant import tiny
from tests.quant.language import language, perplexity, text
from tests.quant.shown import block_of, correlated, first_block, output_error, same, weight

X = correlated(64)
NOISY = Scheme(bits=2, group_size=16, symmetric=False)


def one(scheme, x=X, **options):
    module = nn.Sequential(nn.Linear(64, 24))
    with torch.no_grad():
        module[0].weight.copy_(weight(24, 64))
    found = teq(block_of(module, x.split(64)), {"0": TEQ(scheme, **{"steps": 40, "lr": 0.05, **options})})
    return found["0"], linear_weight(module[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_lose_less_than_by_rounding_to_nearest(bits, symmetric):
    scheme = Scheme(bits=bits, group_size=16, symmetric=symmetric)
    found, original = one(scheme)
    assert output_error(found, original, X) < 0.9 * output_error(rtn(original, RTN(scheme)), original, X)


@pytest.mark.parametrize("scheme", [NOISY, Scheme(bits=3, group_size=48), Scheme(bits=4, group_size=-1, mse=True)])
def test_what_is_written_is_the_scaled_weight_rounded_to_nearest(scheme):
    found, original = one(scheme)
    plain = rtn(original / found.pre_scale, RTN(scheme))
    assert float((found.values() - plain.values()).abs().max()) < 1e-5 * float(plain.values().abs().max())
    assert output_error(found, original, X) < output_error(rtn(original, RTN(scheme)), original, X)


def test_the_parts_in_eight_bits_compute_what_the_float_layer_does():
    found, original = one(Scheme(bits=8, group_size=16, symmetric=False))
    assert output_error(found, original, X) < 1e-4


def test_without_steps_nothing_is_scaled():
    found, original = one(NOISY, steps=0)
    assert found.pre_scale is None
    assert same(found, rtn(original, RTN(NOISY)))


def test_steps_that_do_harm_are_taken_back():
    found, original = one(NOISY, steps=1, lr=30.0)
    assert output_error(found, original, X) <= output_error(rtn(original, RTN(NOISY)), original, X)


@pytest.mark.parametrize("made", [tiny.llama, tiny.gpt2])
def test_layers_that_read_one_tensor_share_a_scale_and_the_block_is_left_as_it_was(made):
    block, names = first_block(made())
    before = {name: part.clone() for name, part in block.module.state_dict().items()}
    layers = {name: TEQ(NOISY, steps=8, lr=0.01) for name in names}
    found, again = teq(block, layers), teq(block, layers)
    assert all(same(found[name], again[name]) for name in names)
    assert all(torch.equal(before[name], part) for name, part in block.module.state_dict().items())
    if made is tiny.llama:
        q, k, gate, up = (found[f"{n}_proj"].pre_scale for n in ("self_attn.q", "self_attn.k", "mlp.gate", "mlp.up"))
        assert torch.equal(q, k)
        assert torch.equal(gate, up)
        assert not torch.equal(q, gate)


def test_the_whole_block_loses_less():
    block, names = first_block(tiny.llama())
    errors = {}
    floats = {name: block.module.get_submodule(name) for name in names}
    for steps in (0, 20):
        found = teq(block, {name: TEQ(NOISY, steps=steps, lr=0.01) for name in names})
        for name in names:
            replace(block.module, name, as_quantized(floats[name], found[name]))
        errors[steps] = block.error()
        for name in names:
            replace(block.module, name, floats[name])
    assert errors[20] < 0.99 * errors[0]


def test_what_cannot_be_learnt_is_refused():
    with pytest.raises(OptionError, match="not for 'mxfp4'"):
        TEQ(Scheme(format="mxfp4"))
    with pytest.raises(OptionError, match="batch_size=0"):
        TEQ(batch_size=0)
    with pytest.raises(ModelError, match="NaN"):
        one(NOISY, x=torch.full_like(X, float("inf")))


def test_a_language_model_with_outliers_loses_less_perplexity():
    shown, tokens = text().calibration(16, 64).split(8), text().evaluation(16, 128)
    scheme, model = Scheme(bits=4, group_size=32, symmetric=False), language(twin=True)
    names = [name for name, module in model.named_modules() if is_linear(module) and name != "lm_head"]
    calibration = Calibration(model, names)
    tiny.run(model, shown)
    calibration.detach()
    for block, inside in walk(calibration, names):
        for name, found in teq(block, {name: TEQ(scheme, steps=25) for name in inside}).items():
            replace(block.module, name, as_quantized(block.module.get_submodule(name), found))
    config = RTNConfig(bits=4, group_size=32, use_sym=False)
    rounded = perplexity(quantize(language(twin=True), config), tokens)
    assert perplexity(language(), tokens) < perplexity(model, tokens) < 0.99 * rounded
