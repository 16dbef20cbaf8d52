"""prepare, convert, quantize: the same weights by every way, and a model that is untouched when something is wrong."""

import copy
import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn

from adapterx.errors import FeedError, ModelError, OptionError
from adapterx.quant import dispatch
from adapterx.quant.configs import (
    AutoRoundConfig,
    FP8Config,
    GPTQConfig,
    HQQConfig,
    MixedPrecisionConfig,
    RTNConfig,
    StaticQuantConfig,
    TEQConfig,
)
from adapterx.quant.default_configs import get_default_double_quant_config
from adapterx.quant.linear import QuantLinear, quant_layers
from adapterx.quant.verbs import convert, prepare, quantize
from tests.quant.tiny import batches, bits_of, error, gpt2, llama, logits, run, same

MIXED = RTNConfig(white_list=[".*mlp"]) + GPTQConfig(white_list=[".*attn"])


@pytest.mark.parametrize(
    "config",
    [
        RTNConfig(),
        HQQConfig(group_size=32),
        GPTQConfig(),
        AutoRoundConfig(group_size=32, iters=3),
        MIXED,
        StaticQuantConfig(),
        FP8Config(),
    ],
)
def test_prepare_run_convert_equals_quantize_bit_for_bit(config):
    model = llama()
    whole = quantize(model, config, run, inplace=False)
    parts = prepare(model, config, inplace=False)
    run(parts)
    assert same(convert(parts), whole)
    assert len(list(quant_layers(whole))) >= 14


@pytest.mark.parametrize("config", [RTNConfig(), GPTQConfig()])
def test_a_copy_is_quantized_when_it_is_not_in_place(config):
    model = llama()
    before, reference = copy.deepcopy(model), logits(model)
    prepared = prepare(model, config, inplace=False)
    assert prepared is not model
    run(prepared)
    found = convert(prepared, inplace=False)
    assert found is not prepared
    assert same(model, before)
    assert not hasattr(model, "is_prepared")
    # It is still prepared, and its copy is not.
    assert not any(module._forward_pre_hooks for module in found.modules())
    assert same(convert(copy.deepcopy(prepared)), found)
    assert torch.equal(logits(prepared), reference)
    assert bits_of(convert(prepared)) == bits_of(found)


def test_in_place_is_the_model_itself():
    model = llama()
    assert quantize(model, RTNConfig()) is model
    assert model.is_quantized
    assert model.quant_config == RTNConfig()
    assert not hasattr(model, "is_prepared")


def test_a_prepared_model_computes_as_before_and_says_so():
    model = llama()
    reference = logits(model)
    assert prepare(model, GPTQConfig(), example_inputs=batches(1)[0]) is model
    assert model.is_prepared
    assert torch.equal(logits(model), reference)


def test_convert_takes_a_config_where_no_data_is_needed():
    assert len(bits_of(convert(llama(), RTNConfig(bits=8)))) == 14
    assert len(bits_of(convert(llama(), {"rtn": {"bits": 8}}, inplace=False))) == 14
    with pytest.raises(OptionError, match="not prepared"):
        convert(llama())


def test_convert_refuses_another_config_than_it_was_prepared_with():
    model = prepare(llama(), RTNConfig())
    with pytest.raises(OptionError, match="was prepared with"):
        convert(model, RTNConfig(bits=8))
    assert set(bits_of(convert(model, RTNConfig())).values()) == {4}


def test_run_args_are_given_to_the_run_function():
    seen = []

    def with_args(model, data, times):
        seen.append(times)
        run(model, data)

    found = quantize(llama(), GPTQConfig(), with_args, (batches(), 2))
    one = quantize(llama(), GPTQConfig(), run, [batches()])
    assert seen == [2]
    assert same(found, one)


def test_calibration_in_inference_mode_is_as_good():
    def frozen(model):
        with torch.inference_mode():
            for ids in batches():
                model(ids)

    config = AutoRoundConfig(group_size=32, iters=3)
    assert same(quantize(llama(), config, frozen), quantize(llama(), config, run))


def test_what_is_quantized_is_what_is_in_memory():
    # Neural Compressor's default reads the weights again from the model's folder, and loses what was changed since.
    model = llama()
    model.name_or_path = "somewhere/else"
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.zero_()
    found = quantize(model, RTNConfig(use_layer_wise=True))
    assert all(float(layer.weight.abs().max()) == 0 for _, layer in quant_layers(found))


def test_a_tied_head_gets_its_own_copy_and_the_embedding_is_untouched():
    model = llama(tied=True)
    embedding = model.model.embed_tokens.weight
    before = embedding.detach().clone()
    quantize(model, RTNConfig(bits=8, quant_lm_head=True))
    assert isinstance(model.lm_head, QuantLinear)
    assert model.model.embed_tokens.weight is embedding
    assert torch.equal(embedding, before)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()


def test_conv1d_is_quantized_as_the_linear_layer_that_it_is():
    model = gpt2()
    reference = logits(model)
    quantize(model, RTNConfig(bits=8))
    assert len(bits_of(model)) == 8
    assert error(model, reference) < 1e-3


def test_the_mode_of_training_is_kept():
    model = llama().train()
    model.model.layers[0].eval()
    quantize(model, GPTQConfig(), run)
    assert model.training
    assert model.model.layers[1].mlp.up_proj.training
    assert not model.model.layers[0].mlp.up_proj.training


def test_save_is_bound_and_the_old_one_is_kept(tmp_path):
    model = llama()
    model.save = lambda: "mine"
    quantize(model, RTNConfig())
    assert model.orig_save() == "mine"
    model.save(tmp_path / "saved")
    assert sorted(path.suffix for path in (tmp_path / "saved").iterdir()) == [".json", ".json", ".json", ".safetensors"]
    # The method of a copy is the copy's.
    assert copy.deepcopy(model).save.__self__ is not model


# What Neural Compressor's own tests of its methods say.


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


# Bad input: typed errors, and the model as it was.


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


def test_progress_shows_blocks_errors_and_time_left_on_a_terminal_only(monkeypatch, capsys):
    quantize(llama(), GPTQConfig(), run)
    assert capsys.readouterr().err == ""
    screen = io.StringIO()
    monkeypatch.setattr(
        "adapterx.progress.Console", lambda stderr: Console(file=screen, force_terminal=True, width=120)
    )
    quantize(llama(), GPTQConfig(), run)
    shown = screen.getvalue()
    assert re.search(r"quantizing model\.layers\.1, error \d\.\de-\d+", shown)
    assert "14/14" in shown
    assert re.search(r"\d:\d\d:\d\d", shown)
