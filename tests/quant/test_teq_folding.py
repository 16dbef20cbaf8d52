"""TEQ with folding: the learnt scales go into what produces the inputs."""

import copy

import pytest
import torch
from torch import nn

from adapterx.errors import MismatchError, OptionError
from adapterx.quant import QuantLinear, quantize
from adapterx.quant.scheme import Scheme
from adapterx.quant.teq import TEQ, teq
from tests.quant.many_heads import llama
from tests.quant.shown import first_block

NOISY = Scheme(bits=2, group_size=16, symmetric=False)
FAST = {"steps": 20, "lr": 0.05}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.fc2(self.fc1(x))


def test_the_float_block_computes_the_same_and_no_input_is_scaled():
    model = llama()
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[:3] *= 30
    block, names = first_block(model)
    before = block.outputs()
    found = teq(block, {name: TEQ(NOISY, folding=True, **FAST) for name in names})
    assert block.folds
    assert all(weight.pre_scale is None for weight in found.values())
    for now, then in zip(block.outputs(), before, strict=True):
        assert float((now - then).abs().max()) < 1e-5 * float(then.abs().max())


def test_only_the_named_consumers_get_a_scale():
    config = {"teq": {"global": {"bits": 2, "group_size": 16, "absorb_to_layer": {"fc1": ["fc2"]}}}}
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 5, 32)
    model = quantize(Two(), config, run_fn=lambda shown: shown(x))
    assert isinstance(model.fc1, QuantLinear)
    assert model.fc1.pre_scale is None
    assert model.fc2.pre_scale is not None


def test_what_is_named_is_folded_into_its_producer():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 5, 32)
    config = {"teq": {"bits": 2, "group_size": 16, "folding": True, "absorb_to_layer": {"fc1": ["fc2"]}}}
    original = Two()
    model = quantize(copy.deepcopy(original), config, run_fn=lambda shown: shown(x))
    assert model.fc2.pre_scale is None
    assert [(fold.producer, fold.consumers) for fold in model.folds] == [("fc1", ("fc2",))]
    plain = quantize(copy.deepcopy(original), {"rtn": {"bits": 2, "group_size": 16}})
    want = original(x)
    assert float((model(x) - want).square().mean()) < float((plain(x) - want).square().mean())


def test_a_producer_that_is_none_is_refused():
    block, names = first_block(llama())
    absorb = {"self_attn.q_proj": ["self_attn.o_proj"]}
    with pytest.raises(MismatchError, match="a scale cannot move"):
        teq(block, {name: TEQ(NOISY, folding=True, absorb=absorb, **FAST) for name in names})


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(OptionError, match="absorb_to_layer: no module 'fc9'"):
        quantize(Two(), {"teq": {"absorb_to_layer": {"fc1": ["fc9"]}}}, run_fn=lambda shown: shown(torch.ones(2, 32)))
