"""verify_extraction passes what is right in every mode, and catches extractions that a round trip would pass."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from adapterx.errors import ModelError
from adapterx.graph.extract import extract_adapters
from adapterx.verify import verify_extraction
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
