"""A model of which only a part could be extracted is refused, and the message names what would have stayed."""

from __future__ import annotations

import re

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

from adapterx.errors import ModelError
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites

LORA = """
    b = MatMul(x, W)
    l = MatMul(x, A)
    z = MatMul(l, B)
    h = Add(b, z)
"""
LORA_PATHS = {"b": "/m/fc/base_layer/MatMul", "l": "/m/fc/style/MatMul", "z": "/m/fc/style_1/MatMul", "h": "/m/fc/Add"}
SHAPES = {"W": (6, 6), "A": (6, 2), "B": (2, 6), "V": (6, 6), "scale": (6,), "table": (9, 6), "E": (9, 2), "F": (2, 6)}
SHAPES |= {"W2": (6, 6), "A2": (6, 2), "B2": (2, 6)}


def model(body, paths, inputs="float[N, 6] x"):
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]>\ng ({inputs}) => (float[N, 6] y) {{{LORA}{body}}}'
    )
    rng = np.random.default_rng(0)
    used = {name for node in proto.graph.node for name in node.input}
    for name, shape in SHAPES.items():
        if name in used:
            proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype("f"), name))
    for node in proto.graph.node:
        node.name = (LORA_PATHS | paths).get(node.output[0], f"/m/{node.output[0]}/{node.op_type}")
    return proto


def assert_refused(proto, tmp_path, message):
    with pytest.raises(ModelError, match=message):
        extract_adapters(proto, tmp_path / "out", make_inputs=True)
    assert re.search(f"left out: .*{message}", str(find_sites(proto)))
    assert not (tmp_path / "out").exists()
    assert extract_adapters(proto, tmp_path / "out", make_inputs=True, partial=True).sites.names == ["fc"]


def test_a_model_that_is_lora_throughout_is_taken(tmp_path):
    proto = model("y = MatMul(h, V)", {"y": "/m/head/MatMul"})
    assert extract_adapters(proto, tmp_path, make_inputs=True).sites.names == ["fc"]


def test_a_norm_that_was_trained_in_full_would_stay(tmp_path):
    proto = model("y = LayerNormalization(h, scale)", {"y": "/m/norm/style/LayerNormalization"})
    assert_refused(proto, tmp_path, "norm: trained in full")


def test_a_module_that_peft_wrapped_otherwise_would_stay(tmp_path):
    proto = model("v = MatMul(h, V)\n y = Sin(v)", {"v": "/m/up/base_layer/MatMul", "y": "/m/up/Sin"})
    assert_refused(proto, tmp_path, "up: wrapped by PEFT")


EMBEDDED = """
    e = Gather(table, ids)
    f = Gather(E, ids)
    g = MatMul(f, F)
    s = Add(e, g)
    y = Add(h, s)
"""


def test_an_embeddings_branch_that_lost_its_name_would_stay(tmp_path):
    proto = model(EMBEDDED, {"e": "n1", "f": "n2", "g": "n3", "s": "n4"}, "float[N, 6] x, int64[N] ids")
    assert_refused(proto, tmp_path, "node 'n4': embedding of rank 2 that nothing names")


SECOND = """
    b2 = MatMul(h, W2)
    l2 = MatMul(h, A2)
    z2 = MatMul(l2, B2)
    y = Add(b2, z2)
"""


def test_a_branch_like_the_others_that_lost_its_name_would_stay(tmp_path):
    proto = model(SECOND, {"b2": "n1", "l2": "n2", "z2": "n3", "y": "n4"})
    assert_refused(proto, tmp_path, r"node 'n4': 6 -> 2 -> 6, like the sites that are named")


def test_a_base_weight_that_kept_its_name_names_the_branch(tmp_path):
    proto = model(SECOND, {"b2": "n1", "l2": "n2", "z2": "n3", "y": "n4"})
    name = "m.base_model.model.up.base_layer.weight"
    for tensor in proto.graph.initializer:
        tensor.name = name if tensor.name == "W2" else tensor.name
    for node in proto.graph.node:
        node.input[:] = [name if one == "W2" else one for one in node.input]
    out = extract_adapters(proto, tmp_path, make_inputs=True)
    assert [(site.name, site.adapter) for site in out.sites] == [("fc", "style"), ("up", "style")]


def test_a_constant_that_speaks_of_an_adapter_would_stay(tmp_path):
    proto = model("y = Mul(h, scale)", {})
    name = "base_model.model.fc.lora_magnitude_vector.style"
    for tensor in proto.graph.initializer:
        tensor.name = name if tensor.name == "scale" else tensor.name
    for node in proto.graph.node:
        node.input[:] = [name if one == "scale" else one for one in node.input]
    assert_refused(proto, tmp_path, "lora_magnitude_vector")
