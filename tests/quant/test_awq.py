"""AWQ: scales and ranges by what comes out, beside the inputs or folded."""

import pytest
import torch
from torch import nn

from adapterx.errors import FeedError, MismatchError, ModelError, OptionError
from adapterx.quant.awq import AWQ, awq
from adapterx.quant.linear import as_quantized, linear_weight, replace
from adapterx.quant.rtn import RTN, rtn
from adapterx.quant.scheme import DoubleScheme, Scheme
from tests.quant import tiny
from tests.quant.many_heads import llama
from tests.quant.shown import block_of, correlated, first_block, output_error, same, weight

X = correlated(64)
NOISY = Scheme(bits=3, group_size=16, symmetric=False)


def linear(rows=48, inputs=64):
    layer = nn.Linear(inputs, rows)
    with torch.no_grad():
        layer.weight.copy_(weight(rows, inputs))
    return nn.Sequential(layer)


def one(scheme, x=X, **options):
    module = linear()
    return awq(block_of(module, x.split(128)), {"0": AWQ(scheme, **options)})["0"], linear_weight(module[0]).clone()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_lose_less_than_by_rounding_to_nearest(bits, symmetric):
    scheme = Scheme(bits=bits, group_size=16, symmetric=symmetric)
    found, original = one(scheme)
    assert output_error(found, original, X) < 0.9 * output_error(rtn(original, RTN(scheme)), original, X)


@pytest.mark.parametrize("options", [{"auto_clip": False}, {"auto_scale": False}])
def test_scales_help_and_ranges_help_each_alone(options):
    found, original = one(NOISY, **options)
    assert (found.pre_scale is None) == (options == {"auto_scale": False})
    assert output_error(found, original, X) < output_error(rtn(original, RTN(NOISY)), original, X)


def test_ranges_are_judged_by_the_inputs_as_they_are_scaled():
    found, original = one(NOISY)
    assert output_error(found, original, X) < 0.57 * output_error(one(NOISY, auto_clip=False)[0], original, X)


@pytest.mark.parametrize("group", [-1, 24, 48, 1])
def test_any_group_fits(group):
    scheme = Scheme(bits=3, group_size=group, symmetric=False)
    found, original = one(scheme)
    assert output_error(found, original, X) <= output_error(rtn(original, RTN(scheme)), original, X) + 1e-12


@pytest.mark.parametrize(
    "scheme", [Scheme(format="nf4"), Scheme(format="mxfp4"), Scheme(double=DoubleScheme()), Scheme(mse=True)]
)
def test_tables_rounded_scales_and_searched_grids_take_part(scheme):
    found, original = one(scheme)
    assert output_error(found, original, X) <= output_error(rtn(original, RTN(scheme)), original, X)


def test_without_scale_and_range_it_is_rounding_to_nearest():
    found, original = one(NOISY, auto_scale=False, auto_clip=False)
    assert same(found, rtn(original, RTN(NOISY)))


def test_the_same_bits_each_time():
    assert same(one(NOISY)[0], one(NOISY)[0])


def with_large_channels(make):
    """Channels that are large behind the norms, as in models of billions of parameters."""
    model = make()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[:3] *= 20
            layer.post_attention_layernorm.weight[5:8] *= 20
    return model


def quantized(make, method, layers=None):
    block, names = first_block(make())
    for name, found in awq(block, dict.fromkeys(layers or names, method)).items():
        replace(block.module, name, as_quantized(block.module.get_submodule(name), found))
    return block


def test_layers_that_read_one_tensor_share_a_scale_and_others_have_their_own():
    block, names = first_block(with_large_channels(llama))
    found = awq(block, {name: AWQ(NOISY) for name in names})
    q, k, v, gate, up = (
        found[name].pre_scale
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    )
    assert torch.equal(q, k)
    assert torch.equal(q, v)
    assert torch.equal(gate, up)
    assert not torch.equal(q, gate)


def test_a_block_loses_less_than_by_rounding_to_nearest():
    block, names = first_block(with_large_channels(llama))
    for name in names:
        layer = block.module.get_submodule(name)
        replace(block.module, name, as_quantized(layer, rtn(linear_weight(layer), RTN(NOISY))))
    assert quantized(lambda: with_large_channels(llama), AWQ(NOISY)).error() < 0.5 * block.error()


def test_the_float_block_is_left_as_it_is():
    block, names = first_block(llama())
    before = {name: part.clone() for name, part in block.module.state_dict().items()}
    awq(block, {name: AWQ(NOISY) for name in names})
    assert all(torch.equal(part, before[name]) for name, part in block.module.state_dict().items())
    assert block.folds == []


def test_folding_gives_the_same_model_without_a_pre_scale():
    def make():
        return with_large_channels(llama)

    beside, folded = quantized(make, AWQ(NOISY)), quantized(make, AWQ(NOISY, folding=True))
    for one_output, other in zip(beside.outputs(), folded.outputs(), strict=True):
        assert torch.allclose(one_output, other, atol=2e-4)
    assert all(layer.pre_scale is None for _, layer in folded.module.named_modules() if hasattr(layer, "qweight"))
    pairs = {(fold.producer, fold.consumers) for fold in folded.folds}
    assert ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")) in pairs
    assert ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")) in pairs


def test_what_is_folded_leaves_the_float_block_computing_the_same():
    block, names = first_block(with_large_channels(llama))
    before = block.outputs()
    awq(block, {name: AWQ(NOISY, folding=True) for name in names})
    assert block.folds
    for now, then in zip(block.outputs(), before, strict=True):
        assert float((now - then).abs().max()) < 1e-5 * float(then.abs().max())


def test_a_layer_without_a_producer_is_not_scaled_when_folding():
    # Keys and values have two heads, and what o_proj reads has four: no v_proj is as wide as that.
    block, _ = first_block(with_large_channels(tiny.llama))
    assert awq(block, {"self_attn.o_proj": AWQ(NOISY, folding=True)})["self_attn.o_proj"].pre_scale is None
    assert block.folds == []


def test_a_float_layer_that_reads_what_is_folded_follows():
    block, _ = first_block(with_large_channels(llama))
    before = block.outputs()
    found = awq(block, {"self_attn.q_proj": AWQ(NOISY, folding=True)})
    assert block.folds[0].consumers == ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert set(found) == {"self_attn.q_proj"}
    for now, then in zip(block.outputs(), before, strict=True):
        assert float((now - then).abs().max()) < 1e-5 * float(then.abs().max())


def test_a_producer_that_is_none_is_refused():
    block, _ = first_block(llama())
    absorb = {"model.layers.0.self_attn.q_proj": ["model.layers.0.self_attn.o_proj"]}
    with pytest.raises(MismatchError, match="a scale cannot move"):
        awq(block, {"self_attn.o_proj": AWQ(NOISY, folding=True, absorb=absorb)})


def test_inputs_of_nothing_but_zeros_are_taken():
    found, original = one(NOISY, torch.zeros(128, 64))
    assert float((found.dequantized() - original).abs().max()) <= float(found.scales.max())


def test_bad_numbers_and_layers_that_are_not_reached_are_refused():
    module = linear()
    module[0].spare = nn.Linear(64, 64)
    with pytest.raises(FeedError, match=r"block\.0\.spare"):
        awq(block_of(module, [X]), {"0.spare": AWQ(NOISY)})
    with torch.no_grad():
        module[0].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"block\.0: 1 of"):
        awq(block_of(module, [X]), {"0": AWQ(NOISY)})
    with pytest.raises(OptionError):
        AWQ(ratios=0)


def test_conv1d_of_gpt2_is_taken():
    block, names = first_block(tiny.gpt2())
    found = awq(block, {name: AWQ(NOISY, folding=True) for name in names})
    assert found["attn.c_attn"].shape == (192, 64)
