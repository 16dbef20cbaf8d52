"""A checkpoint with an adapter folded in is PEFT's model: the outputs of the unmerged one, the weights of its merge."""

import copy
import json

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as tf

import adapterx as ax
from adapterx.adapter import Adapter, LowRank
from adapterx.merged_checkpoint import merge_peft
from tests.zoo import models
from tests.zoo.case import Lora
from tests.zoo.peft_models import attach

LLAMA_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def saved(tmp_path, model, **options):
    model.save_pretrained(tmp_path / "base", **options)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


def adapter_of(tmp_path, model, lora, label="b"):
    """The unmerged PEFT model, and the folder of its adapter."""
    adapted = attach(copy.deepcopy(model), lora, label)
    adapted.save_pretrained(tmp_path / label)
    return adapted, tmp_path / label


def state(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}


CASES = {
    "llama": ("llama", Lora(LLAMA_ALL)),
    "llama rslora and patterns": (
        "llama",
        Lora(
            LLAMA_ALL, extra=(("use_rslora", True), ("rank_pattern", {"v_proj": 6}), ("alpha_pattern", {"q_proj": 12}))
        ),
    ),
    "gpt2": ("gpt2", Lora(("c_attn", "c_proj", "c_fc"), extra=(("fan_in_fan_out", True),))),
    "gpt2, square layers only": ("gpt2", Lora(("attn.c_proj",), extra=(("fan_in_fan_out", True),))),
    "bert": ("bert_classifier", Lora(("query", "value", "output.dense", "classifier"))),
    "vit": ("vit", Lora(("query", "value", "classifier"))),
    "dora": ("llama_short", Lora(LLAMA_ALL, kind="dora")),
    "dora on gpt2": ("gpt2", Lora(("c_attn", "c_proj"), kind="dora", extra=(("fan_in_fan_out", True),))),
    "ia3": (
        "llama_short",
        Lora(("k_proj", "v_proj", "down_proj"), kind="ia3", extra=(("feedforward_modules", ["down_proj"]),)),
    ),
    "ia3 on gpt2": (
        "gpt2",
        Lora(("c_attn", "c_fc"), kind="ia3", extra=(("feedforward_modules", ["c_fc"]), ("fan_in_fan_out", True))),
    ),
    "loha": ("llama_short", Lora(("q_proj", "down_proj"), kind="loha")),
    "lokr": ("llama_short", Lora(("q_proj", "down_proj"), kind="lokr")),
    "vera": ("llama_short", Lora(("q_proj", "down_proj"), kind="vera")),
    "lm_head": ("llama_short", Lora(("q_proj", "lm_head"))),
    "saved classifier": (
        "bert_classifier",
        Lora(("query",), task_type="SEQ_CLS", extra=(("modules_to_save", ["classifier"]),)),
    ),
    "biases": ("bert_classifier", Lora(("query", "value"), extra=(("bias", "lora_only"),))),
    "lora_bias": ("bert_classifier", Lora(("query", "value"), extra=(("lora_bias", True),))),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_checkpoint_is_the_model_with_the_adapter(case, tmp_path):
    name, lora = CASES[case]
    subject = getattr(models, name)()
    base = saved(tmp_path, subject.model)
    adapted, folder = adapter_of(tmp_path, subject.model, lora)
    merged = merge_peft(base, folder, tmp_path / "merged")
    with torch.no_grad():
        expected = adapted(**subject.inputs)[0]
        loaded = type(subject.model).from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(loaded(**subject.inputs)[0], expected, rtol=1e-4, atol=2e-5)
        assert not torch.allclose(subject.model(**subject.inputs)[0], expected, atol=1e-2)
    by_peft = adapted.merge_and_unload().state_dict()
    for tensor_name, tensor in state(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, by_peft[tensor_name], rtol=1e-5, atol=1e-6)
    assert {row.site for row in merged.rows} == set(ax.load_adapter(folder).sites)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float_and_rounded_once(dtype, tmp_path):
    model = models.llama_short().model.to(dtype)
    base = saved(tmp_path, model)
    _, folder = adapter_of(tmp_path, model, Lora(LLAMA_ALL))
    merge_peft(base, folder, tmp_path / "merged")
    adapter = ax.load_adapter(folder)
    merged = state(tmp_path / "merged")
    for name, weight in state(base).items():
        change = adapter.sites.get(name.removesuffix(".weight"))
        expected = weight
        if change is not None:
            delta = torch.from_numpy(change.b.astype(np.float32).T @ change.a.astype(np.float32))
            expected = (weight.float() + delta).to(dtype)
        assert merged[name].dtype == dtype
        # The order of a float32 sum may move a value over the edge of a rounding.
        assert (merged[name] != expected).float().mean() < 1e-3
        torch.testing.assert_close(merged[name], expected, rtol=2**-7, atol=0)


def test_numbers_beyond_float16_are_refused(tmp_path):
    base = saved(tmp_path, models.llama_short().model.to(torch.float16))
    huge = LowRank(a=np.full((1, 48), 300, np.float32), b=np.full((1, 48), 300, np.float32))
    with pytest.raises(ax.MismatchError, match=r"q_proj\.weight: merged numbers are beyond float16"):
        merge_peft(base, Adapter({"model.layers.0.self_attn.q_proj": huge}), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_shards_keep_their_names_order_and_index(tmp_path):
    model = models.llama().model
    base = saved(tmp_path, model, max_shard_size="60KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    adapted, folder = adapter_of(tmp_path, model, Lora(("q_proj", "down_proj")))
    merge_peft(base, folder, tmp_path / "merged")
    names = sorted(path.name for path in base.iterdir())
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == names
    for name in names:
        old, new = (base / name).read_bytes(), (tmp_path / "merged" / name).read_bytes()
        assert len(old) == len(new)
        if not name.endswith(".safetensors"):
            assert old == new
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    inputs = models.llama().inputs
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], adapted(**inputs)[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_a_part_of_an_adapter_is_that_part_of_its_change(weight, tmp_path):
    model = models.llama_short().model
    base = saved(tmp_path, model)
    _, folder = adapter_of(tmp_path, model, Lora(("q_proj",)))
    merge_peft(base, folder, tmp_path / "whole")
    merge_peft(base, folder, tmp_path / "part", weight=weight)
    old, whole, part = (state(tmp_path / name) for name in ("base", "whole", "part"))
    for name, tensor in part.items():
        torch.testing.assert_close(tensor - old[name], weight * (whole[name] - old[name]), rtol=1e-4, atol=1e-6)


def test_what_was_merged_can_be_taken_out_again(tmp_path):
    model = models.llama_short().model
    base = saved(tmp_path, model)
    _, folder = adapter_of(tmp_path, model, Lora(LLAMA_ALL))
    merge_peft(base, folder, tmp_path / "merged")
    merge_peft(tmp_path / "merged", folder, tmp_path / "again", weight=-1)
    old, again = state(base), state(tmp_path / "again")
    for name, tensor in old.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shards", ["5GB", "60KB"])
@pytest.mark.parametrize("targets", [("lm_head",), ("embed_tokens",), ("lm_head", "embed_tokens")])
def test_an_output_layer_that_shares_its_table_gets_its_own(targets, shards, tmp_path):
    subject = models.llama_tied()
    base = saved(tmp_path, subject.model, max_shard_size=shards)
    assert "lm_head.weight" not in state(base)
    adapted, folder = adapter_of(tmp_path, subject.model, Lora(targets))
    merge_peft(base, folder, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = adapted(**subject.inputs)[0]
        torch.testing.assert_close(loaded(**subject.inputs)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_a_tied_model_stores_all_the_same_is_not_ignored(tmp_path):
    """transformers would load the embedding's table in its place."""
    subject = models.llama_tied()
    base = saved(tmp_path, subject.model)
    tensors = state(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapted, folder = adapter_of(tmp_path, subject.model, Lora(("lm_head",)))
    merge_peft(base, folder, tmp_path / "merged")
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        expected = adapted(**subject.inputs)[0]
        torch.testing.assert_close(loaded(**subject.inputs)[0], expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_the_base_does_not_have_is_added(tmp_path):
    subject = models.llama_short()
    base = saved(tmp_path, subject.model)
    classifier = tf.LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
    lora = Lora(("q_proj",), task_type="SEQ_CLS", extra=(("modules_to_save", ["score"]),))
    adapted, folder = adapter_of(tmp_path, classifier, lora)
    merge_peft(base, folder, tmp_path / "merged")
    loaded = tf.LlamaForSequenceClassification.from_pretrained(tmp_path / "merged", num_labels=3).eval()
    with torch.no_grad():
        expected = adapted(**subject.inputs)[0]
        torch.testing.assert_close(loaded(**subject.inputs)[0], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("inner", ["checkpoint", "adapter"])
def test_a_prefix_that_one_of_the_two_lacks_is_found(inner, tmp_path):
    """An adapter trained on AutoModel for a checkpoint with a head, and the other way round."""
    whole = models.bert_classifier()
    body = tf.BertModel(whole.model.config, add_pooling_layer=False).eval()
    body.load_state_dict(whole.model.bert.state_dict(), strict=False)
    lora = Lora(("query", "value"))
    saved(tmp_path, body if inner == "checkpoint" else whole.model)
    adapted, folder = adapter_of(tmp_path, body if inner == "adapter" else whole.model, lora)
    merge_peft(tmp_path / "base", folder, tmp_path / "merged")
    loaded = tf.BertModel.from_pretrained(tmp_path / "merged", add_pooling_layer=False).eval()
    bert = adapted.base_model.model
    bert = bert if inner == "adapter" else bert.bert
    with torch.no_grad():
        expected = bert(**whole.inputs)[0]
        torch.testing.assert_close(loaded(**whole.inputs)[0], expected, rtol=1e-4, atol=2e-5)


def test_a_name_that_two_modules_end_in_is_refused(tmp_path):
    tensors = {f"{tower}.layers.0.q_proj.weight": torch.ones(3, 4) for tower in ("text", "vision")}
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(tensors, tmp_path / "base" / "model.safetensors")
    adapter = Adapter({"layers.0.q_proj": LowRank(a=np.ones((1, 4), np.float32), b=np.ones((1, 3), np.float32))})
    with pytest.raises(ax.MismatchError, match=r"no such module; nearest is (text|vision)\.layers\.0\.q_proj"):
        merge_peft(tmp_path / "base", adapter, tmp_path / "merged")


def test_every_fault_is_told_before_anything_is_written(tmp_path):
    base = saved(tmp_path, models.llama_short().model)
    change = LowRank(a=np.ones((2, 48), np.float32), b=np.ones((2, 48), np.float32))
    wide = LowRank(a=np.ones((2, 99), np.float32), b=np.ones((2, 48), np.float32))
    shift = LowRank.of_parts({"shift": np.ones((1, 48), np.float32)})
    layer = "model.layers.0.self_attn"
    adapter = Adapter({f"{layer}.q_proj": wide, f"{layer}.w_proj": change, f"{layer}.o_proj": shift})
    with pytest.raises(ax.MismatchError) as caught:
        merge_peft(base, adapter, tmp_path / "merged")
    told = str(caught.value)
    assert "at 3 of 3 sites" in told
    assert "q_proj: the adapter is (99,) -> 48, the weight is 48 -> 48" in told
    assert "w_proj: the checkpoint has no such module; nearest is" in told
    assert "o_proj: it changes the bias, and the checkpoint has no" in told
    assert not (tmp_path / "merged").exists()


def test_prompts_are_refused(tmp_path):
    base = saved(tmp_path, models.llama_short().model)
    _, folder = adapter_of(tmp_path, models.llama_short().model, Lora((), kind="prompt", task_type="CAUSAL_LM"))
    with pytest.raises(ax.MismatchError, match="a prompt stands beside the weights"):
        merge_peft(base, folder, tmp_path / "merged")


def test_quantized_checkpoints_are_refused(tmp_path):
    base = saved(tmp_path, models.llama_short().model)
    adapter = Adapter({"model.layers.0.self_attn.q_proj": LowRank(a=np.ones((1, 48)), b=np.ones((1, 48)))})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ax.FormatError, match=r"quantized \(gptq\)"):
        merge_peft(base, adapter, tmp_path / "merged")
    (base / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.to(torch.int8) for name, tensor in state(base).items()}
    safetensors.torch.save_file(tensors, base / "model.safetensors")
    with pytest.raises(ax.MismatchError, match=r"q_proj\.weight is int8"):
        merge_peft(base, adapter, tmp_path / "merged")


def test_folders_that_are_no_checkpoint_are_refused(tmp_path):
    adapter = Adapter({"fc": LowRank(a=np.ones((1, 4)), b=np.ones((1, 4)))})
    base = saved(tmp_path, models.llama().model, max_shard_size="60KB")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ax.OptionError, match="not an empty folder"):
        merge_peft(base, adapter, tmp_path / "full")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ax.FormatError, match=r"no \.safetensors file; pytorch_model\.bin is a pickle"):
        merge_peft(tmp_path / "old", adapter, tmp_path / "out")
    first = sorted(base.glob("*.safetensors"))[0]
    moved = first.read_bytes()
    first.unlink()
    with pytest.raises(ax.FormatError, match=f"the folder lacks {first.name}"):
        merge_peft(base, adapter, tmp_path / "out")
    first.write_bytes(moved)
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model.norm.weight"', '"model.norms.weight"'))
    with pytest.raises(ax.FormatError, match=r"model\.norms\.weight: said to be in"):
        merge_peft(base, adapter, tmp_path / "out")
