"""Other libraries' checkpoints give the weights that the libraries compute with, run, train and export."""

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapterx.errors import FormatError, UnsupportedQuantization
from adapterx.quant.interop import read_quantized
from adapterx.quant.interop.bit_stream import fields, interleaved, streamed
from adapterx.quant.linear import quant_layers
from adapterx.quant.onnx_export import export
from adapterx.quant.storage import load, save
from tests.quant.checkpoints import GOLDEN, assert_weights_are_the_packages, cases, changed, expected, in_float

CASES = cases("model.safetensors")
UP, DOWN, QUERY = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj")
# LLM.int8 multiplies codes by a row's largest value and then by 1 / 127, here the scale is one number.
ULP = 2e-7


def reference(case):
    """The model of a checkpoint with float weights."""
    config = json.loads((GOLDEN / case / "config.json").read_text())
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig.from_dict(config)).eval()
    held = load(GOLDEN / case).state_dict()
    layers = {f"{name}.weight": weight.dequantized() for name, weight in read_quantized(GOLDEN / case).items()}
    model.load_state_dict({name: held[name].float() if name in held else layers[name] for name in model.state_dict()})
    return model


def ids():
    return torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", [case for case in CASES if case != "bnb_int8"])
def test_weights_are_those_that_the_package_computes_with_bit_for_bit(case):
    assert_weights_are_the_packages(read_quantized(GOLDEN / case), case)


def test_weights_of_llm_int8_are_so_to_the_last_bit():
    weights = read_quantized(GOLDEN / "bnb_int8")
    assert weights.keys() == expected("bnb_int8").keys()
    for name, told in expected("bnb_int8").items():
        ours = weights[name].dequantized().flatten()[:8]
        torch.testing.assert_close(ours, torch.tensor(told["head"]), rtol=ULP, atol=0)


@pytest.mark.parametrize("case", [case for case in CASES if "dynamic" not in case])
def test_a_checkpoint_loads_as_a_model_that_computes_with_these_weights(case):
    model = in_float(load(GOLDEN / case))
    assert dict(quant_layers(model)).keys() == expected(case).keys()
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, reference(case)(ids()).logits, rtol=1e-5, atol=1e-5)


def test_dynamic_int8_rounds_its_inputs():
    model = load(GOLDEN / "torchao_int8_dynamic")
    with torch.no_grad():
        off = (model(ids()).logits - reference("torchao_int8_dynamic")(ids()).logits).abs().max()
    assert 1e-4 < off < 0.1


def test_groups_in_the_order_of_gptqs_act_order_are_an_order_here():
    weights = read_quantized(GOLDEN / "inc_gptq_act_order")
    assert all(weight.order is not None for weight in weights.values())
    assert len({weight.order.argmax().item() for weight in weights.values()}) > 1


def test_a_group_that_crosses_rows_becomes_groups_that_do_not():
    weights = read_quantized(GOLDEN / "hqq_w4")
    assert (weights[QUERY].group, weights[DOWN].group) == (32, 64)


def test_blocks_of_bitsandbytes_run_over_the_ends_of_rows(tmp_path):
    def as_rows_of_48(held):
        # 64 x 64 weights told as 64 x 48, in blocks of 64 all the same.
        state = f"{UP}.weight.quant_state.bitsandbytes__nf4"
        held[state] = torch.tensor(list(b'{"blocksize": 64, "shape": [64, 48]}'), dtype=torch.uint8)
        held[f"{UP}.weight"] = held[f"{UP}.weight"][: 64 * 48 // 2].clone()
        held[f"{UP}.weight.absmax"] = held[f"{UP}.weight.absmax"][:48].clone()

    whole = read_quantized(GOLDEN / "bnb_nf4")[UP].dequantized().flatten()
    cut = read_quantized(changed("bnb_nf4", tmp_path / "c", tensors=as_rows_of_48))[UP]
    assert cut.group == 16
    assert torch.equal(cut.dequantized().flatten(), whole[: 64 * 48])


def test_what_other_libraries_quantized_is_saved_in_our_format_as_it_is(tmp_path):
    for case in ("bnb_fp4_double", "inc_gptq_act_order", "hqq_w3", "torchao_float8"):
        model = load(GOLDEN / case)
        save(model, tmp_path / case)
        again = load(tmp_path / case)
        left, right = model.state_dict(), again.state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_biases_of_zeros_are_left_out_and_real_ones_are_not(tmp_path):
    assert load(GOLDEN / "inc_gptq_act_order").get_submodule(UP).bias is None
    folder = changed("inc_gptq_act_order", tmp_path / "c", tensors=lambda held: held[f"{UP}.bias"].fill_(0.5))
    assert load(folder).get_submodule(UP).bias.eq(0.5).all()


def test_a_gptq_checkpoint_trains_with_peft_and_its_base_stays(tmp_path):
    model = in_float(load(GOLDEN / "gptq_w4_asym"))
    before = {name: layer.qweight.clone() for name, layer in quant_layers(model)}
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"]))
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    after = {name.replace(".base_layer", ""): layer.qweight for name, layer in quant_layers(model)}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_gptq_checkpoint_exports_and_onnx_runtime_agrees(tmp_path):
    model = in_float(load(GOLDEN / "inc_gptq_act_order"))
    export(model, tmp_path / "model.onnx", exact=True)
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids().numpy(), "attention_mask": np.ones((2, 9), np.int64)}
    got = session.run(["logits"], {name.name: feeds[name.name] for name in session.get_inputs()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, model(ids()).logits.numpy(), rtol=1e-4, atol=1e-4)


# -- Formats told apart ------------------------------------------------------------------------------------------------


def test_version_2_of_gptq_stores_zero_points_as_they_are(tmp_path):
    def as_version_2(held):
        for name in [name for name in held if name.endswith(".qzeros")]:
            nibbles = (streamed(held[name], 4).long() + 1) & 15
            words = nibbles.reshape(len(nibbles), -1, 8) << (4 * torch.arange(8))
            held[name] = words.sum(-1).to(torch.uint32).view(torch.int32)

    case, form = "gptq_w4_asym", {"checkpoint_format": "gptq_v2"}
    folder = changed(case, tmp_path / "two", tensors=as_version_2, config=lambda told: told.update(form))
    assert_weights_are_the_packages(read_quantized(folder), case)
    one = changed(case, tmp_path / "one", tensors=as_version_2)
    assert not torch.equal(read_quantized(one)[UP].dequantized(), read_quantized(folder)[UP].dequantized())


def test_a_stored_zero_point_of_the_largest_code_is_zero_in_version_1(tmp_path):
    folder = changed("gptq_w4_asym", tmp_path / "c", tensors=lambda held: held[f"{UP}.qzeros"].fill_(-1))
    assert read_quantized(folder)[UP].zeros.eq(0).all()


def test_a_quantize_config_beside_the_config_is_enough(tmp_path):
    folder = changed("inc_gptq_act_order", tmp_path / "c")
    content = json.loads((folder / "config.json").read_text())
    del content["quantization_config"]
    (folder / "config.json").write_text(json.dumps(content))
    assert_weights_are_the_packages(read_quantized(folder), "inc_gptq_act_order")


def put(**fields):
    return lambda told: told.update(fields)


def drop(name):
    return lambda held: held.pop(name)


def fill(name, value):
    return lambda held: held[name].fill_(value)


def replace(name, tensor):
    return lambda held: held.update({name: tensor})


def retype(kind):
    def apply(metadata):
        told = json.loads(metadata[f"{UP}.weight"])
        metadata[f"{UP}.weight"] = json.dumps({**told, "_type": kind})

    return apply


def restate(**fields):
    def apply(held):
        key = f"{UP}.weight.quant_state.bitsandbytes__nf4"
        told = json.loads(bytes(held[key].tolist())) | fields
        held[key] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)

    return apply


UNEVEN = torch.tensor([0] * 15 + [1] * 17, dtype=torch.int32)
CANNOT = {
    "method": ("awq_w4_asym", {"config": put(quant_method="aqlm")}, "quant_method='aqlm'"),
    "near method": ("awq_w4_asym", {"config": put(quant_method="autoround")}, "nearest is auto-round"),
    "awq version": ("awq_w4_asym", {"config": put(version="gemv_fast")}, "version 'gemv_fast'"),
    "awq bits": ("awq_w4_asym", {"config": put(bits=8)}, "bits=8"),
    "gptq format": ("gptq_w4_asym", {"config": put(checkpoint_format="marlin")}, "checkpoint_format='marlin'"),
    "gptq bits": ("gptq_w4_asym", {"config": put(bits=5)}, "bits=5"),
    "uneven groups": ("gptq_w4_asym", {"tensors": replace(f"{UP}.g_idx", UNEVEN)}, f"{UP}.g_idx: groups"),
    "w4a8": ("inc_gptq_act_order", {"tensors": fill(f"{UP}.scale_bf16_to_fp8", 1)}, "W4A8"),
    "auto-round packing": (
        "auto_round_w2_asym",
        {"config": put(packing_format="auto_round:llm_compressor")},
        "llm_compressor",
    ),
    "auto-round data": ("auto_round_w2_asym", {"config": put(data_type="mx_fp")}, "data_type='mx_fp'"),
    "auto-round activations": ("auto_round_w2_asym", {"config": put(act_bits=8)}, "act_bits=8"),
    "int8 order": ("bnb_int8", {"tensors": fill(f"{UP}.weight_format", 1)}, f"{UP}.weight_format"),
    "torchao kind": ("torchao_int4", {"metadata": retype("Int4TilePackedTo4dTensor")}, "Int4TilePackedTo4dTensor"),
    "hqq axis": ("hqq_w4", {"tensors": fill(f"{UP}.axis", 0)}, "axis=0"),
    "hqq quantized scales": ("hqq_w4", {"tensors": fill(f"{UP}.quant_scale", 1)}, "quant_scale"),
}


@pytest.mark.parametrize("what", CANNOT, ids=lambda what: what.replace(" ", "_"))
def test_an_encoding_that_cannot_be_held_is_named(what, tmp_path):
    case, changes, message = CANNOT[what]
    with pytest.raises(UnsupportedQuantization, match=message):
        read_quantized(changed(case, tmp_path / "c", **changes))


BROKEN = {
    "no zero points": ("gptq_w4_asym", {"tensors": drop(f"{UP}.qzeros")}, f"{UP}.qzeros is missing"),
    "no scales": ("awq_w4_asym", {"tensors": drop(f"{UP}.scales")}, f"{UP}.scales is missing"),
    "scales of another grid": (
        "awq_w4_asym",
        {"tensors": replace(f"{UP}.scales", torch.ones(1, 63, dtype=torch.float16))},
        rf"{UP}.scales: expected .* \[any, 64\], got torch.float16 \[1, 63\]",
    ),
    "scales not finite": ("awq_w4_asym", {"tensors": fill(f"{UP}.scales", float("inf"))}, f"{UP}.scales: not all"),
    "bits that do not fit": ("gptq_w4_asym", {"config": put(bits=2, dynamic=None)}, "2 bits do not fit"),
    "group in words": ("gptq_w4_asym", {"config": put(group_size="many")}, "group_size is 'many'"),
    "a group that is not": ("gptq_w4_asym", {"tensors": fill(f"{UP}.g_idx", -3)}, f"{UP}.g_idx: groups -3"),
    "codes as floats": (
        "gptq_w4_asym",
        {"tensors": replace(f"{UP}.qweight", torch.ones(4, 64))},
        rf"{UP}.qweight: expected int32 \[any, any\], got torch.float32",
    ),
    "absurd shape": ("bnb_nf4", {"tensors": restate(shape=[1 << 40, 32])}, f"{UP}.weight.quant_state"),
    "another shape": ("bnb_nf4", {"tensors": restate(shape=[64, 128])}, f"{UP}.weight does not hold 8192"),
    "blocks of nothing": ("bnb_nf4", {"tensors": restate(blocksize=0)}, "blocksize"),
    "state that is no JSON": (
        "bnb_nf4",
        {"tensors": replace(f"{UP}.weight.quant_state.bitsandbytes__nf4", torch.tensor([1], dtype=torch.uint8))},
        "expected JSON",
    ),
    "codes beyond 4 bits": ("torchao_int4", {"tensors": fill(f"{UP}._weight_qdata", 8)}, "codes beyond 4 bits"),
    "float8 that is none": (
        "torchao_float8",
        {"tensors": lambda held: held[f"{UP}._weight_qdata"].view(torch.uint8).fill_(0x7F)},
        f"{UP}._weight_qdata: not all",
    ),
    "hqq shape": ("hqq_w4", {"tensors": fill(f"{UP}.shape", 7)}, f"{UP}.scale"),
    "no hqq bits": ("hqq_w4", {"tensors": drop(f"{UP}.nbits")}, f"{UP}.nbits"),
}


@pytest.mark.parametrize("what", BROKEN, ids=lambda what: what.replace(" ", "_"))
def test_a_broken_checkpoint_is_refused_and_the_tensor_named(what, tmp_path):
    case, changes, message = BROKEN[what]
    folder = changed(case, tmp_path / "c", **changes)
    with pytest.raises(FormatError, match=message) as caught:
        read_quantized(folder)
    assert str(folder) in str(caught.value)
    # The model has no bias, no other layer, and must not be touched before all is read.
    model = reference(case)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FormatError, match=message):
        load(folder, model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# -- Bits --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]), st.integers(1, 3), st.randoms(use_true_random=False))
def test_a_stream_of_bits_is_that_of_one_long_number(bits, blocks, chance):
    codes = [chance.randrange(2**bits) for _ in range(32 * blocks)]
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    words = np.frombuffer(number.to_bytes(4 * bits * blocks, "little"), np.int32).copy()
    assert streamed(torch.from_numpy(words)[None], bits)[0].tolist() == codes


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.randoms(use_true_random=False))
def test_fields_do_not_cross_words(bits, chance):
    codes = [[chance.randrange(2**bits) for _ in range(32 // bits)] for _ in range(3)]
    words = [sum(code << (bits * place) for place, code in enumerate(word)) for word in codes]
    held = torch.from_numpy(np.array([words], np.uint32).view(np.int32))
    assert fields(held, bits)[0].tolist() == [code for word in codes for code in word]


@given(st.lists(st.integers(0, 15), min_size=8, max_size=8))
def test_awq_puts_even_columns_into_the_low_half_of_a_word(codes):
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    word = sum(codes[column] << (4 * place) for place, column in enumerate(order))
    held = torch.from_numpy(np.array([[word]], np.uint32).view(np.int32))
    assert interleaved(held)[0].tolist() == codes
