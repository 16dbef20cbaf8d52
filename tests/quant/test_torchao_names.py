"""TorchAO's three schemes under its names: the grids, the filter, and layers that do not fit."""

import pytest
import torch
from torch import nn

from adapterx.errors import ModelError, OptionError
from adapterx.quant.linear import QuantLinear
from adapterx.quant.storage import load
from adapterx.quant.torchao_names import Int4WeightOnly, Int8DynamicActivationInt8Weight, Int8WeightOnly, quantize_
from tests.quant.tiny import bits_of, error, llama, logits


def test_int4_is_asymmetric_by_groups():
    model = nn.Sequential(nn.Linear(256, 8))
    weight = model[0].weight.detach().clone()
    assert quantize_(model, Int4WeightOnly()) is None
    assert (model[0].bits, model[0].group, model[0].scales.shape) == (4, 128, (8, 2))
    group = weight[0, :128]
    scale = (group.max().clamp(min=0) - group.min().clamp(max=0)) / 15
    assert torch.allclose(model[0].scales[0, 0], scale)
    assert float((model[0].weight[0, :128] - group).abs().max()) <= float(scale) / 2 * 1.01


def test_int8_is_symmetric_by_row():
    model = nn.Sequential(nn.Linear(256, 8))
    weight = model[0].weight.detach().clone()
    quantize_(model, Int8WeightOnly())
    assert model[0].qzeros is None
    assert torch.allclose(model[0].scales[:, 0], weight.abs().amax(1) / 127)
    quantize_(grouped := nn.Sequential(nn.Linear(256, 8)), Int8WeightOnly(group_size=64))
    assert grouped[0].scales.shape == (8, 4)


def test_dynamic_int8_is_by_token():
    model = llama()
    reference = logits(model)
    quantize_(model, Int8DynamicActivationInt8Weight())
    assert (model.lm_head.activation_format, model.lm_head.activation_per) == ("int8", "token")
    assert 0 < error(model, reference) < 1e-3


def test_the_filter_chooses_by_module_and_name():
    model = llama()
    quantize_(model, Int4WeightOnly(group_size=32), filter_fn=lambda module, name: "mlp" in name)
    assert len(bits_of(model)) == 6
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    with pytest.raises(ModelError, match="no linear layer that filter_fn lets through"):
        quantize_(model, Int4WeightOnly(), filter_fn=lambda module, name: False)


def test_a_tied_head_leaves_the_embedding():
    model = llama(tied=True)
    before = model.model.embed_tokens.weight.detach().clone()
    quantize_(model, Int8WeightOnly())
    assert len(bits_of(model)) == 15
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_layers_that_a_group_does_not_fit_are_an_error_and_nothing_is_changed():
    model = llama()
    with pytest.raises(OptionError, match="group_size=128 does not fit"):
        quantize_(model, Int4WeightOnly())
    assert not bits_of(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="lm_head"):
        quantize_(model, Int8WeightOnly())
    assert not bits_of(model)


def test_what_was_quantized_is_saved_without_pickle_and_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(64, 8))
    quantize_(model, Int8DynamicActivationInt8Weight())
    model.save(tmp_path / "saved")
    found = load(tmp_path / "saved", nn.Sequential(nn.Linear(64, 8)))
    x = torch.randn(3, 64)
    assert torch.equal(found(x), model(x))
    assert {path.suffix for path in (tmp_path / "saved").iterdir()} == {".json", ".safetensors"}
