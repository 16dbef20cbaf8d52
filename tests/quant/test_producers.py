"""Producers are proven, not believed by name."""

import pytest
import torch
from torch import nn

from adapterx.errors import MismatchError
from adapterx.quant.fold import Fold, fold_in
from adapterx.quant.producers import Pair, find_producers, proven
from adapterx.quant.sharing import inputs_of
from tests.quant import tiny
from tests.quant.many_heads import llama
from tests.quant.shown import block_of, first_block, weight

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def found(block, names, absorb=None):
    pairs = find_producers(block, inputs_of(block, names).shared, absorb or {})
    return {pair.consumers: pair.producer for pair in pairs if pair is not None}


def test_a_llama_block_has_two_norms_and_two_linear_producers():
    assert found(*first_block(llama())) == {
        QKV: "input_layernorm",
        ("self_attn.o_proj",): "self_attn.v_proj",
        ("mlp.gate_proj", "mlp.up_proj"): "post_attention_layernorm",
        ("mlp.down_proj",): "mlp.up_proj",
    }


def test_with_fewer_value_heads_nothing_produces_what_o_proj_reads():
    assert ("self_attn.o_proj",) not in found(*first_block(tiny.llama()))


def test_gpt2_has_its_norms_and_no_layer_before_a_gelu():
    assert found(*first_block(tiny.gpt2())) == {("attn.c_attn",): "ln_1", ("mlp.c_fc",): "ln_2"}


class Mlp(nn.Module):
    def __init__(self, between, *, norm=None):
        super().__init__()
        self.norm = norm or nn.LayerNorm(16)
        self.wide, self.back = nn.Linear(16, 16), nn.Linear(16, 16)
        self.between = between
        with torch.no_grad():
            self.norm.bias.copy_(weight(1, 16)[0])

    def forward(self, x):
        return x + self.back(self.between(self.wide(self.norm(x))))


@pytest.mark.parametrize(("between", "commutes"), [(nn.ReLU(), True), (nn.GELU(), False), (nn.Softmax(-1), False)])
def test_a_layer_before_a_function_that_commutes_with_scales_is_a_producer(between, commutes):
    block = block_of(Mlp(between), [weight(32, 16, seed=4)])
    assert ("back",) in found(block, ["back"]) if commutes else found(block, ["back"]) == {}


def test_a_norm_that_something_else_reads_is_no_producer():
    class Gated(Mlp):
        def forward(self, x):
            seen = self.norm(x)
            return seen + self.back(self.between(self.wide(seen)))

    assert found(block_of(Gated(nn.GELU()), [weight(32, 16)]), ["wide"]) == {}


class CenteredNorm(nn.Module):
    """Gemma's: multiplies by ``1 + weight``."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(weight(1, width)[0] * 0.3)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        return x / x.norm(dim=-1, keepdim=True) * (1 + self.weight) + self.bias


def test_a_norm_around_one_is_folded_around_one():
    module = Mlp(nn.GELU(), norm=CenteredNorm(16))
    block = block_of(module, [weight(32, 16, seed=4)])
    assert found(block, ["wide"]) == {("wide",): "norm"}
    fold_in(module, Fold("norm", ("wide",), torch.linspace(0.1, 5, 16)))
    assert torch.allclose(block.outputs()[0], block.targets[0], atol=1e-5)


def test_looking_leaves_the_weights_the_same_bits():
    block, names = first_block(llama())
    before = {name: part.clone() for name, part in block.module.state_dict().items()}
    found(block, names)
    assert all(torch.equal(part, before[name]) for name, part in block.module.state_dict().items())


def test_a_pair_whose_scale_is_not_seen_in_the_outputs_is_not_proven():
    module = Mlp(nn.GELU())
    with torch.no_grad():
        module.back.weight.zero_()
    assert not proven(block_of(module, [weight(32, 16)]), Pair("norm", ("wide",)))


@pytest.mark.parametrize("prefix", ["", "model.layers.0."])
def test_a_pair_that_the_user_knows_is_taken_by_either_name(prefix):
    block, _ = first_block(llama())
    absorb = {f"{prefix}mlp.up_proj": [f"{prefix}mlp.down_proj"]}
    assert found(block, ["mlp.down_proj"], absorb) == {("mlp.down_proj",): "mlp.up_proj"}


def test_a_pair_of_the_user_is_proven_too():
    block, _ = first_block(llama())
    with pytest.raises(MismatchError, match=r"a scale cannot move.*into mlp\.gate_proj"):
        found(block, ["mlp.down_proj"], {"mlp.gate_proj": ["mlp.down_proj"]})


def test_a_name_that_is_not_there_comes_with_the_nearest():
    block, _ = first_block(llama())
    with pytest.raises(MismatchError, match=r"nearest is mlp\.up_proj"):
        found(block, ["mlp.down_proj"], {"mlp.up_prj": ["mlp.down_proj"]})


def test_pairs_of_other_blocks_are_left_to_them():
    block, _ = first_block(llama())
    absorb = {"model.layers.1.mlp.gate_proj": ["model.layers.1.mlp.down_proj"]}
    assert found(block, ["mlp.down_proj"], absorb) == {("mlp.down_proj",): "mlp.up_proj"}
