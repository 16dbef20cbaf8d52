"""Ports fit the model that they are put into: its names, its opset, its dtype, the dimensions of its rows."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from adapterx.errors import ModelError
from adapterx.graph.extract import extract_adapters
from adapterx.manifest import KEY, Manifest
from tests.graph.test_joins import OUT, WEIGHTS, D, model, run
from tests.graph.text_models import Layer, text_model

BRANCH = "b = MatMul(x, W)\n l = MatMul(x, A)\n z = MatMul(l, B)\n d = Mul(z, s)\n y = Add(b, d)"
X = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)


def renamed(proto, old, new):
    for node in proto.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for tensor in proto.graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name
    return proto


def packs_of(out):
    (entry,) = [e for e in onnx.load(out.model_path).metadata_props if e.key == KEY]
    return Manifest.loads(entry.value, where="m").packs


def layers(count, rank=2):
    return tuple(Layer(f"model.layers.{i}.q_proj", 8, 8, rank, 2.0) for i in range(count))


@pytest.mark.parametrize(("old", "new"), [("b", "adapter_mask"), ("b", "fc.lora_B.weight"), ("W", "adapter_mask")])
def test_whatever_goes_by_the_name_of_a_port_gives_way(tmp_path, old, new):
    proto = renamed(model(BRANCH), old, new)
    x = np.ones((3, D), np.float32)
    got = run(str(extract_adapters(proto, tmp_path, make_inputs=True).model_path), {"x": x})
    np.testing.assert_allclose(got, x @ WEIGHTS["W"], atol=1e-4)


@pytest.mark.parametrize("given", [lambda proto: proto, ir.from_proto], ids=["proto", "ir"])
def test_the_callers_own_tensors_keep_their_names(tmp_path, given):
    proto = renamed(model(BRANCH), "W", "adapter_mask")
    mine = given(proto)
    assert extract_adapters(mine, tmp_path, make_inputs=True).sites.names == ["fc"]
    assert "adapter_mask" in [tensor.name for tensor in proto.graph.initializer]
    if mine is not proto:
        assert mine.graph.initializers["adapter_mask"].const_value.name == "adapter_mask"


def test_the_interface_of_a_model_does_not_give_way(tmp_path):
    proto = renamed(model(BRANCH), "y", "fc.lora_A.weight")
    proto.graph.output[0].name = "fc.lora_A.weight"
    with pytest.raises(ModelError, match=r"\['fc.lora_A.weight'\], which adapterx needs"):
        extract_adapters(proto, tmp_path / "out", make_inputs=True)


@pytest.mark.parametrize("opset", [11, 12, 13, 18])
def test_packed_ports_and_masks_of_three_dimensions_are_spelled_for_the_models_opset(tmp_path, opset):
    text = text_model(layers(2))
    text.proto.opset_import[0].version = opset
    out = extract_adapters(text.proto, tmp_path, make_inputs=True, pack_inputs=True)
    np.testing.assert_allclose(run(str(out.model_path), {"x": X}), text.expected(X, None), rtol=1e-3, atol=1e-4)
    exported, packs = text.exported(), packs_of(out)
    feeds = {p.name: np.concatenate([exported[site][p.side == "lora_B"] for site in p.sites]) for p in packs}
    got = run(str(out.model_path), {"x": X, **feeds})
    np.testing.assert_allclose(got, text.expected(X, exported), rtol=1e-3, atol=1e-2)


def test_members_of_a_pack_are_in_natural_order_whatever_the_order_of_the_graph(tmp_path):
    out = extract_adapters(text_model(layers(11)[::-1]).proto, tmp_path, make_inputs=True, pack_inputs=True)
    assert packs_of(out)[0].sites == tuple(layer.name for layer in layers(11))


def test_members_of_unequal_rank_are_not_packed(tmp_path):
    mixed = (*layers(1), Layer("model.layers.1.q_proj", 8, 8, 3, 2.0))
    assert packs_of(extract_adapters(text_model(mixed).proto, tmp_path, make_inputs=True, pack_inputs=True)) == ()


def test_required_packed_inputs_have_no_default(tmp_path):
    proto = text_model(layers(2)).proto
    out = extract_adapters(proto, tmp_path, make_inputs=True, pack_inputs=True, optional_inputs=False)
    assert not [t.name for t in onnx.load(out.model_path).graph.initializer if t.name.endswith("packed")]


def test_a_pack_of_one_is_not_split(tmp_path):
    out = extract_adapters(text_model(layers(1)).proto, tmp_path, make_inputs=True, pack_inputs=True)
    assert [node.op_type for node in onnx.load(out.model_path).graph.node if node.op_type == "Split"] == []
    assert len(packs_of(out)) == 2


def test_a_half_precision_site_has_half_precision_ports_and_mask(tmp_path):
    proto = model(BRANCH)
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    out = extract_adapters(proto, tmp_path, make_inputs=True)
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2, d)).astype(np.float16) for d in (D, OUT))
    x = np.ones((3, D), np.float16)
    mask = np.array([[1, 1], [0, 0], [1, 0]], np.float32)
    got = run(str(out.model_path), {"x": x, "fc.lora_A.weight": a, "fc.lora_B.weight": b, "adapter_mask": mask})
    want = x @ WEIGHTS["W"].astype(np.float16) + ((x @ a.T) * mask) @ b
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=5e-2)
