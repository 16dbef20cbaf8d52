import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from adapterx.errors import ModelError, OptionError
from adapterx.quant.linear import QuantLinear
from adapterx.quant.lora import QuantLoraLinear, attach_lora, load_lora
from adapterx.quant.requantized import requantized
from adapterx.quant.rtn import RTN, rtn
from adapterx.quant.scheme import DoubleScheme, Scheme
from adapterx.quant.weight import QuantWeight


def net(*, bits=8, seed=0):
    torch.manual_seed(seed)
    first = rtn(torch.randn(32, 64), RTN(Scheme(bits=bits, symmetric=False)))
    first = dataclasses.replace(first, pre_scale=torch.rand(64) + 0.5, order=torch.randperm(64))
    second = rtn(torch.randn(8, 32), RTN(Scheme(bits=bits)))
    return nn.Sequential(QuantLinear(first, torch.randn(32)), nn.Tanh(), QuantLinear(second))


def config(**options):
    options = {"target_modules": ["0", "2"], "init_lora_weights": False} | options
    return LoraConfig(r=4, lora_alpha=8, **options)


@pytest.mark.parametrize("attach", [get_peft_model, attach_lora])
def test_training_moves_the_adapter_and_nothing_of_the_base(attach):
    model = attach(net(), config(init_lora_weights=True))
    held = {name: part.clone() for name, part in model.state_dict().items()}
    trained = [part for part in model.parameters() if part.requires_grad]
    optimizer, x = torch.optim.AdamW(trained, lr=0.05), torch.randn(16, 64)
    losses = []
    for _ in range(20):
        loss = (model(x) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 4
    moved = {name for name, part in model.state_dict().items() if not torch.equal(part, held[name])}
    assert moved == {name for name in held if "lora_" in name}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_a_merged_adapter_acts_as_it_did_beside_the_base(options):
    model = attach_lora(net(), config(target_modules=["0"], **options)).eval()
    layer, x = model.base_model.model[0], torch.randn(5, 64)
    if options.get("lora_bias"):
        nn.init.normal_(layer.lora_B["default"].bias)
    codes = layer.base_layer.qweight.clone()
    with torch.no_grad():
        beside, y = layer(x), model(x)
        model.merge_adapter()
        merged = layer(x)
        with model.disable_adapter():
            base = layer(x)
        model.merge_adapter()
    assert type(layer) is QuantLoraLinear
    change = float((beside - base).abs().max())
    assert change > 1
    assert float((merged - beside).abs().max()) < change / 10
    assert not torch.equal(layer.base_layer.qweight, codes)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.qweight, codes)
    assert torch.equal(model(x), y)
    whole = model.merge_and_unload()
    assert type(whole[0]) is QuantLinear
    assert torch.equal(whole[0](x), merged)


def test_adapters_that_are_merged_together_are_rounded_once():
    model = attach_lora(net(), config(target_modules=["0"]))
    model.add_adapter("other", config(target_modules=["0"]))
    layer = model.base_model.model[0]
    base = layer.base_layer
    with torch.no_grad():
        together = base.weight + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["other"])
    assert torch.equal(layer.base_layer.qweight, QuantLinear(requantized(together, base.quantized)).qweight)


def test_an_adapter_with_nan_is_not_merged():
    model = attach_lora(net(), config())
    layer = model.base_model.model[0]
    before = layer.base_layer
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="default hold NaN"):
        layer.merge()
    assert layer.base_layer is before
    assert not layer.merged
    with pytest.raises(ModelError, match="no adapter is merged"):
        layer.unmerge()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_initialisations_that_change_the_base_are_refused_even_by_stock_peft(init):
    with pytest.raises(ModelError, match="frozen"):
        get_peft_model(net(), config(init_lora_weights=init))
    with pytest.raises(OptionError, match=init):
        attach_lora(net(), config(init_lora_weights=init))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_stock_peft_cannot_merge_and_do_nothing(merge, options):
    with pytest.raises(ModelError, match="attach_lora"):
        getattr(get_peft_model(net(), config(**options)), merge)()


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.copy_(torch.zeros(32, 64)),
        lambda weight: weight.data.add_(1),
        lambda weight: weight.__setitem__(0, 0.0),
        lambda weight: setattr(weight, "data", torch.zeros(32, 64)),
        lambda weight: weight.data.__iadd__(1),
        nn.init.zeros_,
    ],
)
def test_a_dequantized_weight_is_read_only_and_says_so(write):
    layer = net()[0]
    before = layer.weight.clone()
    with pytest.raises(ModelError, match="frozen"):
        write(layer.weight)
    assert torch.equal(layer.weight, before)
    assert type(layer.weight @ torch.ones(64)) is torch.Tensor


def test_a_saved_adapter_comes_back_onto_the_base_and_can_be_merged(tmp_path):
    model = attach_lora(net(), config(use_rslora=True)).eval()
    x = torch.randn(3, 64)
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = load_lora(net(), tmp_path).eval()
    assert isinstance(loaded, PeftModel)
    assert torch.equal(loaded(x), expected)
    loaded.merge_adapter()
    assert type(loaded.base_model.model[0]) is QuantLoraLinear
    assert not torch.equal(loaded(x), expected)


@given(
    st.sampled_from(
        [
            Scheme(bits=4),
            Scheme(bits=3, symmetric=False, group_size=48),
            Scheme(bits=8, group_size=-1),
            Scheme(format="nf4"),
            Scheme(format="mxfp4"),
            Scheme(bits=4, double=DoubleScheme(group_size=8)),
        ]
    ),
    st.floats(0, 3),
    st.integers(0, 100),
)
@settings(max_examples=30, deadline=None)
def test_requantizing_leaves_no_more_error_than_rounding_anew(scheme, change, seed):
    torch.manual_seed(seed)
    held = rtn(torch.randn(8, 100), RTN(scheme))
    assert torch.equal(requantized(held.dequantized(), held).dequantized(), held.dequantized())
    new = held.dequantized() + change * torch.randn(8, 100)
    anew = rtn(new, RTN(dataclasses.replace(scheme, double=None)))
    found = requantized(new, held)
    assert found.format == held.format
    if scheme.double is None:
        error = (found.dequantized() - new).square().sum()
        assert float(error) <= float((anew.dequantized() - new).square().sum()) * (1 + 1e-5)
    else:
        assert found.double is held.double


def test_requantizing_knows_tables_of_ones_own_and_float_zeros():
    torch.manual_seed(1)
    codes = torch.randint(0, 4, (6, 64), dtype=torch.uint8)
    table = QuantWeight(codes, torch.rand(6, 2) + 0.1, 32, 2, format="codebook", codebook=torch.tensor([0.5, -1, 1, 0]))
    floats = QuantWeight(codes, torch.rand(6, 2) + 0.1, 32, 2, zeros=torch.rand(6, 2) * 3)
    for held in (table, floats):
        assert torch.equal(requantized(held.dequantized(), held).codes, codes)


def test_transformers_own_trainer_trains_an_adapter_on_a_quantized_model(tmp_path):
    from transformers import Trainer, TrainingArguments

    from adapterx.quant import RTNConfig, quantize
    from tests.quant.tiny import llama

    model = get_peft_model(quantize(llama(), RTNConfig()), LoraConfig(target_modules="all-linear", r=4))
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 8
    options = {"max_steps": 4, "learning_rate": 0.02, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), save_strategy="no", **options), train_dataset=rows)
    before = trainer.evaluate(rows)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(rows)["eval_loss"] < before - 0.1
    assert model.float() is model
