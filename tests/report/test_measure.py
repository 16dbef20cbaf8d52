"""What a survey says of real exports, against the numbers in the files that they were made from."""

import dataclasses

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import adapterx as ax
from adapterx.graph.bases import find_bases
from adapterx.graph.load import load_model
from adapterx.report.measure import survey
from adapterx.report.modules import modules
from tests.graph.text_models import Layer, text_model
from tests.zoo import build


@pytest.fixture(scope="module")
def llama():
    return build("ts_llama")


@pytest.fixture(scope="module")
def extracted(llama, tmp_path_factory):
    return ax.extract_adapters(llama.model, tmp_path_factory.mktemp("extracted"), make_inputs=True)


def rows(found):
    return {row.site.name: row for module in found.modules for row in module.rows}


def products(adapter):
    return {name: np.linalg.norm(one.b.astype(np.float64).T @ one.a) for name, one in adapter.sites.items()}


def weights_of(path):
    """Norms of base weights by the module's last words, out of the exporter's file."""
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMul" and "base_layer" in node.name]
    return {node.name: np.linalg.norm(tensors[node.input[1]].astype(np.float64)) for node in nodes}


def test_norms_of_an_export_are_those_of_the_adapter_that_was_exported(llama):
    want = products(ax.load_adapter(llama.adapters["a"]))
    got = {name: row.norm for name, row in rows(survey(llama.model)).items()}
    assert got == pytest.approx(want, rel=1e-5)


def test_base_norms_are_those_of_the_weights_in_the_file(llama):
    want = weights_of(llama.model)
    found = rows(survey(llama.model))
    assert len(want) == len(found)
    for name, row in found.items():
        (norm,) = [norm for node, norm in want.items() if name.replace(".", "/") in node.replace(".", "/")]
        assert row.base_norm == pytest.approx(norm, rel=1e-6)


def test_base_operations_without_an_adapter_are_skipped(llama):
    found = survey(llama.model)
    assert [m.name for m in found.modules if m.state == "skipped"] == ["model.embed_tokens", "lm_head"]
    assert [m.name for m in found.modules if m.state == "matched"] == [site.name for site in llama.truth]
    assert (found.refused, found.nameless) == ((), 0)


def test_an_extracted_model_holds_no_weights_to_measure(extracted, llama):
    found = survey(extracted.model_path)
    assert [row.norm for row in rows(found).values()] == [None] * len(llama.truth)
    assert sum(row.nbytes for row in rows(found).values()) == extracted.adapter.nbytes
    assert found.ports == "graph inputs"


def test_an_adapter_that_is_given_is_measured_against_an_extracted_model(extracted, llama):
    other = ax.load_adapter(llama.adapters["c"])
    found = survey(extracted.model_path, adapter=llama.adapters["c"])
    bases = {name: row.base_norm for name, row in rows(survey(llama.model)).items()}
    assert {name: row.norm for name, row in rows(found).items()} == pytest.approx(products(other), rel=1e-9)
    assert {name: row.base_norm for name, row in rows(found).items()} == pytest.approx(bases, rel=1e-9)
    assert {row.rank for row in rows(found).values()} == set(other.ranks)
    assert sum(row.nbytes for row in rows(found).values()) == other.nbytes
    assert found.adapter == "c"


def test_an_adapter_that_does_not_fit_an_extracted_model_is_refused(extracted):
    with pytest.raises(ax.MismatchError, match="no such site"):
        survey(extracted.model_path, adapter=build("ts_mlp").adapters["b"])


def test_names_that_only_the_adapter_knows_are_drawn_and_its_factors_are_no_modules():
    nameless = build("dy_llama_stripped")
    found = survey(nameless.model, adapter=nameless.adapters["a"])
    assert {m.name for m in found.modules if m.state == "matched"} == {site.name for site in nameless.truth}
    assert len(found.modules) + found.nameless == len(nameless.truth) + 2


def test_two_adapters_at_one_place_are_two_sites_of_one_module():
    both = build("ts_llama_two_active")
    modules = [m for m in survey(both.model).modules if m.rows]
    assert {tuple(row.site.adapter for row in m.rows) for m in modules} == {("default", "style")}
    assert sum(len(m.rows) for m in modules) == len(both.truth)


@pytest.mark.parametrize("case", ["ts_llama_int4", "ts_llama_int4_qdq"])
def test_a_quantized_base_is_said_to_be_and_its_norm_is_near_that_of_the_floats(case, llama):
    found = survey(build(case).model)
    floats = rows(survey(llama.model))
    for module in found.modules:
        for row in module.rows:
            assert "quantized to 4 bits" in module.storage
            assert row.base_norm == pytest.approx(floats[module.name].base_norm, rel=0.05)


PACKED = """<ir_version: 10, opset_import: ["" : 18]>
g (float[N, T, 12] x) => (float[N, T, 10] y, float[N, T, 10] z) {
  both = MatMul(x, w)
  p, q = Split<axis=-1, num_outputs=2>(both)
  pl = MatMul(x, pA)
  pd = MatMul(pl, pB)
  y = Add(p, pd)
  ql = MatMul(x, qA)
  qd = MatMul(ql, qB)
  z = Add(q, qd)
}"""


def packed_graph():
    proto, rng = onnx.parser.parse_model(PACKED), np.random.default_rng(0)
    sides = {f"{m}{side}": f"base_model.model.h.0.{m}_proj.lora_{side}.default.weight" for m in "pq" for side in "AB"}
    shapes = {"w": (12, 20), **{name: (12, 3) if name.endswith("A") else (3, 10) for name in sides}}
    names = {**sides, "w": "h.0.pq_proj.weight"}
    for name, shape in shapes.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, np.float32), names[name]))
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return proto


def test_modules_that_share_one_packed_operation_are_drawn_each_and_have_no_base_norm_of_their_own():
    found = survey(packed_graph())
    assert [(m.name, m.state) for m in found.modules] == [("h.0.p_proj", "matched"), ("h.0.q_proj", "matched")]
    assert [row.base_norm for row in rows(found).values()] == [None, None]
    assert all(row.norm for row in rows(found).values())


def text_graph():
    layers = (Layer("fc0", 12, 10, 3, 2.0), Layer("fc1", 10, 12, 3, 2.0))
    proto = text_model(layers).proto
    names = {"w0": "fc0.weight", "w1": "fc1.weight"}
    names |= {f"base_model.model.fc1.lora_{side}.default.weight": f"plain_{side}" for side in "AB"}
    for tensor in proto.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in proto.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return proto


def test_a_branch_that_nothing_names_makes_its_module_a_refused_one():
    found = survey(text_graph())
    states = {m.name: m.state for m in found.modules}
    assert (states["fc0"], states["fc1"]) == ("matched", "refused")
    (why,) = [m.why for m in found.modules if m.name == "fc1"]
    assert "nothing names it" in why
    assert found.refused == (why,)


def test_a_reason_is_told_of_the_longest_module_that_it_names():
    bases = [dataclasses.replace(base, name=name) for base, name in zip(some_bases(3), ("z", "a.z", "b"), strict=True)]
    line = "base_model.model.a.z.lora_magnitude_vector.default.weight"
    assert {m.name: m.state for m in modules(bases, [], {line: None})} == {
        "z": "skipped",
        "a.z": "refused",
        "b": "skipped",
    }


def test_a_reason_with_a_very_long_path_is_read_in_no_time():
    line = ".".join(["model"] * 100_000)
    assert {m.state for m in modules(some_bases(3), [], {line: None})} == {"skipped"}


def some_bases(count):
    return find_bases(load_model(build("ts_llama").base_model))[:count]


def test_gains_are_measured_as_what_they_are_and_not_as_a_change_of_low_rank():
    built = build("ts_ia3")
    found = rows(survey(built.model))
    for name, one in ax.load_adapter(built.adapters["a"]).sites.items():
        assert found[name].norm is None
        want = {part: np.linalg.norm(array) for part, array in one.parts.items()}
        assert dict(found[name].parts) == pytest.approx(want, rel=1e-6)


def test_a_module_that_was_trained_in_full_has_a_weight_and_no_change():
    found = rows(survey(build("ts_saved").model))
    (saved,) = [row for row in found.values() if row.site.kind == "saved"]
    assert (saved.norm, saved.relative) == (None, None)
    assert dict(saved.parts)["weight"] > 0
    assert all(row.relative for row in found.values() if row is not saved)


def test_a_convolution_has_the_norm_of_its_product():
    built = build("ts_conv")
    given = ax.load_adapter(built.adapters["a"]).sites["conv2"]
    want = np.linalg.norm(given.b.T @ given.a.reshape(given.rank, -1))
    assert rows(survey(built.model))["conv2"].norm == pytest.approx(want, rel=1e-5)


def test_a_survey_is_plain_data(llama):
    found = survey(llama.model)
    assert dataclasses.replace(found) == found == survey(llama.model)
