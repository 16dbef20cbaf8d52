"""A saved model loads as it was, and a folder is written whole or not at all."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from adapterx.errors import FormatError, ModelError, OptionError
from adapterx.quant import tensor_files
from adapterx.quant.configs import MixedPrecisionConfig, RTNConfig
from adapterx.quant.linear import QuantLinear
from adapterx.quant.storage import load, save
from adapterx.quant.verbs import quantize
from adapterx.quant.weight import Activation, DoubleScales, QuantWeight
from tests.quant import tiny


def quantized_llama(**options):
    return quantize(tiny.llama(tied=True, layers=1), RTNConfig(group_size=32, **options))


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=tiny.VOCABULARY)).eval()


@pytest.fixture
def saved(tmp_path):
    save(quantized_llama(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("make", [lambda: tiny.llama(tied=True), tiny.gpt2, bert], ids=["llama", "gpt2", "bert"])
def test_a_transformers_model_loads_without_the_code_that_made_it(make, tmp_path):
    model = quantize(make(), RTNConfig(bits=3, group_size=16, use_sym=False))
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert type(loaded) is type(model)
    known = {"architectures": [type(model).__name__], "dtype": "float32"}
    assert loaded.config.to_diff_dict() | known == model.config.to_diff_dict() | known
    assert tiny.bits_of(loaded) == tiny.bits_of(model)
    assert tiny.same(loaded, model)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_tied_embeddings_are_stored_once_and_stay_tied(saved):
    assert "lm_head.weight" not in tensor_files.read_tensor_files(saved).tensors
    loaded = load(saved)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_quantized_head_of_a_tied_model_comes_back_beside_a_float_embedding(tmp_path):
    model = quantized_llama(quant_lm_head=True)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert isinstance(loaded.lm_head, QuantLinear)
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_a_generation_config_comes_back(tmp_path):
    model = quantized_llama()
    model.generation_config.max_new_tokens = 7
    save(model, tmp_path / "model")
    assert load(tmp_path / "model").generation_config.max_new_tokens == 7


def test_layers_in_half_come_back_in_half(tmp_path):
    config = RTNConfig(group_size=32, white_list=[".*mlp.*"]) + MixedPrecisionConfig(
        dtype="bf16", white_list=[".*self_attn.*"]
    )
    model = quantize(tiny.llama(layers=1), config)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert type(loaded.model.layers[0].self_attn.q_proj).__name__ == "HalfLinear"
    assert tiny.same(loaded, model)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


# -- Every form of weight ----------------------------------------------------------------------------------------------


def weights():
    chance = torch.Generator().manual_seed(3)

    def codes(bits, inputs=20):
        return torch.randint(0, 2**bits, (6, inputs), generator=chance, dtype=torch.uint8)

    def grid(groups=3):
        return torch.rand(6, groups, generator=chance) + 0.1

    plain = {"group": 8}
    for bits in range(1, 9):
        zeros = torch.randint(0, 2**bits, (6, 3), generator=chance, dtype=torch.uint8)
        yield QuantWeight(codes=codes(bits), scales=grid(), bits=bits, zeros=zeros, **plain)
    yield QuantWeight(codes=codes(4), scales=-grid(), bits=4, zeros=grid() * 7, output="bfloat16", **plain)
    yield QuantWeight(codes=codes(4), scales=grid(), bits=4, format="nf4", pre_scale=grid(20)[0], **plain)
    yield QuantWeight(codes=codes(2), scales=grid(), bits=2, format="codebook", codebook=grid(4)[0], **plain)
    order = torch.randperm(20, generator=chance)
    yield QuantWeight(codes=codes(3), scales=grid(), bits=3, order=order, **plain)
    rounding = Activation(format="mxfp4", per="block", group=4, rounding="nearest")
    yield QuantWeight(codes=codes(4), scales=grid(), bits=4, format="mxfp4", activation=rounding, **plain)
    fixed = Activation(format="uint8", per="static", scale=torch.tensor(0.25), zero=torch.tensor(9, dtype=torch.uint8))
    yield QuantWeight(codes=codes(8), scales=grid(1), group=20, bits=8, activation=fixed)
    half = torch.randint(0, 64, (6, 3), generator=chance, dtype=torch.uint8)
    double = DoubleScales(half, grid(5)[0][:5], grid(5)[1][:5], zero=32, bits=6, group=4)
    yield QuantWeight(codes=codes(4), scales=double.values(), bits=4, double=double, **plain)


def told(value):
    """All that a weight says, comparable."""
    if dataclasses.is_dataclass(value):
        return {field.name: told(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return (str(value.dtype), value.tolist()) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("weight", list(weights()), ids=lambda weight: f"{weight.format}-{weight.bits}")
def test_every_field_of_a_weight_comes_back(weight, tmp_path):
    bias = torch.rand(6)
    save(nn.Sequential(QuantLinear(weight, bias, compute_dtype=torch.bfloat16)), tmp_path / "model")
    loaded = load(tmp_path / "model", nn.Sequential(nn.Linear(20, 6)))[0]
    assert told(loaded.quantized) == told(weight)
    assert loaded.compute_dtype == torch.bfloat16
    assert torch.equal(loaded.bias, bias.bfloat16())


# -- Models that are not transformers' ---------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    save(quantize(tiny.convolutional(), RTNConfig(group_size=16)), tmp_path / "model")
    return tmp_path / "model"


def test_a_model_of_ones_own_is_filled_in_place_by_either_name_of_the_argument(own):
    reference = quantize(tiny.convolutional(), RTNConfig(group_size=16))
    for given in ("model", "original_model"):
        with torch.device("meta"):
            empty = tiny.convolutional()
        loaded = load(own, **{given: empty})
        assert loaded is empty
        assert tiny.same(loaded, reference)
    assert tiny.same(load(model_name_or_path=own, original_model=tiny.convolutional(seed=5)), reference)


def test_without_the_model_the_error_says_to_give_it(own):
    with pytest.raises(FormatError, match=r"load\(folder, model\)"):
        load(own)
    with pytest.raises(OptionError, match="no model of transformers"):
        save(quantize(tiny.convolutional(), RTNConfig(group_size=16)), own, format="huggingface")


def test_a_model_that_does_not_fit_is_told_every_difference_and_is_untouched(own):
    other = nn.Sequential(
        nn.Conv1d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 6, 31), nn.ReLU(), nn.Linear(32, 4)
    )
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(FormatError) as caught:
        load(own, other)
    assert "3: the model's is (31, 96), the file's (32, 96)" in str(caught.value)
    assert "4: the model's is a ReLU" in str(caught.value)
    assert "5.weight: missing" in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_a_buffer_that_no_file_holds_must_not_be_on_the_meta_device(own):
    with torch.device("meta"):
        empty = tiny.convolutional()
        empty.register_buffer("table", torch.ones(3), persistent=False)
    with pytest.raises(FormatError, match="table: on the meta device"):
        load(own, empty)


# -- Folders -----------------------------------------------------------------------------------------------------------


def test_shards_hold_the_same_model_as_one_file(saved, tmp_path):
    save(quantized_llama(), tmp_path / "shards", shard_bytes=8_000)
    files = sorted(file.name for file in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    assert all((tmp_path / "shards" / file).stat().st_size < 45_000 for file in files)
    assert tiny.same(load(tmp_path / "shards"), load(saved))


def test_a_folder_holds_safetensors_and_json_and_nothing_else(saved):
    expected = ["config.json", "generation_config.json", "quantization.json", "quantized.safetensors"]
    assert sorted(file.name for file in saved.iterdir()) == expected


def test_saving_again_replaces_the_weights_and_keeps_the_tokenizer(saved, tmp_path):
    (saved / "tokenizer.json").write_text("{}")
    (saved / "extra").mkdir()
    (saved / "extra" / "notes.txt").write_text("mine")
    save(quantized_llama(bits=8), saved, shard_bytes=50_000)
    save(quantized_llama(bits=2), saved)
    assert set(tiny.bits_of(load(saved)).values()) == {2}
    assert len(list(saved.glob("*.safetensors*"))) == 1
    assert (saved / "tokenizer.json").read_text() == "{}"
    assert (saved / "extra" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_weights_of_another_model_are_not_overwritten(tmp_path):
    tiny.llama(layers=1).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="weights of another model"):
        save(quantized_llama(), tmp_path)
    assert not (tmp_path / "quantization.json").exists()


def test_a_save_that_fails_leaves_the_folder_as_it_was(saved, tmp_path, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adapterx.quant.storage._write_json", full)
    with pytest.raises(OSError, match="No space"):
        save(quantized_llama(bits=8), saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_quantized_models_in_known_formats_are_saved(tmp_path):
    with pytest.raises(ModelError, match="nothing in this LlamaForCausalLM is quantized"):
        save(tiny.llama(layers=1), tmp_path / "model")
    with pytest.raises(OptionError, match="nearest is huggingface"):
        save(quantized_llama(), tmp_path / "model", format="hugging_face")
    with pytest.raises(OptionError, match="no format"):
        load(tmp_path, format="pt")
    assert list(tmp_path.iterdir()) == []


def test_transformers_itself_refuses_a_folder_of_ours_instead_of_making_up_weights(saved):
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match="no file named"):
        AutoModelForCausalLM.from_pretrained(saved)
