"""Models that must be refused, with a typed error that names the cause, before anything is written.

Numbers are those of the list of bad inputs that the formats page keeps.
"""

from __future__ import annotations

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from adapterx.errors import ModelError
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from tests.graph.text_models import Layer, text_model

LAYERS = (Layer("fc", 8, 8, 2, 2.0),)


@pytest.fixture
def proto():
    return text_model(LAYERS).proto


@pytest.fixture
def saved(proto, tmp_path):
    """A model with all weights in ``weights.bin``."""
    folder = tmp_path / "in"
    folder.mkdir()
    onnx.save(proto, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return folder / "model.onnx"


def relocate(path, location=None, **entries):
    """Change where the external tensors of a saved model say that their bytes are."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and location is not None:
                entry.value = location
            if entry.key in entries:
                entry.value = entries[entry.key]
    path.write_bytes(model.SerializeToString())


def assert_refused(model, tmp_path, *words):
    with pytest.raises(ModelError) as error:
        extract_adapters(model, tmp_path / "out", make_inputs=True)
    for word in words:
        assert word in str(error.value), error.value
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError):
        find_sites(model)


@pytest.mark.parametrize("location", ["../weights.bin", "a/../../weights.bin", "..\\weights.bin"])
def test_68_external_data_that_leaves_the_folder_is_refused(saved, tmp_path, location):
    (tmp_path / "weights.bin").write_bytes((saved.parent / "weights.bin").read_bytes())
    relocate(saved, location)
    assert_refused(saved, tmp_path, "external data", "leaves the model's folder")


def test_68_absolute_external_data_is_refused(saved, tmp_path):
    relocate(saved, str(saved.parent / "weights.bin"))
    assert_refused(saved, tmp_path, "is absolute")


def test_68_missing_external_data_is_refused(saved, tmp_path):
    (saved.parent / "weights.bin").unlink()
    assert_refused(saved, tmp_path, "weights.bin", "does not exist")


def test_68_short_external_data_is_refused(saved, tmp_path):
    data = saved.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:-1])
    assert_refused(saved, tmp_path, "weights.bin", "too short")


@pytest.mark.parametrize("entry", [{"offset": "-8"}, {"offset": "99999999999"}, {"length": "1"}, {"offset": "many"}])
def test_68_offsets_and_lengths_that_lie_are_refused(saved, tmp_path, entry):
    relocate(saved, **entry)
    assert_refused(saved, tmp_path)


def test_68_a_link_out_of_the_folder_is_refused(saved, tmp_path):
    data = saved.parent / "weights.bin"
    outside = tmp_path / "secret.bin"
    data.rename(outside)
    data.symlink_to(outside)
    assert_refused(saved, tmp_path, "link that leaves")


def test_23_the_layout_of_hugging_faces_cache_opens(saved, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in ("model.onnx", "weights.bin"):
        (saved.parent / name).rename(blobs / f"hash-of-{name}")
        (snapshot / name).symlink_to(blobs / f"hash-of-{name}")
    out = extract_adapters(snapshot / "model.onnx", tmp_path / "out", make_inputs=True)
    assert out.sites.names == ["fc"]
    assert (tmp_path / "out" / "weights.bin").is_file()
    assert not (tmp_path / "out" / "weights.bin").is_symlink()


def test_70_nodes_of_ours_without_a_manifest_are_no_adapters_and_with_one_are_not_extracted_again(proto, tmp_path):
    out = extract_adapters(proto, tmp_path / "first", make_inputs=True)
    assert_extracted_once = pytest.raises(ModelError, match="extracted already")
    with assert_extracted_once:
        extract_adapters(out.model_path, tmp_path / "out", make_inputs=True)
    assert not (tmp_path / "out").exists()


def test_a_broken_manifest_is_refused_by_name(proto, tmp_path):
    out = extract_adapters(proto, tmp_path / "first", make_inputs=True)
    model = onnx.load(out.model_path)
    for text in ("{", "[]", '{"format_version": 99}', '{"format_version": 1, "port": "usb"}', '{"format_version": 1}'):
        model.metadata_props[0].value = text
        with pytest.raises(ModelError, match="manifest"):
            find_sites(model)


def test_72_a_proto_whose_weights_lie_elsewhere_is_refused_and_told_what_to_give(saved, tmp_path):
    proto = onnx.load(saved, load_external_data=False)
    assert_refused(proto, tmp_path, "weights.bin", "give the model's path")


@pytest.mark.parametrize("version", [("ir", 99), ("opset", 999)])
def test_73_a_model_newer_than_the_installed_onnx_is_refused_with_versions(proto, tmp_path, version):
    what, number = version
    if what == "ir":
        proto.ir_version = number
    else:
        proto.opset_import[0].version = number
    assert_refused(proto, tmp_path, str(number))


def test_74_an_unsorted_graph_is_refused(proto, tmp_path):
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert_refused(proto, tmp_path, "not a valid ONNX model")


def test_casts_of_inputs_that_a_converter_wrote_last_are_no_reason_to_refuse(proto, tmp_path):
    cast = helper.make_node("Cast", ["x"], ["x_cast"], "graph_input_cast_0", to=TensorProto.FLOAT)
    for node in proto.graph.node:
        node.input[:] = ["x_cast" if name == "x" else name for name in node.input]
    proto.graph.node.append(cast)
    assert extract_adapters(proto, tmp_path / "out", make_inputs=True).sites.names == ["fc"]


def test_74_a_cyclic_graph_is_refused(proto, tmp_path):
    proto.graph.node[0].input[0] = proto.graph.node[-1].output[0]
    assert_refused(proto, tmp_path, "not a valid ONNX model")


def test_74_a_value_that_is_made_twice_is_refused(proto, tmp_path):
    proto.graph.node[1].output[0] = proto.graph.node[0].output[0]
    assert_refused(proto, tmp_path, "not a valid ONNX model")


def test_75_two_sites_that_share_a_weight_are_told_apart(tmp_path):
    layers = (Layer("a", 8, 8, 2, 2.0), Layer("b", 8, 8, 2, 2.0))
    out = extract_adapters(text_model(layers, share_zero_b=True).proto, tmp_path / "out", make_inputs=True)
    inputs = [value.name for value in onnx.load(out.model_path).graph.input]
    assert len([name for name in inputs if "lora_B" in name]) == 2


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"not a model", os.urandom(4096)])
def test_bytes_that_are_no_model_are_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert_refused(path, tmp_path, "model.onnx")


def test_a_truncated_model_is_refused(proto, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString()[:-20])
    assert_refused(path, tmp_path, "model.onnx")


def test_a_folder_or_nothing_in_place_of_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="a folder"):
        find_sites(tmp_path)
    with pytest.raises(ModelError, match="found nothing"):
        find_sites(tmp_path / "none.onnx")


def test_a_folder_that_is_a_file_cannot_be_written_into(proto, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        extract_adapters(proto, tmp_path / "out", make_inputs=True)


def test_a_scale_that_overflows_the_graphs_dtype_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    names = {"A": "fc.lora_A.default.weight", "B": "fc.lora_B.default.weight"}
    arrays = {
        "W": rng.standard_normal((4, 4)),
        names["A"]: rng.standard_normal((4, 2)),
        names["B"]: np.full((2, 4), 60000.0),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["b"]),
        helper.make_node("MatMul", ["x", names["A"]], ["l"]),
        helper.make_node("MatMul", ["l", names["B"]], ["z"]),
        helper.make_node("Mul", ["z", "s"], ["d"]),
        helper.make_node("Add", ["b", "d"], ["y"]),
    ]
    half = TensorProto.FLOAT16
    x, y = (helper.make_tensor_value_info(n, half, ["N", 4]) for n in "xy")
    weights = [
        onnx.numpy_helper.from_array(a.astype(np.float16), n) for n, a in (arrays | {"s": np.array(8.0)}).items()
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    with pytest.raises(ModelError, match="overflows float16"):
        extract_adapters(model, tmp_path / "out", make_inputs=True)
    assert not (tmp_path / "out").exists()
