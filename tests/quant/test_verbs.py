"""prepare, convert, quantize: the same weights by every way, and a model that is untouched when something is wrong."""

import copy
import io
import re

import pytest
import torch
from rich.console import Console
from torch import nn

from adapterx.errors import OptionError
from adapterx.quant.configs import (
    AutoRoundConfig,
    FP8Config,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    StaticQuantConfig,
)
from adapterx.quant.linear import QuantLinear, quant_layers
from adapterx.quant.storage import load
from adapterx.quant.verbs import convert, prepare, quantize
from tests.quant.tiny import batches, bits_of, error, gpt2, llama, logits, run, same, t5

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
    # Of transformers' own: it would take the flag for a quantizer of its own.
    assert not hasattr(model, "is_quantized")
    plain = torch.nn.Sequential(torch.nn.Linear(64, 8))
    assert quantize(plain, RTNConfig()).is_quantized
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


def test_a_model_that_computes_with_tying_keeps_saying_that_it_is_tied(tmp_path):
    # T5 scales its last states where head and embedding are tied.
    model = t5()
    ids = batches(1)[0]
    reference = model(input_ids=ids, decoder_input_ids=ids).logits.detach()
    quantize(model, RTNConfig(bits=8, quant_lm_head=True))
    found = model(input_ids=ids, decoder_input_ids=ids).logits.detach()
    assert float((found - reference).square().mean() / reference.square().mean()) < 1e-3
    assert model.config.tie_word_embeddings
    model.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(input_ids=ids, decoder_input_ids=ids).logits, found)


def test_an_encoder_and_a_decoder_are_two_chains():
    model = t5()
    ids = batches(1)[0]
    calls = lambda model: [model(input_ids=ids, decoder_input_ids=ids) for _ in range(2)]  # noqa: E731
    reference = model(input_ids=ids, decoder_input_ids=ids).logits.detach()
    found = [quantize(model, config, calls, inplace=False) for config in (GPTQConfig(), RTNConfig())]
    wrong = [float((one(input_ids=ids, decoder_input_ids=ids).logits - reference).square().mean()) for one in found]
    assert len(bits_of(found[0])) == 32
    assert wrong[0] < wrong[1] / 2


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


def test_nothing_is_dropped_out_while_blocks_are_quantized():
    model = prepare(gpt2().train(), GPTQConfig())
    run(model)
    state = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_save_is_bound_and_the_old_one_is_kept(tmp_path):
    model = llama()
    model.save = lambda: "mine"
    quantize(model, RTNConfig())
    assert model.orig_save() == "mine"
    model.save(tmp_path / "saved")
    assert sorted(path.suffix for path in (tmp_path / "saved").iterdir()) == [".json", ".json", ".json", ".safetensors"]
    # The method of a copy is the copy's.
    assert copy.deepcopy(model).save.__self__ is not model


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
