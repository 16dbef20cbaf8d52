"""AutoRound: rounding that is learnt loses less of a block's outputs, and of a language model's perplexity."""

import pytest
import torch
from torch import nn

from adapterx.errors import FeedError, ModelError, OptionError
from adapterx.quant import AutoRoundConfig, RTNConfig, quantize
from adapterx.quant.autoround import AutoRound, autoround
from adapterx.quant.linear import linear_weight
from adapterx.quant.rtn import RTN, rtn
from adapterx.quant.scheme import DoubleScheme, Scheme
from tests.quant import tiny
from tests.quant.language import language, perplexity, text
from tests.quant.shown import block_of, correlated, first_block, output_error, same, weight

X = correlated(64)
NOISY = Scheme(bits=2, group_size=16, symmetric=False)


def one(scheme, inputs=64, x=X, **options):
    module = nn.Sequential(nn.Linear(inputs, 24))
    with torch.no_grad():
        module[0].weight.copy_(weight(24, inputs))
    found = autoround(block_of(module, x.split(64)), {"0": AutoRound(scheme, **{"iters": 30, **options})})
    return found["0"], linear_weight(module[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_lose_less_than_by_rounding_to_nearest(bits, symmetric):
    scheme = Scheme(bits=bits, group_size=16, symmetric=symmetric)
    found, original = one(scheme)
    assert output_error(found, original, X) < 0.9 * output_error(rtn(original, RTN(scheme)), original, X)
    assert int(found.codes.max()) < 2**bits


@pytest.mark.parametrize("group", [-1, 24, 48, 1])
def test_any_group_fits(group):
    scheme = Scheme(bits=3, group_size=group, symmetric=False)
    found, original = one(scheme)
    assert output_error(found, original, X) <= output_error(rtn(original, RTN(scheme)), original, X)


def test_without_steps_it_is_round_to_nearest_bit_for_bit():
    for scheme in (NOISY, Scheme(bits=4, group_size=-1), Scheme(bits=4, double=DoubleScheme(bits=6, group_size=8))):
        found, original = one(scheme, iters=0)
        assert same(found, rtn(original, RTN(scheme)))


def test_steps_that_do_harm_are_taken_back():
    found, original = one(NOISY, lr=1.0, iters=1, minmax_lr=0.9)
    assert same(found, rtn(original, RTN(NOISY)))


def test_scales_that_are_quantized_are_those_that_codes_were_rounded_with():
    scheme = Scheme(bits=3, group_size=16, symmetric=False, double=DoubleScheme(bits=6, group_size=8))
    found, original = one(scheme)
    assert torch.equal(found.scales, found.double.values())
    assert output_error(found, original, X) < output_error(rtn(original, RTN(scheme)), original, X)


@pytest.mark.parametrize("made", [tiny.llama, tiny.gpt2])
def test_a_block_is_left_as_it_was_and_the_result_is_the_same_each_time(made):
    block, names = first_block(made())
    before = {name: part.clone() for name, part in block.module.state_dict().items()}
    torch.manual_seed(3)
    chance = torch.get_rng_state()
    layers = {name: AutoRound(NOISY, iters=5) for name in names}
    one, other = autoround(block, layers), autoround(block, layers)
    assert list(one) == names
    assert all(same(one[name], other[name]) for name in names)
    assert not all(same(one[n], rtn(linear_weight(block.module.get_submodule(n)), RTN(NOISY))) for n in names)
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(before[name], part) for name, part in block.module.state_dict().items())
    assert all(parameter.grad is None for parameter in block.module.parameters())


def test_layers_of_a_block_may_differ_in_bits_and_in_nothing_else():
    block, names = first_block(tiny.llama())
    mixed = {name: AutoRound(Scheme(bits=2 + index % 3, group_size=16), iters=2) for index, name in enumerate(names)}
    assert [found.bits for found in autoround(block, mixed).values()] == [2, 3, 4, 2, 3, 4, 2]
    with pytest.raises(OptionError, match=f"{names[0]} and {names[1]} differ"):
        autoround(block, {name: AutoRound(NOISY, iters=index) for index, name in enumerate(names)})


def test_what_cannot_be_learnt_is_refused():
    with pytest.raises(OptionError, match="not to 'nf4'"):
        AutoRound(Scheme(format="nf4"))
    with pytest.raises(OptionError, match="iters=-1"):
        AutoRound(iters=-1)
    with pytest.raises(FeedError, match="block: the calibration data give NaN"):
        one(NOISY, x=torch.full_like(X, float("nan")))
    module = nn.Sequential(nn.Linear(64, 4))
    with torch.no_grad():
        module[0].weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"block\.0: 1 of 256 weights"):
        autoround(block_of(module, [X]), {"0": AutoRound(NOISY)})


@pytest.mark.parametrize("twin", [False, True])
def test_a_language_model_in_two_bits_loses_less_perplexity(twin):
    shown, tokens = text().calibration(16, 64).split(8), text().evaluation(16, 128)
    found = {}
    for label, config in (("rtn", RTNConfig(**TWO)), ("autoround", AutoRoundConfig(iters=25, **TWO))):
        model = quantize(language(twin=twin), config, run_fn=tiny.run, run_args=(shown,))
        found[label] = perplexity(model, tokens)
    assert perplexity(language(), tokens) < found["autoround"] < 0.99 * found["rtn"]


TWO = {"bits": 2, "group_size": 32, "use_sym": False}
