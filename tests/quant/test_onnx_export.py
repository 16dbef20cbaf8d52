import collections
import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

import adapterx as ax
from adapterx.adapter import Adapter, LowRank
from adapterx.errors import FeedError, ModelError, OptionError
from adapterx.quant import onnx_export
from adapterx.quant.linear import QuantLinear, as_quantized, is_linear, linear_weight, replace
from adapterx.quant.mixed_precision import HalfLinear
from adapterx.quant.onnx_export import export
from adapterx.quant.rtn import RTN, rtn
from adapterx.quant.scheme import Scheme
from adapterx.quant.weight import Activation, QuantWeight
from tests.quant.tiny import VOCABULARY, llama

CLOSE = 1e-5  # of the largest result
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def quantized(model, scheme, *, skip=("lm_head",)):
    """``model`` with every linear layer rounded to nearest; with a scale and an order before some, as methods leave."""
    for name, module in list(model.named_modules()):
        if is_linear(module) and not name.endswith(skip):
            weight = rtn(linear_weight(module), RTN(scheme))
            if name.endswith("q_proj"):
                weight = dataclasses.replace(weight, pre_scale=torch.rand(weight.shape[1]) + 0.5)
            if name.endswith("k_proj"):
                weight = dataclasses.replace(weight, order=torch.randperm(weight.shape[1]))
            replace(model, name, as_quantized(module, weight))
    return model


class Layers(nn.Module):
    """Many layers of one input, side by side."""

    def __init__(self, weights):
        super().__init__()
        self.layers = nn.ModuleDict({name: QuantLinear(w, torch.randn(w.shape[0])) for name, w in weights.items()})

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers.values())


def every_format():
    """One weight for each operator, and for each way around it; the rest is in test_lowering.py."""
    weight, found = torch.randn(12, 96), {}
    for bits, group in ((3, 48), (4, 8), (8, -1)):
        found[f"int{bits}"] = rtn(weight, RTN(Scheme(bits=bits, group_size=group, symmetric=False)))
    for name in ("nf4", "float8_e4m3fn", "mxfp8_e5m2", "mxfp4"):
        found[name] = rtn(weight, RTN(Scheme(format=name, group_size=32)))
    three, eight = found["int3"], found["int8"]
    found["float_zeros"] = dataclasses.replace(three, zeros=three.zeros + torch.rand_like(three.scales))
    found["ordered"] = dataclasses.replace(three, order=torch.randperm(96), pre_scale=torch.rand(96) + 0.5)
    codes = torch.randint(0, 8, (12, 96), dtype=torch.uint8)
    found["codebook"] = QuantWeight(codes, torch.randn(12, 2), 48, 3, format="codebook", codebook=torch.randn(8))
    found["static"] = dataclasses.replace(eight, activation=Activation("int8", "static", torch.tensor(0.03)))
    found["tensor"] = dataclasses.replace(eight, activation=Activation("uint8", "tensor"))
    found["token"] = dataclasses.replace(eight, activation=Activation("int8", "token"))
    found["grouped_token"] = dataclasses.replace(three, activation=Activation("uint8", "token"))
    found["mxfp4_both"] = dataclasses.replace(found["mxfp4"], activation=Activation("mxfp4", "block"))
    return found


@pytest.mark.parametrize("format", ["matmulnbits", "qdq"])
def test_every_format_is_exported_as_torch_computes_it_at_any_size(tmp_path, format):
    torch.manual_seed(1)
    model = Layers(every_format())
    done = export(model, tmp_path / "m.onnx", example_inputs=torch.randn(2, 3, 96), format=format, exact=True)
    assert len(done.layers) == len(model.layers)
    session = ort.InferenceSession(done.path)
    for size in ((1, 1), (4, 5)):
        x = torch.randn(*size, 96)
        with torch.no_grad():
            expected = model(x)
        for name, y, z in zip(model.layers, expected, session.run(None, {"x": x.numpy()}), strict=True):
            worst = float((y - torch.from_numpy(z)).abs().max() / y.abs().max())
            assert worst < CLOSE, (name, worst)


def test_fast_products_are_near_and_say_so_in_the_file(tmp_path):
    torch.manual_seed(2)
    weight = torch.randn(32, 64)
    model = Layers({"four": rtn(weight, RTN(Scheme(symmetric=False))), "eight": rtn(weight, RTN(Scheme(bits=8)))})
    x = torch.randn(5, 64)
    done = export(model, tmp_path / "m.onnx", example_inputs=x)
    levels = [a.i for n in onnx.load(done.path).graph.node for a in n.attribute if a.name == "accuracy_level"]
    assert levels == [4, 4]
    for y, z in zip(model(x), ort.InferenceSession(done.path).run(None, {"x": x.numpy()}), strict=True):
        assert 1e-5 < float((y - torch.from_numpy(z)).abs().max() / y.abs().max()) < 3e-2


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A quantized Llama with a fresh adapter: all of its B are the same zeros."""
    torch.manual_seed(3)
    model = quantized(llama(), Scheme(symmetric=False))
    peft = get_peft_model(model, LoraConfig(target_modules=ATTENTION, r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    peft.train()
    done = export(peft, tmp_path_factory.mktemp("lora") / "model.onnx", exact=True, kv_cache=True, embeddings=True)
    return peft, done


def answers(peft, ids):
    with torch.no_grad():
        return peft(input_ids=ids, use_cache=False).logits.numpy()


def empty_cache(rows):
    names = [f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    return {name: np.zeros((rows, 2, 0, 16), np.float32) for name in names}


def step(run, ids, cache):
    """``(logits, cache)`` after ``ids``."""
    past = next(iter(cache.values())).shape[2]
    rows, new = ids.shape
    places = np.tile(np.arange(past, past + new), (rows, 1))
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((rows, past + new), np.int64), "position_ids": places}
    logits, *present = run(None, {**feeds, **cache})
    return logits, dict(zip(cache, present, strict=True))


def test_adapters_stay_float_and_are_found_under_the_checkpoints_names(lora):
    _, done = lora
    sites = ax.find_sites(done.path)
    assert sites.names == [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ATTENTION]
    assert {(site.rank, site.scale, site.dtype, site.adapter) for site in sites} == {(4, 2.0, "float32", "default")}
    assert {site.op for site in sites} == {"MatMulNBits"}
    names = {tensor.name for tensor in onnx.load(done.path).graph.initializer}
    assert {f"base_model.model.{site}.lora_B.default.weight" for site in sites.names} <= names


def test_another_adapter_in_the_places_that_were_found_gives_what_torch_gives(lora, tmp_path):
    peft, done = lora
    out = ax.extract_adapters(done.path, tmp_path / "out", make_inputs=True)
    torch.manual_seed(4)
    before = {name: part.clone() for name, part in peft.named_parameters() if "lora_" in name}
    sites = {}
    with torch.no_grad():
        for site in out.sites:
            layer = peft.get_submodule(f"base_model.model.{site.name}")
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            a.normal_(std=0.3)
            b.normal_(std=0.3)
            sites[site.name] = LowRank(a=a.numpy().copy(), b=2.0 * b.numpy().T.copy())
        # The embedding is rounded by the export alone.
        held = peft.get_input_embeddings().weight.clone()
        table = rtn(held, RTN(Scheme(bits=8, symmetric=False))).values()
        peft.get_input_embeddings().weight.copy_(table)
        ids = torch.randint(0, VOCABULARY, (3, 9))
        expected = answers(peft, ids)
        peft.get_input_embeddings().weight.copy_(held)
        for name, part in peft.named_parameters():
            if name in before:
                part.copy_(before[name])
    session = ax.AdapterSession(out.model_path, adapters={"other": Adapter(sites)})
    fed, _ = step(lambda names, feeds: session.run(names, feeds, adapter="other"), ids, empty_cache(3))
    base, _ = step(session.run, ids, empty_cache(3))
    assert np.abs(fed - expected).max() < 1e-5
    assert np.abs(base - expected).max() > 1e-2


def test_decoding_with_the_cache_is_the_whole_sequence_at_once(lora):
    _, done = lora
    assert done.inputs[3:] == tuple(empty_cache(1))
    assert done.outputs == ("logits", *(name.replace("past_key_values", "present") for name in empty_cache(1)))
    session = ort.InferenceSession(done.path)
    ids = torch.randint(0, VOCABULARY, (2, 9))
    whole, cache = step(session.run, ids, empty_cache(2))
    parts, grown = [], empty_cache(2)
    for piece in (ids[:, :4], *ids[:, 4:].split(1, dim=1)):
        logits, grown = step(session.run, piece, grown)
        parts.append(logits)
    assert np.abs(np.concatenate(parts, 1) - whole).max() < 1e-5
    assert all(np.abs(grown[name] - cache[name]).max() < 1e-5 for name in cache)


class Two(nn.Module):
    """A layer whose inputs are scaled, and one whose inputs are put in order, as AWQ and GPTQ leave them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        first, second = (rtn(torch.randn(32, 32), RTN(Scheme(bits=8))) for _ in range(2))
        self.fc1 = QuantLinear(dataclasses.replace(first, pre_scale=torch.rand(32) + 0.2), torch.randn(32))
        self.fc2 = QuantLinear(dataclasses.replace(second, order=torch.randperm(32)), torch.randn(32))

    def forward(self, x):
        return self.fc2(self.fc1(x))


def test_adapters_of_an_exported_base_read_what_the_layer_reads(tmp_path):
    model = Two()
    done = export(model, tmp_path / "base.onnx", example_inputs=torch.randn(2, 32), exact=True)
    changes = {name: LowRank(a=np.random.default_rng(8).normal(size=(4, 32)).astype(np.float32) / 8,
                             b=np.random.default_rng(9).normal(size=(4, 32)).astype(np.float32) / 8)
               for name in ("fc1", "fc2")}  # fmt: skip
    x = torch.randn(3, 32)
    deltas = {name: torch.from_numpy(change.b.T @ change.a) for name, change in changes.items()}
    with torch.no_grad():
        y = model.fc1(x) + x @ deltas["fc1"].T
        expected = (model.fc2(y) + y @ deltas["fc2"].T).numpy()
    session = ax.AdapterSession(done.path, adapters={"fr": Adapter(changes)})
    found = session.run(None, {"x": x.numpy()}, adapter="fr")[0]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    merged = ax.merge_adapter(done.path, Adapter(changes), tmp_path / "merged.onnx").path
    found = ort.InferenceSession(merged).run(None, {"x": x.numpy()})[0]
    assert np.abs(found - expected).max() < 2e-2 * np.abs(expected).max()


@pytest.mark.parametrize("exported", ["default", "other"])
def test_dora_is_found_on_the_codes_and_another_takes_its_place(tmp_path, exported):
    torch.manual_seed(10)
    weights = {name: rtn(torch.randn(64, 64), RTN(Scheme(symmetric=False))) for name in ("fc1", "fc2")}
    layers = {name: QuantLinear(weight, torch.randn(64)) for name, weight in weights.items()}
    config = LoraConfig(target_modules=["fc1", "fc2"], r=4, use_dora=True, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(collections.OrderedDict(layers)), config)
    model.add_adapter("other", config)
    with torch.no_grad():
        for name, part in model.named_parameters():
            if "magnitude" in name:
                part.mul_(torch.rand_like(part) + 0.5)
    model.save_pretrained(tmp_path / "peft")
    model.set_adapter(exported)
    x = torch.randn(3, 64)
    done = export(model, tmp_path / "m.onnx", example_inputs=x, exact=True)
    assert {site.kind for site in ax.find_sites(done.path)} == {"dora"}
    found = ort.InferenceSession(done.path).run(None, {done.inputs[0]: x.numpy()})[0]
    out = ax.extract_adapters(done.path, tmp_path / "out", make_inputs=True)
    folders = {"default": tmp_path / "peft", "other": tmp_path / "peft" / "other"}
    session = ax.AdapterSession(out.model_path, adapters=folders)
    for name in folders:
        model.set_adapter(name)
        expected = model(x).detach().numpy()
        fed = session.run(None, {done.inputs[0]: x.numpy()}, adapter=name)[0]
        assert np.abs(fed - expected).max() < 1e-5 * np.abs(expected).max()
        assert name != exported or np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_an_export_leaves_the_model_as_it_was(lora):
    peft, _ = lora
    assert peft.training
    kinds = {type(peft.get_submodule(f"base_model.model.model.layers.0.self_attn.{n}.base_layer")) for n in ATTENTION}
    assert kinds == {QuantLinear}
    assert type(peft.get_input_embeddings()) is nn.Embedding


def test_the_result_prints_what_each_layer_became(lora):
    _, done = lora
    text = str(done)
    assert "base_model.model.model.layers.1.mlp.down_proj" in text
    assert "MatMulNBits, 4 bits, block 32" in text
    assert "GatherBlockQuantized, 8 bits, block 32" in text


def test_an_encoder_is_exported_without_a_word_about_its_inputs(tmp_path):
    torch.manual_seed(5)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=VOCABULARY
    )
    model = quantized(BertModel(config).eval(), Scheme(format="nf4"), skip=("pooler.dense",))
    done = export(model, tmp_path / "bert.onnx", exact=True)
    assert done.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert {layer.became for layer in done.layers} == {"MatMulBnb4 nf4, block 32"}
    session = ort.InferenceSession(done.path)
    for size in ((1, 4), (3, 11)):
        ids = torch.randint(0, VOCABULARY, size)
        feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        with torch.no_grad():
            expected = model(**feeds).last_hidden_state.numpy()
        found = session.run(["last_hidden_state"], {name: value.numpy() for name, value in feeds.items()})[0]
        assert np.abs(found - expected).max() < 1e-5


def test_layers_in_half_are_islands_between_casts(tmp_path):
    torch.manual_seed(6)
    half = HalfLinear(16, 8).to(torch.float16)
    rounded = dataclasses.replace(rtn(torch.randn(4, 8), RTN(Scheme(group_size=-1))), output="bfloat16")
    model = nn.Sequential(nn.Linear(16, 16), half, QuantLinear(rounded)).eval()
    x = torch.randn(3, 16)
    done = export(model, tmp_path / "m.onnx", example_inputs=x, exact=True)
    graph = onnx.load(done.path).graph
    casts = [a.i for n in graph.node if n.op_type == "Cast" for a in n.attribute]
    assert casts == [
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.BFLOAT16,
        onnx.TensorProto.FLOAT,
    ]
    found = ort.InferenceSession(done.path).run(None, {"input": x.numpy()})[0]
    with torch.no_grad():
        assert np.abs(found - model(x).numpy()).max() < 2e-2


def test_a_large_model_has_its_weights_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_INLINE_LIMIT", 1000)
    model = nn.Sequential(QuantLinear(rtn(torch.randn(64, 64), RTN())))
    done = export(model, tmp_path / "m.onnx", example_inputs={"input": torch.randn(2, 64)}, exact=True)
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    inside = onnx.load(done.path, load_external_data=False).graph.initializer
    assert [part.name for part in inside if part.data_location == onnx.TensorProto.EXTERNAL] == ["0.qweight"]
    x = torch.randn(3, 64)
    found = ort.InferenceSession(done.path).run(None, {"input": x.numpy()})[0]
    assert np.abs(found - model(x).detach().numpy()).max() < 1e-4


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(tmp_path):
    model = nn.Sequential(QuantLinear(rtn(torch.randn(4, 32), RTN())))
    x, path = torch.randn(2, 32), tmp_path / "m.onnx"
    with pytest.raises(FeedError, match="example_inputs"):
        export(model, path)
    with pytest.raises(FeedError, match="tensors"):
        export(model, path, example_inputs={"input": [1.0]})
    with pytest.raises(OptionError, match="keeps no cache"):
        export(model, path, example_inputs=x, kv_cache=True)
    with pytest.raises(OptionError, match="the model has input, output"):
        export(model, path, example_inputs=x, dynamic={"inputs": {0: "batch"}})
    with pytest.raises(ModelError, match="axis 0 of output"):
        export(nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (2, 32)), model), path, example_inputs=x)
    with pytest.raises(FileNotFoundError):
        export(model, tmp_path / "nowhere" / "m.onnx", example_inputs=x)
    with pytest.raises(OptionError, match="opset"):
        export(model, path, example_inputs=x, opset=20)
    assert list(tmp_path.iterdir()) == []


def test_torchs_own_exporter_gets_the_right_numbers_too(tmp_path):
    weight = rtn(torch.randn(8, 64), RTN(Scheme(bits=3, symmetric=False)))
    model, x = nn.Sequential(QuantLinear(weight, torch.randn(8))), torch.randn(2, 64)
    torch.onnx.export(model, (x,), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    session = ort.InferenceSession(tmp_path / "m.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.abs(found - model(x).detach().numpy()).max() < 1e-4
