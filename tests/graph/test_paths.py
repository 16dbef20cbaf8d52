"""Names as exporters spell them, and the checkpoint's own path for each."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from adapterx.graph.claims import FOLDED_FROM, NAME_SCOPES
from adapterx.graph.paths import Paths

Q = "model.layers.0.self_attn.q_proj"
EMBED, NORM = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"


def model(weights=(), nodes=(), *, producer="", folded=(), scopes=()):
    """A model with weights and nodes of these names, and metadata of these contents."""
    x = ir.Value(name="x")
    initializers = []
    for name in weights:
        tensor = ir.tensor(np.zeros((2, 2), np.float32), name=name)
        initializers.append(ir.Value(name=name, const_value=tensor))
    for i, origins in enumerate(folded):
        value = ir.Value(name=f"val_{i}", const_value=ir.tensor(np.zeros((2, 2), np.float32), name=f"val_{i}"))
        value.metadata_props[FOLDED_FROM] = str(origins)
        initializers.append(value)
    made = [ir.node("Relu", [x], name=name) for name in nodes]
    for scope in scopes:
        made.append(ir.node("Relu", [x], name="relu", metadata_props={NAME_SCOPES: str(scope)}))
    graph = ir.Graph([x], [node.outputs[0] for node in made], nodes=made, initializers=initializers, name="g")
    return ir.Model(graph, ir_version=10, producer_name=producer)


LLAMA_NODES = (
    "/m/model/model/layers.0/input_layernorm/Mul",
    "/m/model/model/layers.0/self_attn/q_proj/base_layer/MatMul",
    "/m/model/model/layers.0/self_attn/Softmax",
    "/m/model/model/layers.0/mlp/act_fn/Mul",
    "/m/model/model/norm/Mul",
)
PEFT_WEIGHTS = (f"m.base_model.model.{EMBED}", f"m.base_model.model.{NORM}")
T5_WEIGHTS = ("encoder.block.0.layer.0.layer_norm.weight", "encoder.block.0.layer.1.layer_norm.weight")
BOTH_T5_WEIGHTS = (*T5_WEIGHTS, *(name.replace("encoder", "decoder") for name in T5_WEIGHTS))


@pytest.mark.parametrize(
    ("weights", "spelled", "canonical"),
    [
        # PEFT's own names need nothing else.
        ((), f"m.base_model.model.{Q}", Q),
        ((), f"net.inner.base_model.model.{Q}", Q),
        ((), f"base_model.model.{Q}", Q),
        ((), Q, Q),
        # What all weights share in front is the export's, up to what a checkpoint has itself.
        (("m.model.norm.weight", "m.lm_head.weight"), f"m.{Q}", Q),
        (("m.fc1.weight", "m.fc2.weight"), "m.fc1", "fc1"),
        (("m.fc1.weight", "m.fc2.bias"), "m", "m"),
        (("m.fc1.weight", "m.fc2.weight"), "other.fc1", "other.fc1"),
        (("model.norm.weight", "model.embed.weight"), Q, Q),
        (("bert.embeddings.weight", "bert.pooler.weight"), "bert.encoder.layer.0", "bert.encoder.layer.0"),
        (("m.bert.embeddings.weight", "m.bert.pooler.weight"), "m.bert.encoder.layer.0", "bert.encoder.layer.0"),
        (("fc1.weight", "m.fc2.weight"), "m.fc2", "m.fc2"),
        # Tensors that are no module's weights have no say, nor have PEFT's, whose root is longer.
        (("m.fc1.weight", "m.fc2.weight", "onnx::MatMul_7", "scale"), "m.fc1", "fc1"),
        (("m.fc1.weight", "m.fc2.weight", "base_model.model.fc2.lora_A.weight"), "m.fc1", "fc1"),
    ],
)  # fmt: skip
def test_a_dotted_name_loses_what_wrapped_the_checkpoint(weights, spelled, canonical):
    assert Paths.of(model(weights)).canonical(spelled) == canonical


@pytest.mark.parametrize(
    ("weights", "nodes", "spelled", "canonical"),
    [
        # torch.onnx's TorchScript exporter, by how the model was wrapped.
        (PEFT_WEIGHTS, LLAMA_NODES, "m/model/model/layers.0/self_attn/q_proj", Q),
        (PEFT_WEIGHTS, (), "m/model/model/layers.0/self_attn/q_proj", Q),
        (PEFT_WEIGHTS, (), "m/base_model/model/model/layers.0/self_attn/q_proj", Q),
        (PEFT_WEIGHTS, (), "net/inner/model/model/layers.0/self_attn/q_proj", Q),
        (PEFT_WEIGHTS, (), "model/layers.0/self_attn/q_proj", Q),
        # A module without weights of its own is placed by its neighbours' nodes.
        (PEFT_WEIGHTS, LLAMA_NODES, "m/model/lm_head", "lm_head"),
        (PEFT_WEIGHTS, LLAMA_NODES, "m/model", "model"),
        # Without any dotted name, what PEFT calls its root is all there is.
        ((), (), "m/base_model/model/fc1", "fc1"),
        ((), (), "m/base_model/fc1", "fc1"),
        ((), (), "base_model/model", "model"),
        ((), (), "x/fc1", "x.fc1"),
        # Nodes share the wrapper where no weight kept its name.
        ((), ("/m/fc1/MatMul", "/m/fc2/MatMul"), "m/fc1", "fc1"),
        ((), ("/encoder/a/MatMul", "/encoder/b/MatMul"), "encoder/a", "encoder.a"),
        # The wrapper of an nn.Sequential, which the path of a child names twice; and a Sequential's second call.
        (("m.0.weight", "m.2.weight"), ("/m/m.0/Gemm", "/m/m.4/MatMul"), "m/m.4", "4"),
        ((), ("/m/enc/enc.0/MatMul", "/m/head/MatMul"), "m/enc/enc.0_1", "enc.0_1"),
        # An encoder that was exported alone lost its own name; the weights still have it.
        (T5_WEIGHTS, (), "block.0/layer.0/SelfAttention/q", "encoder.block.0.layer.0.SelfAttention.q"),
        (BOTH_T5_WEIGHTS, (), "block.0/layer.0/SelfAttention/q", "block.0.layer.0.SelfAttention.q"),
        (BOTH_T5_WEIGHTS, (), "decoder/block.0/layer.0/SelfAttention/q", "decoder.block.0.layer.0.SelfAttention.q"),
    ],
)  # fmt: skip
def test_a_node_path_leads_to_the_checkpoints_module(weights, nodes, spelled, canonical):
    assert Paths.of(model(weights, nodes)).canonical(spelled) == canonical


def test_the_only_module_that_kept_a_name_shares_no_more_of_it_with_the_others_than_nodes_do():
    nodes = ("/m/stem/conv/Conv", "/m/classifier/classifier.1/Gemm")
    assert Paths.of(model(("m.classifier.1.weight", "m.classifier.1.bias"), nodes)).wrapper == ("m",)
    assert Paths.of(model(("m.classifier.1.weight",))).canonical("m.classifier.1") == "m.classifier.1"


def test_most_nodes_decide_where_the_module_tree_begins():
    """``model`` repeats: /model/model/layers.0 is the wrapper's model and the checkpoint's, not two of one."""
    stray = "/a/m/model/model/layers.0/self_attn/Extra"
    assert Paths.of(model(PEFT_WEIGHTS, (stray, *LLAMA_NODES))).node_wrapper == ("m", "model")


def test_the_deepest_known_module_is_found_from_the_fewest_parts_left_out():
    names = ("m.base_model.model.a.b.weight", "m.base_model.model.a.a.b.c.weight")
    assert Paths.of(model(names)).canonical("w/a/a/b/q") == "a.a.b.q"


def test_a_module_tree_that_repeats_itself_begins_as_early_as_it_can():
    assert Paths.of(model(("m.base_model.model.a.b.c.weight",))).canonical("w/a/b/a/b/q") == "a.b.a.b.q"


def test_the_longest_part_of_a_path_that_weights_know_tells_what_was_left_out_before_it():
    names = (*T5_WEIGHTS, "vision.block.0.norm.weight")
    assert Paths.of(model(names)).canonical("block.0/layer.0/q") == "encoder.block.0.layer.0.q"


def test_one_part_in_common_is_met_by_chance():
    names = ("m.base_model.model.model.norm.weight", "m.base_model.model.model.embed.weight")
    assert Paths.of(model(names)).canonical("wrapper/model/fc") == "wrapper.model.fc"


def test_folded_weights_and_scopes_tell_where_the_tree_begins_too():
    """torch.onnx's dynamo exporter folds weights away; what they were lies in the metadata."""
    assert Paths.of(model(folded=(["m.model.norm.weight", "val_1"],))).wrapper == ("m",)
    scopes = (["", "m", "m.model", "m.model.fc", "linear"], ["", "m", "m.head", "linear_1"])
    assert Paths.of(model(scopes=scopes)).wrapper == ("m",)


@pytest.mark.parametrize(
    ("weights", "producer"), [((), "onnxruntime-genai"), (("model.layers.0.mlp.up_proj.MatMul.weight",), "onnx_ir")]
)
def test_the_genai_builders_attn_is_the_checkpoints_self_attn(weights, producer):
    paths = Paths.of(model(weights, producer=producer))
    assert paths.canonical("model.layers.0.attn.q_proj") == Q
    assert paths.canonical("model/layers.0/attn/q_proj") == Q


def test_elsewhere_attn_is_a_checkpoints_own_word():
    paths = Paths.of(model(("transformer.h.0.attn.c_attn.weight",), producer="pytorch"))
    assert paths.canonical("transformer.h.0.attn.c_attn") == "transformer.h.0.attn.c_attn"
