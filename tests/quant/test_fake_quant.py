"""Quantization-aware training: what is trained is what is frozen, gradients reach every weight, and training helps."""

import copy

import pytest
import torch
from torch import nn

from adapterx.errors import ModelError, OptionError
from adapterx.quant.configs import GPTQConfig, MXQuantConfig, RTNConfig
from adapterx.quant.fake_quant import FakeQuantLinear, prepare_qat
from adapterx.quant.linear import QuantLinear, quant_layers
from adapterx.quant.mx import MX, mx
from adapterx.quant.verbs import convert, quantize
from tests.quant.tiny import batches, error, gpt2, llama, logits


def test_layers_are_trained_as_mxfp8_by_default_and_the_head_is_not():
    model = llama().train()
    assert prepare_qat(model) is model
    layers = [module for module in model.modules() if isinstance(module, FakeQuantLinear)]
    assert len(layers) == 14
    assert {layer.method for layer in layers} == {MX("mxfp8_e4m3", "mxfp8_e4m3")}
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("mapping", [None, {nn.Linear: "MXFP4"}, {nn.Linear: RTNConfig(bits=3)}])
def test_what_is_trained_is_what_convert_freezes_bit_for_bit(mapping):
    model = prepare_qat(llama().train(), mapping)
    trained = logits(model)
    frozen = convert(model, inplace=False)
    assert torch.equal(logits(frozen), trained)
    assert len(list(quant_layers(frozen))) == 14
    assert convert(model) is model
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)


def test_the_grid_is_that_of_the_method_without_training():
    model = llama().train()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    convert(prepare_qat(model, {nn.Linear: "MXFP4"}))
    expected = mx(weight, MX("mxfp4", "mxfp4"))
    assert torch.equal(model.model.layers[0].mlp.up_proj.quantized.codes, expected.codes)


def test_every_parameter_gets_a_gradient_and_parameters_keep_their_names():
    model = llama().train()
    names = [name for name, _ in model.named_parameters()]
    prepare_qat(model)
    assert [name for name, _ in model.named_parameters()] == names
    ids = batches(1)[0]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in model.parameters())


def test_the_gradient_of_a_rounding_is_that_of_doing_nothing():
    layer = FakeQuantLinear(nn.Linear(32, 4, bias=False), RTNConfig(bits=8).method())
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    weight = layer.frozen().weight
    assert torch.allclose(x.grad, weight.sum(0).expand(3, 32), atol=1e-6)
    assert torch.allclose(layer.weight.grad, x.detach().sum(0).expand(4, 32), atol=1e-6)


def test_training_through_the_rounding_beats_rounding_afterwards():
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    teacher = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    target = teacher(x).detach()
    afterwards = quantize(copy.deepcopy(teacher), RTNConfig(bits=2))
    model = prepare_qat(teacher.train(), {nn.Linear: RTNConfig(bits=2)})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        optimizer.step()
    frozen = convert(model)
    wrong = [float(nn.functional.mse_loss(one(x), target)) for one in (frozen, afterwards)]
    assert wrong[0] < wrong[1] / 2


def test_conv1d_is_trained_where_it_is_asked_for():
    model = gpt2().train()
    conv1d = type(model.transformer.h[0].mlp.c_fc)
    reference = logits(copy.deepcopy(model).eval())
    prepare_qat(model, {conv1d: "MXFP8"})
    assert error(convert(model).eval(), reference) < 1e-2


def test_a_copy_is_made_where_it_is_asked_for():
    model = llama().train()
    assert prepare_qat(model, inplace=False) is not model
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())


def test_wrong_models_and_mappings_are_errors():
    with pytest.raises(ModelError, match="in evaluation mode"):
        prepare_qat(llama())
    model = llama().train()
    with pytest.raises(OptionError, match=r"'MXFP5'.*nearest is MXFP"):
        prepare_qat(model, {nn.Linear: "MXFP5"})
    with pytest.raises(OptionError, match="cannot be trained with"):
        prepare_qat(model, {nn.Linear: GPTQConfig()})
    with pytest.raises(ModelError, match="no layer to train"):
        prepare_qat(model, {nn.Conv2d: "MXFP8"})
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="up_proj"):
        prepare_qat(model)
    assert not any(isinstance(module, FakeQuantLinear) for module in model.modules())
    assert MXQuantConfig().method() is not None
