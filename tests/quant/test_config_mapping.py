"""Which layer gets which method: precedence, classes and names, heads, sums, and keys that match nothing."""

import peft
import pytest
import torch
from torch import nn

from adapterx.errors import ModelError, OptionError
from adapterx.quant.config_mapping import config_mapping, method_mapping
from adapterx.quant.configs import (
    DynamicQuantConfig,
    FP8Config,
    GPTQConfig,
    HQQConfig,
    MixedPrecisionConfig,
    MXQuantConfig,
    RTNConfig,
)
from tests.quant.tiny import convolutional, gpt2, llama

KEEP = RTNConfig(dtype="fp32")


def bits(model, config):
    return {name: chosen.bits for name, chosen in config_mapping(model, config).items()}


def under(found, part):
    return {value for name, value in found.items() if part in name}


@pytest.fixture
def three():
    return nn.ModuleDict({name: nn.Linear(32, 32) for name in ("fc1", "fc2", "fc3")})


def test_a_prefix_of_a_name_is_a_regular_expression_that_matches(three):
    assert bits(three, RTNConfig().set_local("fc", RTNConfig(bits=2))) == {"fc1": 2, "fc2": 2, "fc3": 2}
    assert bits(three, RTNConfig().set_local("fc[12]", RTNConfig(bits=2))) == {"fc1": 2, "fc2": 2, "fc3": 4}


def test_the_last_match_wins_among_names():
    model = llama()
    found = bits(model, RTNConfig().set_local(".*mlp.*", RTNConfig(bits=8)).set_local(".*down_proj", RTNConfig(bits=2)))
    assert under(found, "down_proj") == {2}
    assert under(found, "up_proj") == {8}
    assert under(found, "q_proj") == {4}
    turned = RTNConfig().set_local(".*down_proj", RTNConfig(bits=2)).set_local(".*mlp.*", RTNConfig(bits=8))
    assert under(bits(model, turned), "down_proj") == {8}


@pytest.mark.parametrize("key", [nn.Linear, "Linear"])
def test_a_class_or_its_name_is_a_type_and_names_win_over_types(three, key):
    config = RTNConfig().set_local("fc1", RTNConfig(bits=2)).set_local(key, RTNConfig(bits=8))
    assert bits(three, config) == {"fc1": 2, "fc2": 8, "fc3": 8}


def test_the_documented_string_conv1d_keeps_layers_float():
    assert config_mapping(gpt2(), RTNConfig().set_local("Conv1D", KEEP)) == {}
    found = config_mapping(convolutional(), MixedPrecisionConfig().set_local("Conv1d", KEEP))
    assert list(found) == ["3", "4"]


def test_a_class_of_torch_that_the_model_lacks_may_be_kept_float_but_not_be_quantized(three):
    assert bits(three, RTNConfig().set_local("Conv1d", KEEP)) == {"fc1": 4, "fc2": 4, "fc3": 4}
    with pytest.raises(OptionError, match="'Conv1d'"):
        config_mapping(three, RTNConfig().set_local("Conv1d", RTNConfig(bits=8)))


def test_fp32_keeps_layers_float(three):
    assert list(config_mapping(three, RTNConfig().set_local("fc2", KEEP))) == ["fc1", "fc3"]
    assert config_mapping(three, RTNConfig(dtype="fp32")) == {}
    assert list(config_mapping(three, KEEP.from_dict(KEEP.to_dict()).set_local("fc2", RTNConfig()))) == ["fc2"]


def test_a_white_list_leaves_the_rest_float(three):
    assert list(config_mapping(three, RTNConfig(white_list=["fc2"]))) == ["fc2"]
    assert list(config_mapping(three, RTNConfig(white_list=[nn.Linear]))) == ["fc1", "fc2", "fc3"]
    config = RTNConfig(white_list=["fc2"]).set_local("fc3", RTNConfig(bits=8))
    assert bits(three, config) == {"fc2": 4, "fc3": 8}


@pytest.mark.parametrize("key", ["fc4", "Conv9d", "["])
@pytest.mark.parametrize("where", ["local", "white_list"])
def test_what_matches_nothing_is_an_error_naming_it(three, key, where):
    config = RTNConfig().set_local(key, KEEP) if where == "local" else RTNConfig(white_list=[key])
    with pytest.raises(OptionError) as caught:
        config_mapping(three, config)
    assert repr(key) in str(caught.value)


def test_what_matches_only_other_layers_is_an_error():
    with pytest.raises(OptionError, match="has no method for: Conv1d"):
        config_mapping(convolutional(), RTNConfig().set_local("Conv1d", RTNConfig(bits=8)))


def test_a_model_without_layers_for_it_is_an_error():
    with pytest.raises(ModelError, match="no float layer to quantize"):
        config_mapping(nn.Sequential(nn.LayerNorm(4)), RTNConfig())


def test_heads_are_skipped_unless_asked_for():
    model = llama()
    assert "lm_head" not in config_mapping(model, RTNConfig())
    assert "lm_head" in config_mapping(model, RTNConfig(quant_lm_head=True))
    # As in Neural Compressor this wins over a local one ...
    assert "lm_head" not in config_mapping(model, RTNConfig().set_local("lm_head", RTNConfig(bits=8)))
    # ... unless that asks for it itself.
    asked = RTNConfig().set_local("lm_head", RTNConfig(bits=8, quant_lm_head=True))
    assert bits(model, asked)["lm_head"] == 8


@pytest.mark.parametrize("config", [MXQuantConfig(), DynamicQuantConfig(), FP8Config(), MixedPrecisionConfig()])
def test_methods_without_such_a_field_take_the_head(config):
    assert "lm_head" in config_mapping(llama(), config)


def test_a_local_of_another_class_mixes_methods():
    methods = method_mapping(llama(), RTNConfig().set_local(".*attn", GPTQConfig(bits=8)))
    assert {type(method).__name__ for name, method in methods.items() if "attn" in name} == {"GPTQ"}
    assert {type(method).__name__ for name, method in methods.items() if "mlp" in name} == {"RTN"}


def test_a_sum_honours_the_global_config_beside_a_white_list():
    for config in (
        RTNConfig(bits=8) + GPTQConfig(white_list=[".*attn"]),
        GPTQConfig(white_list=[".*attn"]) + RTNConfig(bits=8),
    ):
        found = config_mapping(llama(), config)
        assert len(found) == 14
        assert {type(chosen) for name, chosen in found.items() if "attn" in name} == {GPTQConfig}
        assert {chosen.bits for name, chosen in found.items() if "mlp" in name} == {8}


def test_of_two_globals_the_left_has_what_both_could_take(three):
    model = convolutional()
    found = config_mapping(model, RTNConfig() + MixedPrecisionConfig())
    assert {name: type(chosen) for name, chosen in found.items()} == {
        "0": MixedPrecisionConfig,
        "3": RTNConfig,
        "4": RTNConfig,
    }
    with pytest.raises(OptionError, match=r"HQQConfig\(\) gets no layer"):
        config_mapping(three, RTNConfig() + HQQConfig())


def test_a_local_on_the_right_wins_over_one_on_the_left(three):
    left = RTNConfig().set_local("fc1", RTNConfig(bits=8))
    found = config_mapping(three, left + HQQConfig(white_list=["fc1"]))
    assert type(found["fc1"]) is HQQConfig


def test_blocked_and_allowed_names_and_types_are_honoured(three):
    three["cut"] = nn.Bilinear(2, 2, 2)
    assert list(config_mapping(three, FP8Config(blocklist={"names": ["fc2"], "types": ()}))) == ["fc1", "fc3"]
    assert list(config_mapping(three, FP8Config(allowlist={"names": ["fc2"], "types": ["Linear"]}))) == ["fc2"]
    assert config_mapping(three, FP8Config(blocklist={"types": [nn.Linear]})) == {}


def test_adapters_of_peft_stay_float():
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    found = config_mapping(model, RTNConfig())
    assert len(found) == 14
    assert not any("lora_" in name for name in found)


def test_the_same_layer_under_two_names_is_one(three):
    three["again"] = three["fc1"]
    assert list(config_mapping(three, RTNConfig())) == ["fc1", "fc2", "fc3"]
    assert torch.is_tensor(three["again"].weight)
