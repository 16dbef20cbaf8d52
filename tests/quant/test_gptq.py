"""GPTQ: less error than rounding to nearest, on the same grids, in whichever order."""

import dataclasses

import pytest
import torch
from torch import nn

from adapterx.errors import FeedError, ModelError, OptionError
from adapterx.quant.affine import codes_of, grouped
from adapterx.quant.gptq import GPTQ, gptq, solved
from adapterx.quant.linear import as_quantized, linear_weight, replace
from adapterx.quant.rtn import RTN, rtn
from adapterx.quant.scheme import DoubleScheme, Scheme
from tests.quant import tiny
from tests.quant.shown import block_of, correlated, first_block, output_error, same, weight

X = correlated(64)
MOMENT = X.T @ X / len(X)
W = weight(48, 64)
ORDERS = [{}, {"act_order": True}, {"static_groups": True}, {"act_order": True, "static_groups": True}]
ORDERS += [{"hybrid_order": True}, {"hybrid_order": True, "static_groups": True}]


@pytest.mark.parametrize("options", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_lose_less_than_by_rounding_to_nearest(bits, symmetric, options):
    scheme = Scheme(bits=bits, group_size=16, symmetric=symmetric)
    found = solved(W, MOMENT, GPTQ(scheme, **options))
    assert output_error(found, W, X) < 0.6 * output_error(rtn(W, RTN(scheme)), W, X)


@pytest.mark.parametrize(
    "scheme", [Scheme(format="nf4"), Scheme(format="mxfp4"), Scheme(format="fp4", double=DoubleScheme())]
)
def test_tables_take_part_too(scheme):
    assert output_error(solved(W, MOMENT, GPTQ(scheme)), W, X) < output_error(rtn(W, RTN(scheme)), W, X)


@pytest.mark.parametrize("options", ORDERS)
@pytest.mark.parametrize("group", [-1, 24, 48, 1, 64])
def test_every_value_lies_on_the_grid_of_its_group(group, options):
    scheme = Scheme(bits=3, group_size=group, symmetric=False)
    found = solved(W, MOMENT, GPTQ(scheme, **options))
    groups = grouped(found.values(), found.group)
    zeros = found.zeros.to(torch.float32).unsqueeze(-1)
    again = (codes_of(groups, found.scales.unsqueeze(-1), zeros, 3) - zeros) * found.scales.unsqueeze(-1)
    assert torch.equal(again, groups)
    assert int(found.codes.max()) == 7


def test_act_order_is_the_same_as_quantizing_a_reordered_layer():
    order = torch.argsort(MOMENT.diagonal(), descending=True, stable=True)
    method = GPTQ(Scheme(bits=3, group_size=16), act_order=True)
    found = solved(W, MOMENT, method)
    plain = solved(W[:, order], MOMENT[order][:, order], dataclasses.replace(method, act_order=False))
    assert torch.equal(found.order, order)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)
    assert torch.equal(found.dequantized()[:, order], plain.dequantized())


@pytest.mark.parametrize("options", ORDERS[2:])
def test_groups_that_stay_in_place_need_no_order(options):
    assert solved(W, MOMENT, GPTQ(Scheme(group_size=16), **options)).order is None


@pytest.mark.parametrize("options", ORDERS)
def test_static_groups_have_the_scales_of_rounding_to_nearest(options):
    if options.get("static_groups"):
        scheme = Scheme(bits=3, group_size=24, symmetric=False)
        assert torch.equal(solved(W, MOMENT, GPTQ(scheme, **options)).scales, rtn(W, RTN(scheme)).scales)


def test_block_size_changes_speed_and_no_more_than_rounding():
    scheme = Scheme(bits=4, group_size=24)
    found = [solved(W, MOMENT, GPTQ(scheme, block_size=size)).dequantized() for size in (1, 10, 24, 50, 128)]
    for other in found[1:]:
        # A column on the edge between two codes may fall either way, and moves all that come after it.
        assert float((other - found[0]).abs().gt(1e-4).float().mean()) < 0.02


def test_rounded_scales_are_what_the_codes_were_chosen_for():
    scheme = Scheme(bits=4, group_size=16, double=DoubleScheme(bits=3, group_size=64))
    found = solved(W, MOMENT, GPTQ(scheme))
    assert torch.equal(found.scales, found.double.values())
    assert output_error(found, W, X) < 0.5 * output_error(rtn(W, RTN(scheme)), W, X)


def test_the_same_bits_each_time():
    method = GPTQ(Scheme(bits=3, group_size=16, mse=True), act_order=True)
    assert same(solved(W, MOMENT, method), solved(W, MOMENT, method))


def test_inputs_that_are_always_zero_leave_their_columns_rounded_to_nearest():
    x = X.clone()
    x[:, 16:32] = 0
    scheme = Scheme(bits=4, group_size=16)
    found = solved(W, x.T @ x / len(x), GPTQ(scheme))
    assert torch.equal(found.dequantized()[:, 16:32], rtn(W, RTN(scheme)).dequantized()[:, 16:32])
    assert torch.equal(solved(W, torch.zeros(64, 64), GPTQ(scheme)).dequantized(), rtn(W, RTN(scheme)).dequantized())


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_a_constant_weight_is_kept(value):
    found = solved(torch.full((4, 64), value), MOMENT, GPTQ(Scheme(bits=4, group_size=16, symmetric=False)))
    assert torch.allclose(found.dequantized(), torch.full((4, 64), value), atol=1e-6)


def test_a_moment_of_low_rank_is_damped_until_it_can_be_factored():
    x = correlated(64, 3) * 1e4
    found = solved(W, x.T @ x / 3, GPTQ(Scheme(bits=4, group_size=16), percdamp=1e-9))
    assert bool(torch.isfinite(found.dequantized()).all())


def test_a_moment_that_cannot_be_factored_is_an_error_that_names_the_layer():
    moment = MOMENT.clone()
    moment[0, 1] = moment[1, 0] = 1e30
    with pytest.raises(ModelError, match="fc: the second moment"):
        solved(W, moment, GPTQ(), name="fc")


def test_weights_that_are_not_finite_are_refused():
    broken = W.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(ModelError, match="fc: 1 of"):
        solved(broken, MOMENT, GPTQ(), name="fc")


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(ModelError, match=r"block\.0: calibration gives it"):
        gptq(block_of(nn.Sequential(nn.Linear(64, 8)), [torch.full((2, 64), float("inf"))]), {"0": GPTQ()})


def test_a_layer_that_no_call_reaches_is_named():
    module = nn.Sequential(nn.Linear(64, 64))
    module[0].spare = nn.Linear(64, 64)
    with pytest.raises(FeedError, match=r"block\.0\.spare"):
        gptq(block_of(module, [X]), {"0": GPTQ(), "0.spare": GPTQ()})


@pytest.mark.parametrize("options", [{"act_order": True, "hybrid_order": True}, {"percdamp": 0}, {"block_size": 0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(OptionError):
        GPTQ(**options)


def test_a_group_larger_than_the_row_is_refused():
    with pytest.raises(OptionError, match="group_size=128 does not fit fc"):
        solved(W, MOMENT, GPTQ(Scheme(group_size=128)), name="fc")


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_a_block_of_a_language_model_loses_less_than_by_rounding_to_nearest(make):
    scheme, errors = Scheme(bits=3, group_size=16), []
    for quantized in (
        lambda block, names: gptq(block, {name: GPTQ(scheme) for name in names}),
        lambda block, names: gptq(block, {name: GPTQ(scheme, true_sequential=True) for name in names}),
        lambda block, names: {n: rtn(linear_weight(block.module.get_submodule(n)), RTN(scheme)) for n in names},
    ):
        block, names = first_block(make())
        for name, found in quantized(block, names).items():
            replace(block.module, name, as_quantized(block.module.get_submodule(name), found))
        errors.append(block.error())
    assert max(errors[:2]) < 0.8 * errors[2]


def test_true_sequential_shows_later_layers_what_quantized_ones_give():
    block, names = first_block(tiny.llama())
    method = GPTQ(Scheme(bits=2, group_size=16), true_sequential=True)
    found = gptq(block, dict.fromkeys(names, method))
    plain_block, _ = first_block(tiny.llama())
    plain = gptq(plain_block, {name: GPTQ(method.scheme) for name in names})
    assert same(found["self_attn.q_proj"], plain["self_attn.q_proj"])
    assert not same(found["mlp.down_proj"], plain["mlp.down_proj"])
    kept = linear_weight(block.module.get_submodule("self_attn.q_proj"))
    assert torch.equal(kept, found["self_attn.q_proj"].dequantized())


def test_without_it_the_block_is_left_as_it_is():
    block, names = first_block(tiny.llama())
    before = {name: part.clone() for name, part in block.module.state_dict().items()}
    gptq(block, {name: GPTQ(Scheme(group_size=16)) for name in names})
    assert all(torch.equal(part, before[name]) for name, part in block.module.state_dict().items())
