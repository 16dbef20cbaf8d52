"""The config classes: fields, locals, dicts, addition. Cases are those of Neural Compressor's documentation."""

import json

import pytest
import torch

from adapterx.errors import OptionError
from adapterx.quant.configs import (
    AutoRoundConfig,
    AWQConfig,
    DynamicQuantConfig,
    FP8Config,
    GPTQConfig,
    HQQConfig,
    INT8StaticQuantConfig,
    MixedPrecisionConfig,
    MXQuantConfig,
    RTNConfig,
    SmoothQuantConfig,
    StaticQuantConfig,
    TEQConfig,
    as_config,
)
from adapterx.quant.gptq import GPTQ
from adapterx.quant.layer_config import ComposedConfig
from adapterx.quant.rtn import RTN
from adapterx.quant.scheme import DoubleScheme, Scheme

EVERY = [
    RTNConfig,
    GPTQConfig,
    HQQConfig,
    AutoRoundConfig,
    AWQConfig,
    TEQConfig,
    SmoothQuantConfig,
    INT8StaticQuantConfig,
    DynamicQuantConfig,
    MXQuantConfig,
    FP8Config,
    MixedPrecisionConfig,
]


@pytest.mark.parametrize("kind", EVERY)
def test_every_default_is_a_method(kind):
    assert kind().method() is not None


@pytest.mark.parametrize("kind", EVERY)
def test_an_unknown_field_is_named_with_the_nearest(kind):
    field = next(iter(kind.fields))
    with pytest.raises(OptionError, match=rf"no field '{field}x'; nearest is {field}"):
        kind(**{field + "x": 1})


def test_all_wrong_fields_are_told_at_once():
    with pytest.raises(OptionError) as caught:
        RTNConfig(bits=9, group_dim=0, model_path="somewhere", bitz=4)
    for word in ("bits=9", "group_dim=0", "model_path='somewhere'", "'bitz'"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (RTNConfig, "dtype", "int9"),
        (RTNConfig, "use_sym", 1),
        (RTNConfig, "group_size", 0),
        (RTNConfig, "double_quant_dtype", "fp8"),
        (GPTQConfig, "fp8_aware", True),
        (GPTQConfig, "percdamp", 0),
        (HQQConfig, "dtype", "nf4"),
        (AutoRoundConfig, "scheme", "GGUF:Q4_K_M"),
        (AutoRoundConfig, "act_bits", 8),
        (AWQConfig, "absorb_layer_dict", ["a"]),
        (TEQConfig, "use_mse_search", True),
        (SmoothQuantConfig, "alpha", 2),
        (SmoothQuantConfig, "shared_criterion", "mean"),
        (AutoRoundConfig, "target_bits", [7.2, 7.5]),
        (INT8StaticQuantConfig, "act_algo", "kl"),
        (INT8StaticQuantConfig, "excluded_precisions", ["bf16"]),
        (MXQuantConfig, "w_dtype", "bfloat16"),
        (FP8Config, "mode", "MEASURE"),
        (FP8Config, "scale_method", "opt_hw"),
        (MixedPrecisionConfig, "dtype", "fp8"),
    ],
)
def test_a_value_that_is_not_implemented_is_an_error_naming_it(kind, field, value):
    with pytest.raises(OptionError, match=rf"{field}=.* is not implemented; expected"):
        kind(**{field: value})
    config = kind()
    with pytest.raises(OptionError, match=field):
        setattr(config, field, value)


def test_fields_set_later_count():
    config = RTNConfig()
    config.bits, config.use_sym = 3, False
    assert config.method() == RTN(Scheme(bits=3, symmetric=False))


def test_a_full_range_of_what_has_none_is_an_error():
    for config in (RTNConfig(dtype="nf4", use_full_range=True), RTNConfig(use_sym=False, use_full_range=True)):
        with pytest.raises(OptionError, match="use_full_range"):
            config.method()


def test_dtypes_say_how_wide_codes_are():
    assert RTNConfig(dtype="int8").method() == RTN(Scheme(bits=8))
    assert RTNConfig(dtype="int", bits=3).method() == RTN(Scheme(bits=3))
    assert RTNConfig(dtype="fp4").method().scheme.format == "fp4"
    assert RTNConfig(dtype="fp4_e2m1_bnb").method().scheme.format == "fp4"
    assert RTNConfig(dtype="fp8_e4m3fn").method().scheme.format == "float8_e4m3fn"
    assert RTNConfig(dtype="fp32").method() is None


def test_options_reach_the_method():
    config = GPTQConfig(bits=3, act_order=True, static_groups=True, percdamp=0.1, use_double_quant=True, block_size=64)
    scheme = Scheme(bits=3, double=DoubleScheme(8, 256, symmetric=False))
    assert config.method() == GPTQ(scheme, act_order=True, static_groups=True, percdamp=0.1, block_size=64)


def test_alphas_are_tried_from_the_least_to_the_most():
    config = SmoothQuantConfig(alpha="auto", alpha_min=0.3, alpha_max=0.7, alpha_step=0.1, do_blockwise=True)
    assert config.method().alphas == (0.3, 0.4, 0.5, 0.6, 0.7)
    assert config.method().blockwise
    with pytest.raises(OptionError, match=r"alpha_min=0\.9 is above alpha_max=0\.7"):
        SmoothQuantConfig(alpha_min=0.9, alpha_max=0.7).method()


def test_producers_without_folding_are_an_error():
    known = {"norm": ["q", "k"]}
    assert AWQConfig(folding=True, absorb_layer_dict=known).method().absorb == known
    with pytest.raises(OptionError, match="absorb_layer_dict needs folding=True"):
        AWQConfig(absorb_layer_dict=known).method()


def test_autoround_takes_what_is_not_set_from_its_scheme():
    assert AutoRoundConfig().method().scheme == Scheme(bits=4, group_size=128)
    assert AutoRoundConfig(scheme="W2A16G64").method().scheme == Scheme(bits=2, group_size=64)
    assert AutoRoundConfig(bits=3, use_sym=False).method().scheme == Scheme(bits=3, group_size=128, symmetric=False)


def test_static_quant_config_is_int8_or_fp8_by_its_fields():
    assert type(StaticQuantConfig()) is INT8StaticQuantConfig
    assert type(StaticQuantConfig(fp8_config="E5M2")) is FP8Config
    assert type(StaticQuantConfig.from_dict({"act_sym": True})) is INT8StaticQuantConfig


def test_weights_and_inputs_stay_float_together():
    assert StaticQuantConfig(w_dtype="fp32", act_dtype="fp32").method() is None
    with pytest.raises(OptionError, match="both are 'fp32', or neither"):
        StaticQuantConfig(w_dtype="fp32").method()


@pytest.mark.parametrize("kind", EVERY)
def test_dicts_and_json_hold_all_there_is(kind, tmp_path):
    config = kind().set_local("fc1", kind(white_list=["a"])).set_local(torch.nn.Linear, RTNConfig(dtype="fp32"))
    again = kind.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert again.to_dict() == config.to_dict()
    config.to_json_file(tmp_path / "config.json")
    assert kind.from_json_file(tmp_path / "config.json") == config


def test_a_dict_without_locals_is_its_fields():
    assert RTNConfig(bits=8).to_dict()["bits"] == 8
    assert RTNConfig.from_dict({"bits": 8}) == RTNConfig(bits=8)
    with pytest.raises(OptionError, match="'extra' beside 'global' and 'local'"):
        RTNConfig.from_dict({"global": {}, "extra": {}})


def test_a_dict_names_its_algorithm():
    assert as_config({"rtn": {"global": {"bits": 8}, "local": {"fc1": {"bits": 4}}}}) == RTNConfig(bits=8).set_local(
        "fc1", RTNConfig()
    )
    both = as_config({"rtn": {"bits": 8}, "gptq": {"white_list": [".*attn"]}})
    assert [type(config) for config in both.configs] == [RTNConfig, GPTQConfig]
    assert both.configs[1].white_list == [".*attn"]
    with pytest.raises(OptionError, match="no algorithm 'rtm'; nearest is rtn"):
        as_config({"rtm": {}})


def test_as_config_gives_a_config_of_its_own():
    mine = RTNConfig()
    found = as_config(mine)
    mine.bits = 8
    assert found.bits == 4


def test_configs_of_one_class_are_merged_under_the_left_global():
    # The cases of Neural Compressor's test_same_type_configs_addition.
    left = RTNConfig(dtype="nf4")
    right = RTNConfig(bits=8).set_local("fc1", RTNConfig(dtype="int8"))
    found = left + right
    assert isinstance(found, RTNConfig)
    assert found.dtype == "nf4"
    assert [key for key, _ in found.locals] == ["fc1"]
    assert left.locals == []


def test_a_white_list_is_merged_as_locals():
    found = RTNConfig(bits=4) + RTNConfig(bits=6, white_list=["fc1"])
    assert found.to_dict()["local"]["fc1"]["bits"] == 6
    assert found.bits == 4
    turned = RTNConfig(bits=6, white_list=["fc1"]) + RTNConfig(bits=4)
    assert turned.bits == 4
    assert turned.to_dict()["local"]["fc1"]["bits"] == 6


def test_adding_what_adds_nothing_is_an_error():
    with pytest.raises(OptionError, match="adds nothing"):
        RTNConfig(bits=8) + RTNConfig(bits=4)


def test_configs_of_several_classes_are_composed():
    found = RTNConfig() + GPTQConfig(white_list=["a"]) + GPTQConfig(bits=8, white_list=["b"]) + HQQConfig()
    assert isinstance(found, ComposedConfig)
    assert [type(config) for config in found.configs] == [RTNConfig, GPTQConfig, HQQConfig]
    assert ComposedConfig.from_dict(json.loads(found.to_json_string())) == found


def test_lists_expand_and_later_fields_vary_fastest():
    found = RTNConfig(bits=[4, 6], use_sym=[True, False]).expand()
    assert [(one.bits, one.use_sym) for one in found] == [(4, True), (4, False), (6, True), (6, False)]
    assert [one.dtype for one in MixedPrecisionConfig(dtype=["fp16", "bf16"]).expand()] == ["fp16", "bf16"]
    assert RTNConfig(white_list=["a", "b"]).expand() == [RTNConfig(white_list=["a", "b"])]


def test_a_list_where_one_value_is_meant_is_an_error():
    with pytest.raises(OptionError, match=r"bits=\[4, 6\] is a list of trials for autotune"):
        RTNConfig(bits=[4, 6]).method()
    with pytest.raises(OptionError, match="bits=\\[4, 60\\]"):
        RTNConfig(bits=[4, 60])


def test_a_printed_config_shows_what_is_not_default():
    assert repr(RTNConfig(bits=8).set_local("a", GPTQConfig())) == "RTNConfig(bits=8).set_local('a', GPTQConfig())"


def test_set_local_takes_names_classes_and_lists():
    config = RTNConfig().set_local(["a", torch.nn.Linear], RTNConfig(bits=8)).set_local("a", RTNConfig(bits=2))
    assert [(key, own.bits) for key, own in config.locals] == [(torch.nn.Linear, 8), ("a", 2)]
    with pytest.raises(OptionError, match="expected a module's name"):
        config.set_local(3, RTNConfig())
    with pytest.raises(OptionError, match="expected a config"):
        config.set_local("a", {"bits": 4})
