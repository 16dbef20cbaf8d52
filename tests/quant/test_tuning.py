"""autotune: which configs are tried, when it stops, and what it gives back, for metrics of either direction."""

import math

import pytest
import torch

from adapterx.errors import OptionError
from adapterx.quant import tuning
from adapterx.quant.configs import GPTQConfig, HQQConfig, MixedPrecisionConfig, RTNConfig
from adapterx.quant.default_configs import get_all_config_set, get_rtn_double_quant_config_set, get_woq_tuning_config
from adapterx.quant.mixed_precision import HalfLinear
from adapterx.quant.tuning import TuningConfig, autotune
from tests.quant.tiny import bits_of, convolutional, error, llama, logits, run, same


def scores(*values):
    """An eval_fn that gives one value after another."""
    left = list(values)
    return lambda model: left.pop(0)


@pytest.fixture
def quantized(monkeypatch):
    """How often a model was quantized."""
    calls = []
    whole = tuning.quantize

    def counted(*args, **kwargs):
        calls.append(args[1])
        return whole(*args, **kwargs)

    monkeypatch.setattr(tuning, "quantize", counted)
    return calls


def test_it_stops_at_the_first_config_that_is_good_enough(quantized):
    tried = TuningConfig([RTNConfig(bits=[2, 4, 8])], tolerable_loss=0.01)
    model = llama()
    found = autotune(model, tried, scores(1.0, 0.9, 0.995))
    assert set(bits_of(found).values()) == {4}
    assert [config.bits for config in quantized] == [2, 4]
    assert [trial.result for trial in found.trials] == [0.9, 0.995]
    assert found.baseline == 1.0
    assert not bits_of(model)
    assert not hasattr(model, "is_prepared")


def test_where_none_is_good_enough_the_best_is_kept_and_not_made_again(quantized):
    tried = TuningConfig(RTNConfig(bits=[2, 8, 4]), tolerable_loss=-0.01)
    found = autotune(llama(), tried, scores(1.0, 0.7, 0.99, 0.9))
    assert set(bits_of(found).values()) == {8}
    assert len(quantized) == 3


@pytest.mark.parametrize(
    ("loss", "baseline", "result", "met"),
    [
        (0.01, 1.0, 0.99, True),
        (0.01, 1.0, 0.98, False),
        (0.1, 1.0, 0.91, True),
        (-0.01, 1.0, 1.0, False),
        (-0.01, 1.0, 1.02, True),
        (0.01, -2.0, -2.01, True),
        (0.01, -2.0, -2.1, False),
        (0.01, 0.0, 0.0, True),
        (0.01, 0.0, -0.001, False),
    ],
)
def test_what_is_tolerated_is_a_share_of_the_baseline_whatever_its_sign(loss, baseline, result, met):
    assert TuningConfig(RTNConfig(), tolerable_loss=loss).is_met(result, baseline) == met
    # The same, mirrored, for a metric where lower is better.
    assert TuningConfig(RTNConfig(), tolerable_loss=loss, goal="lower").is_met(-result, -baseline) == met


@pytest.mark.parametrize("lower", [{"goal": "lower"}, {"higher_is_better": False}])
def test_perplexity_is_better_when_it_is_lower(lower):
    def perplexity(model):
        return 20 + 100 * error(model, reference)

    model = llama()
    reference = logits(model)
    tried = TuningConfig(RTNConfig(bits=[2, 3, 8], use_sym=False), tolerable_loss=0.001, **lower)
    assert set(bits_of(autotune(model, tried, perplexity)).values()) == {8}
    found = autotune(model, TuningConfig(RTNConfig(bits=[2, 4, 3]), tolerable_loss=-0.5, **lower), perplexity)
    assert set(bits_of(found).values()) == {4}


def test_a_goal_may_be_a_function():
    found = autotune(
        llama(), TuningConfig(RTNConfig(bits=[2, 3, 4]), goal=lambda r, b: r > b - 0.5), scores(1, 0.1, 0.6, 2)
    )
    assert set(bits_of(found).values()) == {3}


def test_lists_expand_in_order_and_equal_configs_are_tried_once():
    tried = TuningConfig([RTNConfig(bits=[4, 8]), RTNConfig(), HQQConfig(), {"rtn": {"bits": 8}}])
    assert tried.configs() == [RTNConfig(), RTNConfig(bits=8), HQQConfig()]
    assert TuningConfig(RTNConfig(bits=[2, 3, 4]), max_trials=2).configs() == [RTNConfig(bits=2), RTNConfig(bits=3)]
    backwards = TuningConfig(RTNConfig(bits=[2, 3, 4]), sampler=lambda configs: configs[::-1], max_trials=1)
    assert backwards.configs() == [RTNConfig(bits=4)]


def test_sums_expand_too():
    tried = TuningConfig(RTNConfig(bits=[4, 8]) + GPTQConfig(bits=[3, 4], white_list=["a"]))
    assert [[one.bits for one in both.configs] for both in tried.configs()] == [[4, 3], [4, 4], [8, 3], [8, 4]]


def test_arguments_reach_both_functions():
    found = autotune(
        llama(),
        TuningConfig(GPTQConfig(white_list=[".*q_proj"])),
        lambda model, weight: weight * 1.0,
        eval_args=(2,),
        run_fn=run,
    )
    assert found.baseline == 2.0
    assert len(bits_of(found)) == 2


def test_half_precision_is_tuned_over_its_dtypes():
    model = convolutional()
    found = autotune(model, TuningConfig(MixedPrecisionConfig(dtype=["fp16", "bf16"])), scores(1.0, 0.5, 1.0))
    assert isinstance(found[3], HalfLinear)
    assert found[3].weight.dtype == torch.bfloat16


def test_nothing_to_try_is_an_error():
    for wrong in (None, []):
        with pytest.raises(OptionError, match="config_set is empty"):
            TuningConfig(wrong)
    with pytest.raises(OptionError, match="max_trials=0"):
        TuningConfig(RTNConfig(), max_trials=0)
    with pytest.raises(OptionError, match="goal='best'"):
        TuningConfig(RTNConfig(), goal="best")
    with pytest.raises(OptionError, match="higher_is_better"):
        TuningConfig(RTNConfig(), goal="lower", higher_is_better=True)


def test_a_result_that_is_no_number_never_wins():
    found = autotune(llama(), TuningConfig(RTNConfig(bits=[2, 8])), scores(1.0, math.nan, 0.5))
    assert set(bits_of(found).values()) == {8}


def test_the_known_sets_are_there():
    assert [config.dtype for config in get_rtn_double_quant_config_set()] == ["nf4", "int"]
    assert {config.name for config in get_woq_tuning_config()} == {"rtn", "gptq", "autoround", "awq"}
    assert all(config.use_sym is False and config.group_size == 32 for config in get_woq_tuning_config())
    names = [config.name for config in get_all_config_set()]
    assert len(set(names)) == len(names) >= 12
    model = llama()
    found = autotune(model, TuningConfig(get_rtn_double_quant_config_set(), tolerable_loss=1), scores(1.0, 1.0))
    assert not same(found, model)
