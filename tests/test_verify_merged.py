"""An extraction of another kind than linear LoRA is proven with adapters that are merged into the base's weights."""

import onnx
import pytest

from adapterx.graph.extract import extract_adapters
from adapterx.verify import verify_extraction
from tests.zoo import build

ALL = ["the exported adapter", "no adapter = base", "a random adapter", "a random adapter of other ranks"]
EFFECT = "the random adapter changes the output"


def verified(name, folder, edit=None, **options):
    built = build(name)
    out = extract_adapters(built.model, folder, make_inputs=True, **options)
    if edit is not None:
        model = onnx.load(out.model_path)
        edit(model)
        onnx.save(model, out.model_path)
    return verify_extraction(built.model, out.model_path, feeds=built.feeds, **options)


@pytest.mark.parametrize("name", ["ts_dora", "dy_ia3", "ts_conv", "dy_embedding", "ts_lora_bias", "dy_loha", "ts_vera"])
def test_an_extraction_of_every_kind_passes_with_four_adapters(name, tmp_path):
    outcome = verified(name, tmp_path)
    assert [row.check for row in outcome.rows] == [*ALL, EFFECT]
    assert outcome.passed, outcome.rows


def test_a_model_without_a_base_is_proven_without_the_row_of_the_base(tmp_path):
    outcome = verified("ts_saved", tmp_path)
    assert [row.check for row in outcome.rows] == [ALL[0], *ALL[2:], EFFECT]
    assert outcome.passed


def wrong_gain(model):
    """The gain of one site reads the port of its shift."""
    node = next(node for node in model.graph.node if node.name == "fc1.gain/RowVector")
    node.input[0] = "fc1.shift.weight"


def wrong_base(model):
    weight = next(t for t in model.graph.initializer if t.name.endswith("fc2.base_layer.weight"))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))


@pytest.mark.parametrize(("edit", "failing"), [(wrong_gain, {ALL[0], *ALL[2:]}), (wrong_base, {ALL[0]})])
def test_a_wrong_extraction_fails(edit, failing, tmp_path):
    outcome = verified("ts_dora", tmp_path, edit)
    assert {row.check for row in outcome.rows if not row.passed} == failing


@pytest.mark.parametrize(
    ("name", "why"), [("ts_prompt", "a prompt cannot be merged"), ("dy_conv1d", "conv2: a convolution in 2 groups")]
)
def test_what_cannot_be_merged_is_proven_with_the_exported_adapter_and_a_note(name, why, tmp_path):
    outcome = verified(name, tmp_path)
    assert [row.check for row in outcome.rows] == ALL[:1]
    assert outcome.passed
    assert why in outcome.notes[0]
