"""verify_extraction passes what is right in every mode, and catches extractions that a round trip would pass."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import ModelError
from adapterx.graph.extract import extract_adapters
from adapterx.verification import TOLERANCE, Row, Verification, largest_error
from adapterx.verify import verify_extraction
from tests.graph.test_joins import WEIGHTS
from tests.graph.test_joins import model as joined
from tests.graph.text_models import Layer, text_model

B = 3  # LowRankAdd(base, x, a, b, mask)
LAYERS = tuple(Layer(f"model.layers.{i}.q_proj", 8, 8, 2, 2.0) for i in range(3))
MODES = {
    "inputs": {"make_inputs": True},
    "packed": {"make_inputs": True, "pack_inputs": True},
    "fixed rank": {"make_inputs": True, "dynamic_rank": False},
    "required": {"make_inputs": True, "optional_inputs": False},
    "external": {},
}


@pytest.fixture
def original(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(text_model(LAYERS).proto, path)
    return path


def doctored(extraction, change):
    """The extracted model after ``change(nodes by output order)`` went over its LowRankAdd nodes."""
    model = ir.load(extraction.model_path)
    change([node for node in model.graph if node.op_type == "LowRankAdd"], model)
    ir.save(model, extraction.model_path)
    return extraction.model_path


def cross_ports(nodes, _):
    first, second = nodes[0].inputs[B], nodes[1].inputs[B]
    nodes[0].replace_input_with(B, second)
    nodes[1].replace_input_with(B, first)


def share_b(nodes, _):
    nodes[1].replace_input_with(B, nodes[0].inputs[B])


def halve_mask(_, model):
    model.graph.initializers["adapter_mask"].const_value = ir.tensor(np.array([[0.5]], np.float32), name="adapter_mask")


@pytest.mark.parametrize("mode", MODES)
def test_a_right_extraction_passes_in_every_mode(original, tmp_path, mode):
    out = extract_adapters(original, tmp_path / "out", **MODES[mode])
    verification = verify_extraction(original, out.model_path)
    assert verification.passed, [row for row in verification.rows if not row.passed]
    assert len(verification.rows) == 5


@pytest.mark.parametrize("change", [cross_ports, share_b, halve_mask])
def test_a_wrong_extraction_fails(original, tmp_path, change):
    out = extract_adapters(original, tmp_path / "out", make_inputs=True)
    verification = verify_extraction(original, doctored(out, change))
    assert not verification.passed
    assert "FAIL" in str(list(verification.table().columns[-1].cells))


def test_equal_zero_b_is_told_apart_where_a_round_trip_would_see_nothing(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(text_model(LAYERS, share_zero_b=True).proto, path)
    out = extract_adapters(path, tmp_path / "out", make_inputs=True)
    assert verify_extraction(path, out.model_path).passed
    rows = {row.check: row.passed for row in verify_extraction(path, doctored(out, share_b)).rows}
    assert rows["the exported adapter"], "zero B: the round trip is blind"
    assert not rows["a random adapter"]


def test_a_model_that_is_not_the_original_is_refused(original, tmp_path):
    out = extract_adapters(original, tmp_path / "out", make_inputs=True)
    other = tmp_path / "other.onnx"
    onnx.save(text_model(LAYERS[:2]).proto, other)
    with pytest.raises(ModelError, match="do not have the same sites"):
        verify_extraction(other, out.model_path)


def test_the_extracted_model_must_be_one_of_ours(original):
    with pytest.raises(ModelError, match="no adapterx manifest"):
        verify_extraction(original, original)


def rows_of(verification):
    return {row.check: row for row in verification.rows}


def test_one_failed_row_fails_the_whole():
    good, bad = Row("one", 0.0, 1.0, True), Row("two", 2.0, 1.0, False)
    assert Verification((good, good)).passed
    assert not Verification((good, bad)).passed


def test_a_model_whose_output_no_adapter_changes_proves_nothing_and_fails(original, tmp_path):
    model = onnx.load(original)
    model.graph.node[-1].output[0] = "w"
    model.graph.node.append(onnx.helper.make_node("Mul", ["w", "tiny"], ["y"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1e-9), "tiny"))
    onnx.save(model, original)
    out = extract_adapters(original, tmp_path / "out", make_inputs=True)
    failed = [row.check for row in verify_extraction(original, out.model_path).rows if not row.passed]
    assert failed == ["the random adapter changes the output"]


def test_a_fixed_rank_where_any_was_promised_fails_in_the_row_of_other_ranks(original, tmp_path):
    out = extract_adapters(original, tmp_path / "out", make_inputs=True, dynamic_rank=False)
    model = ir.load(out.model_path)
    key = next(key for key in model.metadata_props if "adapterx" in key)
    model.metadata_props[key] = model.metadata_props[key].replace('"dynamic_rank":false', '"dynamic_rank":true')
    model.metadata_props[key] = model.metadata_props[key].replace('"dynamic_rank": false', '"dynamic_rank": true')
    ir.save(model, out.model_path)
    failed = [row.check for row in verify_extraction(original, out.model_path).rows if not row.passed]
    assert failed == ["a random adapter of other ranks"]


@pytest.mark.parametrize("factor", ["gemm_transB", "transpose", "fused_transB"])
def test_weights_that_the_original_transposes_are_replaced_as_they_lie(tmp_path, factor):
    path = tmp_path / "model.onnx"
    onnx.save(text_model((Layer("a.q", 8, 6, 2, 2.0, factor=factor),), dims=2).proto, path)
    out = extract_adapters(path, tmp_path / "out", make_inputs=True)
    assert verify_extraction(path, out.model_path).passed


def test_shapes_that_the_original_notes_for_its_own_rank_do_not_matter(original, tmp_path):
    onnx.save(onnx.shape_inference.infer_shapes(onnx.load(original)), original)
    assert any(value.name == "l0" for value in onnx.load(original).graph.value_info)
    out = extract_adapters(original, tmp_path / "out", make_inputs=True)
    assert verify_extraction(original, out.model_path).passed


def test_original_weights_in_other_files_are_read_from_there(original, tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.onnx"
    onnx.save(onnx.load(original), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    out = extract_adapters(path, tmp_path / "out", make_inputs=True)
    assert verify_extraction(path, out.model_path).passed


def test_sites_that_were_taken_by_structure_or_by_the_adapter_are_found_again(original, tmp_path):
    model = onnx.load(original)
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("base_model", "x").replace("lora_", "l")
    for node in model.graph.node:
        node.input[:] = [name.replace("base_model", "x").replace("lora_", "l") for name in node.input]
    onnx.save(model, original)
    structural = extract_adapters(original, tmp_path / "structural", make_inputs=True, structural=True)
    assert verify_extraction(original, structural.model_path).passed
    exported = {name: LowRank(a=a, b=b) for name, (a, b) in text_model(LAYERS).exported().items()}
    named = extract_adapters(original, tmp_path / "named", make_inputs=True, adapter=Adapter(exported))
    assert verify_extraction(original, named.model_path, adapter=Adapter(exported)).passed


def test_feeds_and_tolerance_are_the_callers_when_given(original, tmp_path):
    out = extract_adapters(original, tmp_path / "out", make_inputs=True)
    with pytest.raises(ModelError, match="cannot be run here"):
        verify_extraction(original, out.model_path, feeds={"x": np.zeros((1, 1, 7), np.float32)})
    row = verify_extraction(original, out.model_path, tolerance=1e-9).rows[0]
    assert row.tolerance == 1e-9
    assert verify_extraction(original, out.model_path).rows[0].tolerance == TOLERANCE["float32"]


@pytest.mark.filterwarnings("error")
def test_what_is_not_finite_in_one_only_differs_and_what_is_in_both_does_not():
    inf, nan = np.array([np.inf, 1.0]), np.array([np.nan, 1.0])
    assert largest_error([inf], [inf]) == 0.0
    assert largest_error([inf], [np.array([1e30, 1.0])]) == float("inf")
    assert largest_error([np.array([2.0, 1.0])], [nan]) == float("inf")


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        ([[100.0]], [[101.0]], pytest.approx(1 / 101)),
        ([[0.0]], [[0.5]], 0.5),
        ([[1.0], [1.0]], [[2.0], [1.0]], 0.5),
        ([[1.0]], [[1.0, 1.0]], float("inf")),
        ([[1.0]], [], float("inf")),
    ],
)
def test_an_error_is_the_largest_of_all_outputs_relative_to_an_output_but_to_no_less_than_one(got, want, error):
    assert largest_error([np.array(one) for one in got], [np.array(one) for one in want]) == error


def test_two_adapters_at_one_place_are_verified_as_their_sum(tmp_path):
    body = (
        "b = MatMul(x, W)\n l = MatMul(x, A)\n z = MatMul(l, B)\n t = Add(b, z)\n"
        " m = MatMul(x, A2)\n w = MatMul(m, B2)\n y = Add(t, w)"
    )
    proto = joined(body)
    for name, source, twin in (("A2", "A", "lora_A"), ("B2", "B", "lora_B")):
        full = f"base_model.model.fc.{twin}.style.weight"
        proto.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHTS[source] + 1, full))
        for node in proto.graph.node:
            node.input[:] = [full if one == name else one for one in node.input]
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    out = extract_adapters(path, tmp_path / "out", make_inputs=True)
    assert [(site.adapter, site.rank) for site in out.sites] == [("default+style", 4)]
    assert verify_extraction(path, out.model_path).passed
