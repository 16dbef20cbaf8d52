"""Who a branch is by the words of exporters: names of weights, metadata, scopes, node paths."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from adapterx.graph.branches import find_branches
from adapterx.graph.claims import FOLDED_FROM, NAME_SCOPES, claims_of, listed, parse_tensor_name, path_parts
from adapterx.graph.sites import find_sites
from tests.graph.test_joins import model

BODY = "b = MatMul(x, W)\n l = MatMul(x, A)\n z = MatMul(l, B)\n y = Add(b, z)"
MODULE = "m.base_model.model.model.layers.0.self_attn.q_proj"


def branch(names=None, body=BODY):
    (found,) = find_branches(ir.from_proto(model(body, names={} if names is None else names)))
    return found


def words(found):
    return [(claim.source, claim.module, claim.adapter) for claim in claims_of(found)]


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        (f"{MODULE}.lora_A.default.weight", (MODULE, "A", "default")),
        (f"{MODULE}.lora_B.style.weight", (MODULE, "B", "style")),
        (f"{MODULE}.lora_A.v_1.weight", (MODULE, "A", "v_1")),
        (f"{MODULE}.lora_A.weight", (MODULE, "A", "")),
        (f"{MODULE}.lora_A.default", (MODULE, "A", "default")),
        (f"{MODULE}.lora_A", (MODULE, "A", "")),
        (f"{MODULE}.lora_B.default.weight_quantized", (MODULE, "B", "default")),
        (f"{MODULE}.lora_A.default.weight_Q4", (MODULE, "A", "default")),
        (f"{MODULE}.lora_A.default.weight_DQ_Q4", (MODULE, "A", "default")),
        (f"{MODULE}.lora_B.default.weight_transposed_by_hand", None),
        ("model.layers.0.attn.q_proj.lora_A.MatMul.weight", ("model.layers.0.attn.q_proj", "A", "")),
        ("unet.mid.to_q.lora.down.weight", ("unet.mid.to_q", "A", "")),
        ("unet.mid.to_q.lora.up.weight", ("unet.mid.to_q", "B", "")),
        ("unet.mid.to_q.lora_linear_layer.up.weight", ("unet.mid.to_q", "B", "")),
        ("lora_A.default.weight", None),
        ("fc.lora_C.default.weight", None),
        ("fc.lora_alpha.weight", None),
        ("fc.lora_embedding_A.default", ("fc", "A", "default")),
        ("fc.weight", None),
        ("", None),
    ],
)
def test_the_name_of_a_weight_tells_module_side_and_adapter(name, parsed):
    assert parse_tensor_name(name) == parsed


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("['', 'm', 'm.fc']", ["", "m", "m.fc"]),
        ("('m', 'n')", ["m", "n"]),
        ("'m'", []),
        ("{'m': 1}", []),
        ("['m'", []),
        ("m.fc", []),
        ("[" * 5000, []),
        ("", []),
        (None, []),
    ],
    ids=str,
)
def test_metadata_is_a_list_literal_or_tells_nothing(text, names):
    assert listed(text) == names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("/m/fc/default/MatMul", ["m", "fc", "default", "MatMul"]),
        ("/m/fc/MatMul/MatMulScaleFusion/", ["m", "fc", "MatMul"]),
        ("fused /m/fc/base_layer/MatMul/MatMulAddFusion", ["m", "fc", "base_layer", "MatMul"]),
        ("node_linear_1", []),
        ("", []),
    ],
)
def test_a_node_path_has_the_parts_between_its_slashes(name, parts):
    assert path_parts(name) == parts


def test_weights_that_kept_their_names_are_believed_for_their_own_side_only():
    right = branch({"A": "m.fc.lora_A.default.weight", "B": "m.fc.lora_B.default.weight"})
    assert words(right) == [("initializer", "m.fc", "default")] * 2
    assert words(branch({"A": "m.fc.lora_B.default.weight", "B": "m.fc.lora_A.default.weight"})) == []


def test_a_name_counts_wherever_it_lies_between_the_weight_and_its_node():
    body = (
        "b = MatMul(x, W)\n t = Transpose(A)\n c = Transpose(t)\n l = MatMul(x, c)\n z = MatMul(l, B)\n y = Add(b, z)"
    )
    assert words(branch({"A": "fc.lora_A.weight"}, body)) == [("initializer", "fc", "")]
    proto = model(body, names={})
    proto.graph.node[1].output[0] = proto.graph.node[2].input[0] = "fc.lora_A.weight"
    assert words(find_branches(ir.from_proto(proto))[0]) == [("initializer", "fc", "")]


@pytest.mark.parametrize(
    ("origins", "claims"),
    [
        ("['m.fc.lora_A.default.weight']", [("folded_from", "m.fc", "default")]),
        ("['val_3', 'm.fc.lora_A.default.weight', 'mul_2']", [("folded_from", "m.fc", "default")]),
        ("['m.fc.lora_A.default', 'm.fc.lora_E.default']", [("folded_from", "m.fc", "default")]),
        ("['m.fc.lora_B.default.weight']", []),
        ("['m.fc.lora_A.default.weight', 'm.fc.lora_B.default.weight']", []),
        ("['m.fc.lora_A.default.weight', 'm.fc.lora_A.style.weight']", []),
    ],
)
def test_a_weight_folded_from_one_lora_weight_of_its_side_is_that_weight(origins, claims):
    found = branch()
    found.a.weight.root.metadata_props[FOLDED_FROM] = origins
    assert words(found) == claims


@pytest.mark.parametrize(
    ("scopes", "claims"),
    [
        ("['', 'm', 'm.fc', 'm.fc.lora_A.default', 'linear_1']", [("name_scopes", "m.fc", "default")]),
        ("['m.fc.lora_A', 'linear_1']", [("name_scopes", "m.fc", "")]),
        ("['m.lora_A.one', 'm.lora_A.one.fc', 'm.lora_A.one.fc.lora_A.two', 'x']",
         [("name_scopes", "m.lora_A.one.fc", "two")]),
        ("['m.fc.lora_A.default', 'm.fc.lora_B.default', 'linear_1']", []),
        ("['m.fc', 'linear_1']", []),
    ],
)  # fmt: skip
def test_the_innermost_lora_scope_of_a_node_names_its_module_when_it_is_of_its_side(scopes, claims):
    found = branch()
    found.a.node.metadata_props[NAME_SCOPES] = scopes
    assert words(found) == claims


WRAPPED, BARE = "/m/fc/base_layer/MatMul", ""


@pytest.mark.parametrize(
    ("base", "a", "b", "claim"),
    [
        (WRAPPED, "/m/fc/default/MatMul", "/m/fc/default_1/MatMul", ("m/fc", "default")),
        (WRAPPED, "/m/fc/v_1/MatMul", "/m/fc/v_1_1/MatMul", ("m/fc", "v_1")),
        (WRAPPED, "/m/fc/default_1/MatMul", "/m/fc/default_2/MatMul", ("m/fc", "default")),
        ("/m/fc/base_layer_1/MatMul", "/m/fc/default_2/MatMul", "/m/fc/default_3/MatMul", ("m/fc", "default")),
        (WRAPPED, "/m/fc/default_1/MatMul", "/m/fc/default_3/MatMul", None),
        (WRAPPED, "/m/fc/default/MatMul", "/m/fc/style/MatMul", None),
        (WRAPPED, "/m/fc/MatMul", "/m/fc/MatMul_1", ("m/fc", "")),
        (WRAPPED, "/m/fc/Gemm_1/", "/m/fc/Gemm_2/", ("m/fc", "")),
        (WRAPPED, "/m/fc/lora_A/default/MatMul", "/m/fc/lora_B/default/MatMul", ("m/fc", "default")),
        (WRAPPED, "/m/gc/default/MatMul", "/m/gc/default_1/MatMul", None),
        (WRAPPED, "/m/fc/default/MatMul", "/m/gc/default_1/MatMul", None),
        (WRAPPED, "", "", None),
        (WRAPPED, "/m/fc", "/m/fc", None),
        ("fused /m/fc/base_layer/MatMul/MatMulAddFusion", "/m/fc/default/MatMul", "/m/fc/default_1/MatMul",
         ("m/fc", "default")),
        (BARE, "/m/fc/default/MatMul", "/m/fc/default_1/MatMul", ("m/fc", "default")),
        (BARE, "/m/fc/MatMul", "/m/fc/MatMul_1", None),
        (BARE, "/m/fc/default_1/MatMul", "/m/fc/default_2/MatMul", None),
        (BARE, "/m/fc/default/MatMul", "/m/fc/default_2/MatMul", None),
        ("/m/up/MatMul", "/m/down/MatMul", "/m/down_1/MatMul", None),
        ("/fc/MatMul", "/fc/lora_A/MatMul", "/fc/lora_B/MatMul", ("fc", "")),
        ("/fc/MatMul", "/fc/lora_A/style/MatMul", "/fc/lora_B/style/MatMul", ("fc", "style")),
        ("/fc/MatMul", "/lora_A/MatMul", "/lora_B/MatMul", None),
        ("/fc/MatMul", "/fc/one/MatMul", "/fc/two/MatMul", None),
    ],
)  # fmt: skip
def test_node_paths_name_the_module_when_they_are_those_that_peft_gives(base, a, b, claim):
    found = branch()
    found.base_op.name, found.a.node.name, found.b.node.name = base, a, b
    assert words(found) == ([] if claim is None else [("node_path", *claim)])


def test_sources_are_believed_in_the_order_initializer_folded_from_scopes_path():
    names = {"A": "fc.lora_A.default.weight", "B": "fc.lora_B.default.weight"}
    found = branch(names)
    found.b.weight.root.metadata_props[FOLDED_FROM] = "['fc.lora_B.default.weight']"
    found.a.node.metadata_props[NAME_SCOPES] = "['fc.lora_A.default', 'linear']"
    found.a.node.name, found.b.node.name, found.base_op.name = "/fc/default/x", "/fc/default_1/x", "/fc/base_layer/x"
    sources = ["initializer", "initializer", "folded_from", "name_scopes", "node_path"]
    assert [claim.source for claim in claims_of(found)] == sources


def test_a_weight_that_serves_two_branches_names_neither_when_scopes_do():
    """Equal tensors are merged by exporters: the name of the one that is left stands for one module at most."""
    body = (
        "b = MatMul(x, W)\n l = MatMul(x, A)\n z = MatMul(l, B)\n t = Add(b, z)\n"
        " c = MatMul(x, W)\n m = MatMul(x, A)\n w = MatMul(m, B)\n u = Add(c, w)\n y = Add(t, u)"
    )
    proto = model(body)
    for node, module, side in ((1, "one", "A"), (2, "one", "B"), (5, "two", "A"), (6, "two", "B")):
        scopes = f"['m.base_model.model.{module}.lora_{side}.default', 'linear']"
        proto.graph.node[node].metadata_props.add(key=NAME_SCOPES, value=scopes)
    sites = find_sites(proto)
    assert [(site.name, site.name_source) for site in sites] == [("one", "name_scopes"), ("two", "name_scopes")]
