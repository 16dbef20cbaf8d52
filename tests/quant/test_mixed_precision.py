"""Layers in half: the same numbers as torch in that dtype, between casts, for linear layers and convolutions."""

import copy

import pytest
import torch
from torch import nn

from adapterx.errors import ModelError, OptionError
from adapterx.quant.configs import MixedPrecisionConfig
from adapterx.quant.mixed_precision import HalfConv1d, HalfConv2d, HalfConv3d, HalfLinear, HalfPrecision, half
from adapterx.quant.verbs import quantize
from tests.quant.tiny import convolutional, error, gpt2, llama, logits

LAYERS = [
    (nn.Linear(8, 4), (2, 3, 8), HalfLinear),
    (nn.Linear(8, 4, bias=False), (2, 8), HalfLinear),
    (nn.Conv1d(8, 4, 3, stride=2, padding=1, groups=2), (2, 8, 9), HalfConv1d),
    (nn.Conv2d(8, 4, (3, 1), dilation=2, padding_mode="circular", padding=1), (2, 8, 9, 9), HalfConv2d),
    (nn.Conv3d(8, 4, 2, bias=False), (2, 8, 4, 4, 4), HalfConv3d),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("layer", "shape", "kind"), LAYERS)
def test_a_layer_computes_what_torch_does_in_that_dtype(layer, shape, kind, dtype):
    x = torch.randn(shape)
    found = half(layer, HalfPrecision(dtype))
    assert type(found) is kind
    assert found(x).dtype == torch.float32
    assert torch.equal(found(x), copy.deepcopy(layer).to(dtype)(x.to(dtype)).float())
    assert {name: part.dtype for name, part in found.state_dict().items()} == dict.fromkeys(layer.state_dict(), dtype)
    assert layer.weight.dtype == torch.float32


def test_models_mix_by_layer():
    model = convolutional()
    config = MixedPrecisionConfig(dtype="bf16").set_local("Linear", MixedPrecisionConfig(dtype="fp16"))
    config.set_local("4", MixedPrecisionConfig(dtype="fp32"))
    x = torch.randn(2, 8, 8)
    reference = model(x)
    quantize(model, config)
    assert [type(module) for module in model] == [HalfConv1d, nn.ReLU, nn.Flatten, HalfLinear, nn.Linear]
    assert (model[0].weight.dtype, model[3].weight.dtype) == (torch.bfloat16, torch.float16)
    assert torch.allclose(model(x), reference, atol=0.02)
    assert model.is_quantized


@pytest.mark.parametrize("make", [llama, gpt2])
def test_language_models_stay_near(make):
    model = make()
    reference = logits(model)
    quantize(model, MixedPrecisionConfig())
    assert 0 < error(model, reference) < 1e-5
    assert type(model.lm_head) is HalfLinear


def test_a_tied_head_in_half_leaves_the_embedding():
    model = llama(tied=True)
    quantize(model, MixedPrecisionConfig(white_list=["lm_head"]))
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.float16


def test_weights_that_overflow_are_an_error_and_the_model_is_as_it_was():
    model = convolutional()
    with torch.no_grad():
        model[4].weight[0, 0] = 1e6
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"4: 1 of 128 weights are NaN or infinite in torch\.float16"):
        quantize(model, MixedPrecisionConfig())
    assert [type(module) for module in model] == [nn.Conv1d, nn.ReLU, nn.Flatten, nn.Linear, nn.Linear]
    assert all(torch.equal(before[name], part) for name, part in model.state_dict().items())
    assert type(quantize(model, MixedPrecisionConfig(dtype="bf16"))[4]) is HalfLinear


def test_only_halves_are_half():
    with pytest.raises(OptionError, match="is not a half precision"):
        HalfPrecision(torch.float32)
