"""Neural Compressor's own folders load into the float model, when asked for by name."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapterx.errors import FormatError, OptionError, UnsupportedQuantization
from adapterx.quant.linear import quant_layers
from adapterx.quant.storage import load
from tests.quant.checkpoints import GOLDEN, assert_weights_are_the_packages, cases

CASES = cases("quantized_weight.pt")
UP = "model.layers.0.mlp.up_proj"


def llama(**options):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 32, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | {"tie_word_embeddings": True} | options)))


def read(folder, model=None):
    return load(folder, original_model=llama() if model is None else model, format="neural_compressor")


def ids():
    return torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))


def stored(case):
    return torch.load(GOLDEN / case / "quantized_weight.pt", weights_only=True)


def changed(case, folder, change):
    shutil.copytree(GOLDEN / case, folder)
    state = stored(case)
    change(state)
    torch.save(state, folder / "quantized_weight.pt")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_it_computes_with_bit_for_bit(case):
    weights = {name: layer.quantized for name, layer in quant_layers(read(GOLDEN / case))}
    assert_weights_are_the_packages(weights, case)


@pytest.mark.parametrize("case", CASES)
def test_the_model_computes_with_these_weights_and_with_the_floats_of_the_folder(case):
    model, reference = read(GOLDEN / case), llama().eval()
    layers = {f"{name}.weight": layer.weight.detach() for name, layer in quant_layers(model)}
    floats = {name: stored(case)[name] for name in reference.state_dict() if name not in layers}
    reference.load_state_dict({**layers, **floats})
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, reference(ids()).logits, rtol=1e-5, atol=1e-5)


def test_factors_of_awq_on_the_inputs_become_a_pre_scale():
    weights = {name: layer.quantized for name, layer in quant_layers(read(GOLDEN / "inc_awq_w4"))}
    factors = stored("inc_awq_w4")[f"{UP}.input_scale"]
    assert torch.equal(weights[UP].pre_scale, factors)
    assert not factors.eq(1).all()


def test_nf4_is_our_nf4_whatever_the_order_of_its_codes():
    assert {layer.format for _, layer in quant_layers(read(GOLDEN / "inc_rtn_nf4"))} == {"nf4"}


@pytest.mark.parametrize(
    ("kind", "code", "value"), [("fp4", 5, 6.0), ("fp4_e2m1_bnb", 12, -4.0), ("fp4_e2m1", 10, -1 / 6)]
)
def test_other_4_bit_floats_keep_the_tables_of_their_own(kind, code, value, tmp_path):
    def all_one_code(state):
        state[f"{UP}.qweight"].fill_(sum(code << (4 * place) for place in range(8)) - (1 << 32) * (code > 7))
        state[f"{UP}.scales"].fill_(0.5)

    folder = changed("inc_rtn_nf4", tmp_path / "c", all_one_code)
    text = (folder / "qconfig.json").read_text()
    (folder / "qconfig.json").write_text(text.replace('"nf4"', f'"{kind}"'))
    layer = read(folder).get_submodule(UP)
    assert torch.equal(layer.weight, torch.full((64, 32), torch.tensor(value).item() * 0.5))


def test_without_being_asked_for_by_name_the_pickle_stays_shut():
    for form in ("default", "huggingface"):
        with pytest.raises(FormatError, match="format='neural_compressor'"):
            load(GOLDEN / "inc_rtn_w4", llama(), format=form)


def test_the_model_is_needed():
    with pytest.raises(OptionError, match="pass model="):
        load(GOLDEN / "inc_rtn_w4", format="neural_compressor")


def put(name, tensor):
    return lambda state: state.update({name: tensor})


BROKEN = {
    "a missing part": (lambda state: state.pop(f"{UP}.scales"), f"{UP}.scales is missing"),
    "a missing float": (lambda state: state.pop("model.norm.weight"), "model.norm.weight: missing"),
    "another shape": (put(f"{UP}.qzeros", torch.zeros(9, 9, dtype=torch.int32)), f"{UP}.qzeros: expected"),
    "no tensor": (put(f"{UP}.scales", [1.0]), "expected tensors by name"),
    "a stranger": (put("model.more", torch.ones(2)), "model.more: the model has no such tensor"),
    "scales not finite": (lambda state: state[f"{UP}.scales"].fill_(float("nan")), f"{UP}.scales: not all"),
    "factors of another layer": (put(f"{UP}.input_scale", torch.ones(3)), f"{UP}.input_scale: the model has no such"),
}


@pytest.mark.parametrize("what", BROKEN, ids=lambda what: what.replace(" ", "_"))
def test_a_broken_folder_is_refused_and_the_model_untouched(what, tmp_path):
    change, message = BROKEN[what]
    folder = changed("inc_rtn_w4", tmp_path / "c", change)
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FormatError, match=message):
        read(folder, model)
    assert not list(quant_layers(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_cut_short_a_config_of_something_else_and_a_model_of_another_size(tmp_path):
    cut = changed("inc_rtn_w4", tmp_path / "cut", lambda state: None)
    data = (cut / "quantized_weight.pt").read_bytes()
    (cut / "quantized_weight.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError, match="not a file of tensors"):
        read(cut)
    odd = changed("inc_rtn_w4", tmp_path / "odd", lambda state: None)
    (odd / "qconfig.json").write_text(json.dumps({"lm_head": 4}))
    with pytest.raises(FormatError, match="'lm_head': expected"):
        read(odd)
    with pytest.raises(FormatError, match=r"up_proj: the model's is \(128, 32\), the file's \(64, 32\)"):
        read(GOLDEN / "inc_rtn_w4", llama(intermediate_size=128))


def test_a_type_that_is_not_known_is_named(tmp_path):
    folder = changed("inc_rtn_nf4", tmp_path / "c", lambda state: None)
    text = (folder / "qconfig.json").read_text()
    (folder / "qconfig.json").write_text(text.replace('"nf4"', '"fp8_e4m3fn"'))
    with pytest.raises(UnsupportedQuantization, match="fp8_e4m3fn"):
        read(folder)
