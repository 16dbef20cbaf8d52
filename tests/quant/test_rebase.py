"""An adapter trained on the float base does on a folded base what it did before."""

import copy

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import MismatchError
from adapterx.formats import load_adapter
from adapterx.quant.awq import AWQ, awq
from adapterx.quant.fold import Fold, fold_in
from adapterx.quant.linear import as_quantized, linear_weight, replace
from adapterx.quant.rebase import rebase_adapter
from adapterx.quant.scheme import Scheme
from tests.quant import tiny
from tests.quant.many_heads import llama
from tests.quant.shown import first_block

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def trained(model, config, steps=3):
    """A real PEFT adapter on a copy of ``model``, trained for a few steps."""
    torch.manual_seed(5)
    peft = get_peft_model(copy.deepcopy(model), config)
    optimizer = torch.optim.AdamW([part for part in peft.parameters() if part.requires_grad], lr=0.05)
    for ids in tiny.batches(steps, seed=9):
        peft(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peft.eval()


def read(peft, folder):
    peft.save_pretrained(folder)
    return load_adapter(folder)


def folded(model):
    """``model`` with the scales of AWQ in its first block, which stays float; the folds, by names in the model."""
    model = copy.deepcopy(model)
    block, names = first_block(model)
    awq(block, {name: AWQ(Scheme(bits=2, group_size=16, symmetric=False), folding=True) for name in names})
    assert len(block.folds) == 4
    return model, [fold.within(block.name) for fold in block.folds]


def sites_of(peft):
    for name, module in peft.named_modules():
        if hasattr(module, "base_layer"):
            yield name.removeprefix("base_model.model."), module


def write(peft, adapter):
    """Put ``adapter`` into the layers of a PEFT model of the same shape."""
    with torch.no_grad():
        for site, module in sites_of(peft):
            change = adapter.sites[site]
            module.lora_A["default"].weight.copy_(torch.from_numpy(change.a.copy()))
            module.lora_B["default"].weight.copy_(torch.from_numpy(change.b.T.copy()) / module.scaling["default"])
            if "magnitude" in change.parts:
                vector = module.lora_magnitude_vector["default"].weight
                vector.copy_(torch.from_numpy(change.parts["magnitude"][0].copy()))
    return peft


def assert_close(one, other):
    assert float((one - other).abs().max()) < 2e-5 * float(other.abs().max())


@pytest.mark.parametrize("dora", [False, True])
def test_on_the_folded_float_model_it_does_what_it_did(tmp_path, dora):
    model = llama()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, use_dora=dora)
    peft = trained(model, config)
    base, folds = folded(model)
    weights = {site: linear_weight(module.base_layer) for site, module in sites_of(peft)}
    rebased = rebase_adapter(read(peft, tmp_path), folds, weights=weights)
    wanted = tiny.logits(peft)
    assert float((wanted - tiny.logits(model)).abs().max()) > 0.05
    assert_close(tiny.logits(write(get_peft_model(base, config).eval(), rebased)), wanted)


def test_without_rebasing_it_would_do_something_else(tmp_path):
    model = llama()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    peft = trained(model, config)
    base, _ = folded(model)
    left = tiny.logits(write(get_peft_model(base, config).eval(), read(peft, tmp_path))) - tiny.logits(peft)
    assert float(left.abs().max()) > 1e-3


def test_on_the_quantized_folded_model_its_change_is_the_same_as_beside_pre_scales(tmp_path):
    model = llama()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    peft = trained(model, config)
    adapter = read(peft, tmp_path)
    outputs = []
    for folding in (False, True):
        base = copy.deepcopy(model)
        block, names = first_block(base)
        method = AWQ(Scheme(bits=4, group_size=16, symmetric=False), folding=folding)
        for name, result in awq(block, dict.fromkeys(names, method)).items():
            replace(block.module, name, as_quantized(block.module.get_submodule(name), result))
        folds = [fold.within(block.name) for fold in block.folds]
        assert bool(folds) == folding
        outputs.append(tiny.logits(write(get_peft_model(base, config).eval(), rebase_adapter(adapter, folds))))
    assert_close(outputs[1], outputs[0])


def test_ia3_is_relative_and_stays_as_it_is(tmp_path):
    model = llama()
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    peft = trained(model, config)
    base, folds = folded(model)
    adapter = read(peft, tmp_path)
    assert rebase_adapter(adapter, folds) == adapter
    again = get_peft_model(base, config).eval()
    state = {name: part for name, part in peft.state_dict().items() if "ia3" in name}
    again.load_state_dict(state, strict=False)
    assert_close(tiny.logits(again), tiny.logits(peft))


def changed(**parts):
    shapes = {"a": (2, 6), "b": (2, 4), "shift": (1, 4), "whole_bias": (1, 4), "whole_weight": (4, 6), "gain": (1, 4)}
    chance = np.random.default_rng(0)
    made = {name: chance.standard_normal(shapes[name]).astype(np.float32) for name in ("a", "b", *parts["parts"])}
    return LowRank(a=made.pop("a"), b=made.pop("b"), parts=made)


def test_shifts_and_whole_weights_follow_and_gains_stay():
    change = changed(parts=("shift", "whole_bias", "whole_weight", "gain"))
    ins, outs = torch.linspace(0.5, 3, 6), torch.linspace(0.2, 2, 4)
    folds = [Fold("norm", ("fc",), ins), Fold("fc", ("next",), outs)]
    found = rebase_adapter(Adapter({"fc": change}), folds).sites["fc"]
    s, t = ins.numpy(), outs.numpy()
    for got, wanted in (
        (found.a, change.a * s),
        (found.b, change.b / t),
        (found.parts["shift"], change.parts["shift"] / t),
        (found.parts["whole_bias"], change.parts["whole_bias"] / t),
        (found.parts["whole_weight"], change.parts["whole_weight"] * s / t[:, None]),
        (found.parts["gain"], change.parts["gain"]),
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_two_folds_of_one_layer_are_multiplied():
    adapter, scale = Adapter({"fc": changed(parts=())}), torch.full((6,), 2.0)
    twice = rebase_adapter(adapter, [Fold("norm", ("fc",), scale), Fold("norm", ("fc",), scale)])
    np.testing.assert_allclose(twice.sites["fc"].a, adapter.sites["fc"].a * 4)


def test_a_norm_with_a_bias_is_folded_with_it():
    model = tiny.gpt2()
    block, _ = first_block(model)
    with torch.no_grad():
        block.module.ln_1.bias.add_(0.5)
    before = block.outputs()
    fold_in(block.module, Fold("ln_1", ("attn.c_attn",), torch.linspace(0.2, 4, 64)))
    for now, then in zip(block.outputs(), before, strict=True):
        assert_close(now, then)


def test_what_cannot_follow_is_refused_by_name_all_at_once():
    dora = LowRank(a=np.ones((1, 6)), b=np.ones((1, 4)), parts={"magnitude": np.ones((1, 4))})
    tokens = LowRank.of_parts({"prompt": np.ones((3, 6))})
    half = LowRank(a=np.full((1, 6), 6e4, np.float16), b=np.ones((1, 4), np.float16))
    adapter = Adapter({"dora": dora, "tokens": tokens, "half": half, "narrow": changed(parts=()), "else": dora})
    folds = [Fold("norm", ("dora", "tokens", "half"), torch.full((6,), 2.0)), Fold("n", ("narrow",), torch.ones(5))]
    with pytest.raises(MismatchError) as refused:
        rebase_adapter(adapter, folds)
    for said in ("dora: DoRA's magnitude", "tokens: a prompt", "half: a value of up to", "narrow: it reads 6 features"):
        assert said in str(refused.value)
    assert "else" not in str(refused.value)
