"""MX against the formula of microxcaling, computed apart from our tables, and on whole models."""

import numpy as np
import pytest
import torch
from torch import nn

from adapterx.errors import OptionError
from adapterx.quant.configs import MXQuantConfig
from adapterx.quant.mx import MX, mx
from adapterx.quant.verbs import quantize
from tests.quant.tiny import bits_of, error, llama, logits

# (exponent bits, mantissa bits with the implicit one, largest value) of the elements; integers have no exponent.
ELEMENTS = {
    "fp8_e5m2": (5, 4, 57344.0),
    "fp8_e4m3": (4, 5, 448.0),
    "fp6_e3m2": (3, 4, 28.0),
    "fp6_e2m3": (2, 5, 7.5),
    "fp4": (2, 3, 6.0),
    "int8": (0, 8, 127 / 64),
    "int4": (0, 4, 1.75),
    "int2": (0, 2, 1.0),
}


def reference(weight, dtype, block, rounding):
    """Rouhani et al., arXiv 2310.10537, as microxcaling computes it; float64."""
    exponents, mantissa, largest = ELEMENTS[dtype]
    found = np.zeros_like(weight, dtype=np.float64)
    top = int(np.floor(np.log2(largest)))
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], block):
            part = weight[row, start : start + block].astype(np.float64)
            if not part.any():
                continue
            scale = 2.0 ** (np.floor(np.log2(np.abs(part).max())) - top)
            scaled = part / scale
            own = np.floor(np.log2(np.maximum(np.abs(scaled), 1e-30))) if exponents else np.zeros_like(scaled)
            least = -(2 ** (exponents - 1)) + 2 if exponents else 0
            step = 2.0 ** (np.maximum(own, least) - (mantissa - 2))
            levels = np.abs(scaled) / step
            if rounding == "nearest":
                levels = np.floor(levels + 0.5)
            elif rounding == "even":
                levels = np.round(levels)
            else:
                levels = np.floor(levels)
            found[row, start : start + block] = np.sign(part) * np.minimum(levels * step, largest) * scale
    return found


@pytest.mark.parametrize("rounding", ["nearest", "even", "floor"])
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_weights_are_what_the_formula_gives(dtype, rounding):
    chance = np.random.default_rng(0)
    weight = (chance.standard_normal((8, 80)) * np.exp(chance.standard_normal((8, 80)))).astype(np.float32)
    weight[0, :32] = 0
    # Ties, and values at the ends of binades.
    weight[1, :32] = np.arange(32) / 4
    weight[2, :32] = -np.arange(32) / 8
    config = MXQuantConfig(w_dtype=dtype, weight_only=True, round_method=rounding)
    found = mx(torch.from_numpy(weight), config.method()).dequantized().numpy()
    np.testing.assert_array_equal(found, reference(weight, dtype, 32, rounding).astype(np.float32))


def test_dither_is_right_on_average_and_the_same_twice():
    weight = torch.full((64, 320), 1.1)
    weight[:, ::32] = 4.0
    method = MX("mxfp4", None, rounding="dither")
    found = mx(weight, method).dequantized()
    assert set(found.unique().tolist()) == {1.0, 1.5, 4.0}
    assert float(found[weight == 1.1].mean()) == pytest.approx(1.1, abs=0.01)
    assert torch.equal(found, mx(weight, method).dequantized())


@pytest.mark.parametrize("round_method", ["nearest", "even", "floor", "dither"])
@pytest.mark.parametrize(("w_dtype", "act_dtype"), [("int8", "fp8_e4m3"), ("fp4", "fp6_e3m2"), ("fp8_e5m2", "int4")])
@pytest.mark.parametrize("weight_only", [True, False])
def test_a_layer_rounds_its_inputs_unless_only_weights_are_asked_for(w_dtype, act_dtype, weight_only, round_method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8))
    config = MXQuantConfig(w_dtype=w_dtype, act_dtype=act_dtype, weight_only=weight_only, round_method=round_method)
    layer = quantize(model, config)[0]
    x = torch.randn(3, 64)
    weight = layer.weight
    if weight_only:
        expected = nn.functional.linear(x, weight, layer.bias)
        assert torch.equal(layer(x), expected.bfloat16().float())
    else:
        assert not torch.equal(layer(x), nn.functional.linear(x, weight, layer.bias).bfloat16().float())
        if round_method != "dither":
            rounded = torch.from_numpy(reference(x.numpy(), act_dtype, 32, round_method)).float()
            expected = nn.functional.linear(rounded, weight, layer.bias)
            assert torch.allclose(layer(x), expected.bfloat16().float(), rtol=1e-2, atol=1e-4)
    # Zero stays zero, to the bit.
    assert torch.equal(layer(torch.zeros(1, 64)), layer.bias.bfloat16().float().unsqueeze(0))


def test_results_are_rounded_to_the_dtype_that_is_asked_for():
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    outputs = {
        name: quantize(nn.Sequential(nn.Linear(64, 8)), MXQuantConfig(out_dtype=name))[0](x)
        for name in ("float32", "float16", "bfloat16")
        if torch.manual_seed(0)
    }
    assert torch.equal(outputs["bfloat16"], outputs["float32"].bfloat16().float())
    assert torch.equal(outputs["float16"], outputs["float32"].half().float())
    assert not torch.equal(outputs["bfloat16"], outputs["float32"])


def test_more_bits_are_nearer_and_float_stays_float():
    model = llama()
    before = logits(model)
    errors = [
        error(quantize(model, MXQuantConfig(w_dtype=d, act_dtype=d, out_dtype="float32"), inplace=False), before)
        for d in ("int8", "fp8_e4m3", "fp6_e2m3", "fp4")
    ]
    assert errors[0] < errors[3] / 50
    assert errors == sorted(errors) or errors[1] > errors[2]
    assert errors[3] < 0.1
    assert not bits_of(quantize(model, MXQuantConfig(w_dtype="float32", act_dtype="float32"), inplace=False))


def test_blocks_that_do_not_divide_a_row_end_shorter():
    weight = torch.randn(4, 50)
    found = mx(weight, MX("mxint8", None, block=32))
    assert found.scales.shape == (4, 2)
    assert torch.allclose(found.dequantized(), weight, atol=float(weight.abs().max()) / 64)


def test_what_is_no_mx_format_is_an_error():
    with pytest.raises(OptionError, match="'nf4' is no MX format"):
        MX("nf4")
    with pytest.raises(OptionError, match="w_dtype='float32' with act_dtype='int8' is not implemented"):
        MXQuantConfig(w_dtype="float32").method()
