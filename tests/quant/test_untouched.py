"""Bad input: typed errors, and the model as it was."""

import copy
import re

import pytest
import torch

from adapterx.errors import FeedError, ModelError, OptionError
from adapterx.quant import dispatch
from adapterx.quant.configs import (
    AWQConfig,
    GPTQConfig,
    MixedPrecisionConfig,
    RTNConfig,
)
from adapterx.quant.verbs import convert, prepare, quantize
from tests.quant.tiny import bits_of, llama, logits, run, same


def untouched(model, before, reference):
    assert same(model, before)
    assert torch.equal(logits(model), reference)
    assert not bits_of(model)
    for name in ("is_prepared", "is_quantized", "quant_config", "save"):
        assert not hasattr(model, name)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in before.named_modules()
    }


@pytest.mark.parametrize(
    ("config", "kind", "words"),
    [
        (RTNConfig(group_size=65), OptionError, "group_size=65 does not fit model.layers.0.self_attn.q_proj"),
        (RTNConfig().set_local("model.layerz", RTNConfig()), OptionError, "matches no module"),
        (RTNConfig(bits=[4, 8]), OptionError, "for autotune"),
        ({"rtn": {"bits": 11}}, OptionError, "bits=11"),
        (GPTQConfig(), FeedError, "the model was never called"),
        (None, OptionError, "expected a config"),
    ],
)
def test_a_call_that_fails_leaves_the_model_alone(config, kind, words):
    model = llama()
    before, reference = copy.deepcopy(model), logits(model)
    with pytest.raises(kind, match=re.escape(words)):
        quantize(model, config)
    untouched(model, before, reference)


@pytest.mark.parametrize("config", [RTNConfig(), GPTQConfig(), MixedPrecisionConfig()])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_before_anything_is_replaced(config, value):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj \(1 of 6144\)"):
        quantize(model, config, run)
    assert not bits_of(model)
    assert not hasattr(model, "is_prepared")


def test_data_that_never_reaches_a_layer_is_an_error_and_the_model_stays_prepared():
    model = prepare(llama(), GPTQConfig(white_list=["model.layers", "lm_head"], quant_lm_head=True))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj(torch.ones(1, 64))
    with pytest.raises(FeedError, match="never reached 14 of 15 layers"):
        convert(model)
    run(model)
    assert len(bits_of(convert(model))) == 15


def test_an_error_of_the_run_function_leaves_the_model_alone():
    model = llama()
    before, reference = copy.deepcopy(model), logits(model)

    def broken(model):
        run(model)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        quantize(model, GPTQConfig(), broken)
    untouched(model, before, reference)


@pytest.mark.parametrize("tied", [False, True])
def test_a_method_that_fails_midway_puts_the_float_model_back(monkeypatch, tied):
    model = llama(tied=tied)
    before, reference = copy.deepcopy(model), logits(model)
    calls = []

    def failing(block, layers):
        calls.append(block.name)
        if len(calls) == 2:
            with torch.no_grad():
                block.module.input_layernorm.weight.mul_(3)
            raise ModelError("midway")
        return dispatch.gptq(block, layers)

    monkeypatch.setitem(dispatch._OF_BLOCK, dispatch.GPTQ, failing)
    config = GPTQConfig(true_sequential=True, quant_lm_head=True) + RTNConfig(white_list=[".*up_proj"])
    with pytest.raises(ModelError, match="midway"):
        quantize(model, config, run)
    assert calls == ["model.layers.0", "model.layers.1"]
    untouched(model, before, reference)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.config.tie_word_embeddings == tied


def test_folds_are_taken_back_when_a_later_block_fails(monkeypatch):
    model = llama()
    before, reference = copy.deepcopy(model), logits(model)

    def failing(block, layers):
        if block.name == "model.layers.1":
            raise ModelError("midway")
        found = dispatch.awq(block, layers)
        assert block.folds
        return found

    monkeypatch.setitem(dispatch._OF_BLOCK, dispatch.AWQ, failing)
    with pytest.raises(ModelError, match="midway"):
        quantize(model, AWQConfig(folding=True), run)
    untouched(model, before, reference)
