"""What is DoRA, VeRA, LoHa, LoKr or (IA)3 in a graph, what only looks like it, and what is refused."""

import re

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from adapterx.adapter import GAIN, INPUT_GAIN, Adapter, LowRank
from adapterx.errors import AdapterxError, ModelError, NoAdaptersFound
from adapterx.graph.claims import FOLDED_FROM, NAME_SCOPES
from adapterx.graph.extract import extract_adapters
from adapterx.graph.load import load_model
from adapterx.graph.sites import find, find_sites
from adapterx.kinds.lora import of_delta
from adapterx.runtime.session import AdapterSession
from tests.zoo import build

D_IN, D_OUT = 6, 4
ROOT = "base_model.model"
NUMBERS = np.random.default_rng(0)


def model(text, names=(), **weights):
    """A model of one input ``x`` and output ``y``; ``names`` are given to the nodes, in order."""
    ends = f"g (float[n,{D_IN}] x) => (float[n,{D_OUT}] y)"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {ends} {{ {text} }}')
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    shapes = {"W": (D_IN, D_OUT), "D": (D_IN, D_OUT), "l": (D_OUT,), "k": (D_IN,), **weights}
    for name, shape in shapes.items():
        if any(name in node.input for node in proto.graph.node):
            array = NUMBERS.standard_normal(shape).astype(np.float32)
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
    for node, name in zip(proto.graph.node, names, strict=False):
        node.name = name
    return proto


def renamed(proto, **names):
    """``proto`` with constants under other names."""
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    for tensor in proto.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    return proto


def exported(name):
    return onnx.load(build(name).model)


SCALED = "b = MatMul(x, W)\n y = Mul(b, l)"
SUMMED = "b = MatMul(x, W)\n d = MatMul(x, D)\n y = Add(b, d)"


@pytest.mark.parametrize("text", [SCALED, "b = Mul(x, k)\n y = MatMul(b, W)", SUMMED])
@pytest.mark.parametrize(
    "names", [(), ("/m/fc/MatMul", "/m/scale/Mul", "/m/Add"), ("/m/fc/MatMul", "/m/fc/Mul", "/m/fc/Add")]
)
def test_a_vector_or_a_matrix_beside_a_layer_is_no_adapter_by_itself(text, names):
    """LayerScale, the weight of a norm, and two layers that read one value look the same."""
    with pytest.raises(NoAdaptersFound, match="looked at"):
        find_sites(model(text, names))


@pytest.mark.parametrize(
    ("text", "constant", "part", "kind"),
    [
        (SCALED, "l", "ia3_l", "ia3"),
        ("b = Mul(k, x)\n y = MatMul(b, W)", "k", "ia3_l", "ia3"),
        (SUMMED, "D", "lokr_w1", "lokr"),
        (SUMMED, "D", "hada_w1_a", "loha"),
    ],
)
def test_it_is_one_when_its_constant_says_so(text, constant, part, kind):
    [site] = find_sites(renamed(model(text), **{constant: f"{ROOT}.fc.{part}.style"}))
    assert (site.name, site.adapter, site.kind, site.name_source) == ("fc", "style", kind, "initializer")


@pytest.mark.parametrize("text", [SCALED, SUMMED])
def test_it_is_one_when_it_stands_in_the_module_that_wraps_the_layer(text):
    last = text.rsplit("= ", 1)[1].split("(")[0]
    paths = (
        ("/m/fc/base_layer/MatMul", f"/m/fc/{last}")
        if text is SCALED
        else ("/m/fc/base_layer/MatMul", "/m/fc/MatMul", "/m/fc/Add")
    )
    [site] = find_sites(model(text, paths))
    assert (site.name, site.name_source, site.adapter) == ("fc", "node_path", "")


def test_that_the_layer_is_wrapped_does_not_make_a_vector_behind_it_an_adapter():
    """Without paths and metadata it could be LayerScale; the adapter that was exported would tell."""
    proto = renamed(model(SCALED), W=f"{ROOT}.fc.base_layer.weight")
    with pytest.raises(NoAdaptersFound, match="looked at"):
        find_sites(proto)
    [vector] = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == "l"]
    exported = Adapter(
        {"fc": LowRank.of_parts({GAIN: vector[None] - 1}), "other": LowRank.of_parts({GAIN: vector[None]})}
    )
    assert [(site.name, site.name_source) for site in find_sites(proto, adapter=exported)] == [("fc", "adapter_values")]


def test_what_an_optimizer_appends_to_a_path_is_no_adapters_name():
    [site] = find_sites(model(SUMMED, ("/m/fc/base_layer/MatMul", "/m/fc/MatMul", "/m/fc/MatMul_1/MatMulAddFusion/")))
    assert (site.name, site.adapter) == ("fc", "")


def test_a_constant_that_was_folded_from_two_modules_names_neither():
    proto = model(SUMMED)
    proto.graph.value_info.append(helper.make_tensor_value_info("D", onnx.TensorProto.FLOAT, [D_IN, D_OUT]))
    folded = proto.graph.value_info[0].metadata_props.add(key=FOLDED_FROM)
    folded.value = str([f"{ROOT}.{module}.hada_w1_a.default" for module in ("one", "two")])
    with pytest.raises(NoAdaptersFound, match="hada_w1_a"):
        find_sites(proto)
    folded.value = str([f"{ROOT}.one.{part}.default" for part in ("hada_w1_a", "hada_w1_b")])
    assert [(site.name, site.kind) for site in find_sites(proto)] == [("one", "loha")]


FUSED = {
    "Gemm": ("b = MatMul(x, W)\n y = Gemm(x, D, b)", lambda v: v),
    "FusedGemm": (
        'b = MatMul(x, W)\n y = com.microsoft.FusedGemm<activation="Relu">(x, D, b)',
        lambda v: np.maximum(v, 0),
    ),
}


@pytest.mark.parametrize("form", FUSED)
def test_a_change_whose_addition_an_optimizer_made_part_of_the_product_is_taken(form, tmp_path):
    text, after = FUSED[form]
    proto = renamed(model(text), D=f"{ROOT}.fc.lokr_w1.default")
    out = extract_adapters(proto, tmp_path, make_inputs=True)
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    x, other = NUMBERS.standard_normal((3, D_IN)).astype(np.float32), NUMBERS.standard_normal((D_IN, D_OUT))
    session = AdapterSession(out.model_path)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], after(x @ weights["W"]), atol=1e-5)
    session.load_adapter("other", Adapter({"fc": of_delta(other.T, np.dtype("float32"))}))
    got = session.run(None, {"x": x}, adapter="other")[0]
    np.testing.assert_allclose(got, after(x @ (weights["W"] + other)), atol=1e-5)


def test_what_has_an_activation_inside_is_no_change_of_a_weight():
    activated = 'a = com.microsoft.FusedGemm<activation="Relu">(x, p)'
    text = f"b = MatMul(x, W)\n {activated}\n c = MatMul(a, q)\n d = Mul(c, l)\n y = Add(b, d)"
    proto = renamed(model(text, p=(D_IN, 2), q=(2, D_OUT)), l=f"{ROOT}.fc.vera_lambda_b.default")
    with pytest.raises(NoAdaptersFound, match="vera_lambda_b"):
        find_sites(proto)


def test_what_a_model_does_behind_a_wrapped_layer_stays_in_it(tmp_path):
    """The wrapped layer has its (IA)3, and LayerScale behind that is the model's."""
    text = "b = MatMul(x, W)\n c = Mul(b, l)\n y = Mul(c, s)"
    proto = model(text, ("/m/fc/base_layer/MatMul", "/m/fc/Mul", "/m/scale/Mul"), s=(D_OUT,))
    out = extract_adapters(proto, tmp_path, make_inputs=True)
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    x = np.ones((2, D_IN), np.float32)
    got = AdapterSession(out.model_path).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, x @ weights["W"] * weights["s"], rtol=1e-5)
    np.testing.assert_allclose(out.adapter.sites["fc"].parts[GAIN][0], weights["l"] - 1, atol=1e-6)


def test_the_input_of_one_of_two_layers_is_scaled_for_that_one_alone(tmp_path):
    text = "s = Mul(x, k)\n b = MatMul(s, W)\n d = MatMul(x, D)\n y = Add(b, d)"
    proto = model(text, ("/m/fc/Mul", "/m/fc/base_layer/MatMul", "/m/other/MatMul", "/m/Add"))
    out = extract_adapters(proto, tmp_path, make_inputs=True)
    assert list(out.adapter.sites["fc"].parts) == [INPUT_GAIN]
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    x = np.ones((2, D_IN), np.float32)
    np.testing.assert_allclose(
        AdapterSession(out.model_path).run(None, {"x": x})[0], x @ weights["W"] + x @ weights["D"], rtol=1e-5
    )


def test_what_a_wrapped_layer_is_added_to_further_down_is_no_adapter():
    """LoRA comes first behind the wrapped layer; that the model adds another layer of the same input is its own."""
    text = "b = MatMul(x, W)\n a = MatMul(x, A)\n c = MatMul(a, B)\n s = Add(b, c)\n d = MatMul(x, D)\n y = Add(s, d)"
    names = {"A": f"{ROOT}.fc.lora_A.default.weight", "B": f"{ROOT}.fc.lora_B.default.weight"}
    proto = renamed(model(text, A=(D_IN, 2), B=(2, D_OUT)), **names, W=f"{ROOT}.fc.base_layer.weight")
    assert [(site.name, site.kind) for site in find_sites(proto)] == [("fc", "lora")]


def test_constants_of_two_modules_at_one_place_are_believed_of_neither():
    text = "b = MatMul(x, W)\n h = MatMul(p, q)\n d = MatMul(x, h)\n y = Add(b, d)"
    proto = model(text, p=(D_IN, 2), q=(2, D_OUT))
    with pytest.raises(NoAdaptersFound, match="hada_w1_a"):
        find_sites(renamed(proto, p=f"{ROOT}.one.hada_w1_a.default", q=f"{ROOT}.two.hada_w1_b.default"))


# -- What cannot be taken ---------------------------------------------------------------------------------------------


def refused(proto, tmp_path, match):
    with pytest.raises(AdapterxError, match=match) as error:
        extract_adapters(proto, tmp_path / "out", make_inputs=True)
    assert not (tmp_path / "out").exists()
    return error.value


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("ts_dora", f"m.{ROOT}.fc1.base_layer.weight"),
        ("ts_dora_normed", None),
        ("dy_dora", f"m.{ROOT}.fc1.base_layer.weight"),
    ],
)
def test_a_dora_whose_base_weight_is_not_in_the_graph_is_refused_by_its_name(name, weight, tmp_path):
    proto = exported(name)
    if weight is None:
        # TorchScript keeps a copy of the weight, as the file has it, for the norm alone.
        weight = next(n.input[0] for n in proto.graph.node if n.name == "/m/model/up/default/Add")
    [tensor] = [tensor for tensor in proto.graph.initializer if tensor.name == weight]
    proto.graph.initializer.remove(tensor)
    proto.graph.input.append(helper.make_tensor_value_info(weight, onnx.TensorProto.FLOAT, list(tensor.dims)))
    error = refused(proto, tmp_path, re.escape(f"base weight {weight!r}"))
    assert isinstance(error, ModelError)


def test_a_dora_on_a_base_that_cannot_be_read_is_refused_with_the_way_out(tmp_path):
    proto = exported("dy_dora_normed")
    [base] = [node for node in proto.graph.node if node.name == "node_linear"]
    codes = {
        "B": np.zeros((56, 2, 16), np.uint8),
        "s": np.ones(112, np.float32),
        "order": np.arange(40, dtype=np.int32),
    }
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in codes.items())
    base.CopyFrom(
        helper.make_node(
            "MatMulNBits", [base.input[0], "B", "s", "", "order"], base.output, name=base.name, domain="com.microsoft",
            K=40, N=56, bits=4, block_size=32,
        )
    )  # fmt: skip
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    refused(proto, tmp_path, r"up: the weight of MatMulNBits at node 'node_add_14'|Quantize after the extraction")


def test_a_dora_whose_magnitude_is_the_norm_as_it_is_first_still_takes_others_that_shift(tmp_path):
    text = (
        "m = Gemm(x, W, c)\n o = Sub(m, c)\n g = Mul(none, o)\n p = Gemm(x, A)\n b = Gemm(p, B)\n s = Mul(one, b)\n"
        " d = Add(g, s)\n y = Add(m, d)"
    )
    proto = model(text, W=(D_IN, D_OUT), c=(D_OUT,), A=(D_IN, 2), B=(2, D_OUT), none=(1, D_OUT), one=(1, D_OUT))
    for tensor in proto.graph.initializer:
        if tensor.name in {"none", "one"}:
            tensor.CopyFrom(numpy_helper.from_array(np.full((1, D_OUT), tensor.name == "one", np.float32), tensor.name))
    names = {side: f"{ROOT}.fc.lora_{side}.default.weight" for side in "AB"}
    node = proto.graph.node[5]
    node.metadata_props.add(key=NAME_SCOPES, value=str(["", f"{ROOT}.fc.lora_magnitude_vector.default", "mul"]))
    out = extract_adapters(renamed(proto, W=f"{ROOT}.fc.base_layer.weight", **names), tmp_path, make_inputs=True)
    assert [(site.kind, set(site.ports)) for site in out.sites] == [("dora", {"lora_A", "lora_B", "gain", "shift"})]


@pytest.mark.parametrize("name", ["dy_dora_llama_ort_basic", "dy_dora_normed_stripped"])
def test_what_nothing_names_is_not_left_in_the_model_in_silence(name, tmp_path):
    with pytest.raises(AdapterxError, match="adapter=") as error:
        extract_adapters(build(name).model, tmp_path / "out", make_inputs=True)
    assert isinstance(error.value, ModelError | NoAdaptersFound)
    assert not (tmp_path / "out").exists()


def test_a_part_that_lost_its_name_is_extracted_only_when_that_is_asked_for(tmp_path):
    """``down`` has a bias that names it, ``up`` has nothing."""
    finding = find(load_model(build("dy_dora_normed_stripped").model))
    assert finding.sites.names == ["down"]
    assert len(finding.unsupported) == 1
    out = extract_adapters(build("dy_dora_normed_stripped").model, tmp_path, make_inputs=True, partial=True)
    assert out.sites.names == ["down"]


def test_a_norm_of_numbers_that_would_fill_the_memory_is_refused(tmp_path):
    text = "b = MatMul(x, W)\n v = ConstantOfShape(size)\n y = Mul(b, v)"
    proto = model(text, ("/m/fc/base_layer/MatMul", "/m/fc/ConstantOfShape", "/m/fc/Mul"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1 << 40], np.int64), "size"))
    refused(proto, tmp_path, "at most 268435456 are computed")
