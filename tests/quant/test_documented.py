"""What Neural Compressor's own tests and documents say of its methods, on tiny models."""

import copy

import pytest
import torch
from torch import nn

from adapterx.quant.configs import (
    AWQConfig,
    GPTQConfig,
    RTNConfig,
    TEQConfig,
)
from adapterx.quant.default_configs import get_default_double_quant_config
from adapterx.quant.linear import quant_layers
from adapterx.quant.verbs import quantize
from tests.quant.tiny import bits_of, error, llama, logits, run, same

MIXED = RTNConfig(white_list=[".*mlp"]) + GPTQConfig(white_list=[".*attn"])


@pytest.mark.parametrize(
    ("bits", "use_sym", "group_size"), [(8, True, -1), (4, True, 32), (4, False, 32), (4, False, -1), (2, True, 8)]
)
def test_rtn_by_bits_and_groups(bits, use_sym, group_size):
    model = llama()
    reference = logits(model)
    quantize(model, RTNConfig(bits=bits, use_sym=use_sym, group_size=group_size))
    assert not torch.equal(logits(model), reference)
    if bits == 8:
        assert torch.allclose(logits(model), reference, atol=0.01)


def test_mse_search_and_full_range_reduce_the_error():
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight.detach()

    def wrong(**fields):
        found = quantize(copy.deepcopy(model), RTNConfig(bits=3, **fields)).model.layers[0].mlp.up_proj.weight
        return float((found - weight).square().mean())

    assert wrong(use_mse_search=True) < wrong()
    assert wrong(use_full_range=True) < wrong()


@pytest.mark.parametrize("dtype", ["int4", "nf4", "fp4", "fp4_e2m1_bnb", "fp4_e2m1", "fp8_e4m3fn", "fp8_e5m2"])
def test_every_dtype_is_near_and_the_same_twice(dtype):
    model = llama()
    reference = logits(model)
    one, two = (quantize(model, RTNConfig(dtype=dtype), inplace=False) for _ in range(2))
    assert 0 < error(one, reference) < 0.03
    assert same(one, two)


def test_locals_mix_bits_and_formats():
    config = RTNConfig(use_sym=False)
    config.set_local(".*mlp.*", RTNConfig(bits=8)).set_local(".*o_proj", RTNConfig(bits=6))
    config.set_local(".*k_proj", RTNConfig(dtype="nf4"))
    layers = dict(quant_layers(quantize(llama(), config)))
    assert layers["model.layers.0.mlp.up_proj"].bits == 8
    assert layers["model.layers.0.self_attn.o_proj"].bits == 6
    assert layers["model.layers.0.self_attn.k_proj"].format == "nf4"


@pytest.mark.parametrize("name", ["BNB_NF4", "GGML_TYPE_Q4_K"])
def test_double_quantization_stays_near_the_scales(name):
    model = llama()
    reference = logits(model)
    double = get_default_double_quant_config(name)
    single = copy.deepcopy(double)
    single.use_double_quant = False
    twice, once = (error(quantize(model, c, inplace=False), reference) for c in (double, single))
    assert twice < 1.5 * once


def test_asymmetric_double_quantization_is_better_than_symmetric():
    model = llama()
    weights = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, nn.Linear)}

    def wrong(sym):
        found = quantize(
            model, RTNConfig(use_double_quant=True, double_quant_bits=4, double_quant_use_sym=sym), inplace=False
        )
        return sum(float((layer.weight - weights[name]).square().sum()) for name, layer in quant_layers(found))

    assert wrong(False) < wrong(True)


def test_methods_mix_in_one_walk():
    model = llama()
    reference = logits(model)
    mixed = quantize(model, MIXED, run, inplace=False)
    plain = quantize(model, RTNConfig(), inplace=False)
    assert len(bits_of(mixed)) == 14
    assert error(mixed, reference) < error(plain, reference)
    # The layers of RTN are what RTN makes of them, those of GPTQ are not.
    gate = "model.layers.1.mlp.gate_proj"
    assert torch.equal(mixed.get_submodule(gate).qweight, plain.get_submodule(gate).qweight)
    query = "model.layers.1.self_attn.q_proj"
    assert not torch.equal(mixed.get_submodule(query).qweight, plain.get_submodule(query).qweight)


def test_learnt_scales_need_no_training_loop():
    found = quantize(llama(layers=1), TEQConfig(bits=2, white_list=[".*up_proj"]), run)
    assert dict(quant_layers(found))["model.layers.0.mlp.up_proj"].pre_scale is not None
    assert found.folds == ()


def test_the_head_is_calibrated_too():
    model = llama(tied=True)
    found = quantize(model, GPTQConfig(quant_lm_head=True), run, inplace=False)
    assert len(bits_of(found)) == 15


def test_folded_scales_are_told_and_others_stay_in_front():
    model = llama()
    reference, norm = logits(model), model.model.layers[0].input_layernorm.weight.detach().clone()
    folded = quantize(model, AWQConfig(folding=True), run, inplace=False)
    assert folded.folds
    assert all(fold.producer.startswith("model.layers.") for fold in folded.folds)
    assert not torch.equal(folded.model.layers[0].input_layernorm.weight, norm)
    plain = quantize(model, AWQConfig(), run, inplace=False)
    assert plain.folds == ()
    assert torch.equal(plain.model.layers[0].input_layernorm.weight, norm)
    for found in (folded, plain):
        assert 0 < error(found, reference) < 0.02


def test_nothing_is_folded_where_another_method_has_a_reader_of_the_same_input():
    config = AWQConfig(folding=True, white_list=[".*k_proj", ".*v_proj"]) + RTNConfig(white_list=[".*q_proj"])
    model = llama()
    reference = logits(model)
    assert quantize(model, config, run).folds == ()
    assert 0 < error(model, reference) < 0.02
