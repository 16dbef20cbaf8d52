import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from adapterx.errors import ModelError
from adapterx.external_data import ExternalTensor, check_external_data, external_tensors


def external(name: str, location: str, dims: tuple[int, ...] = (4,), **entries: int | str) -> onnx.TensorProto:
    tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model_of(*tensors: onnx.TensorProto) -> onnx.ModelProto:
    return helper.make_model(helper.make_graph([], "g", [], [], list(tensors)))


def assert_refused(model: onnx.ModelProto, folder: Path, *words: str, **options: object) -> None:
    with pytest.raises(ModelError) as caught:
        check_external_data(model, folder, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "m.data").write_bytes(bytes(16))
    (tmp_path / "secret").write_bytes(bytes(64))
    return inside


def test_a_file_next_to_the_model_is_accepted_also_as_a_hard_link_and_with_an_offset(folder):
    os.link(folder / "m.data", folder / "linked.data")
    rows = [external("w", "m.data"), external("v", "linked.data", (2,), offset=8, length=8)]
    check_external_data(model_of(*rows), folder)


@pytest.mark.parametrize(
    "location", ["../secret", "a/../../secret", "a/../m.data", "..\\secret", "", "/etc/hostname", "C:\\x", "a\0b"]
)
def test_a_location_that_leaves_the_folder_is_refused_by_name(folder, location):
    (folder / "a").mkdir()
    assert_refused(model_of(external("w", location)), folder, "w: ", repr(location))


def test_a_missing_a_short_and_a_special_file_are_each_named_in_one_error(folder):
    os.mkfifo(folder / "fifo")
    (folder / "dir").mkdir()
    names = ["gone", "m.data", "fifo", "dir"]
    model = model_of(*(external(f"t_{name}", name, (5,)) for name in names))
    assert_refused(model, folder, "t_gone: 'gone' does not exist", "20 bytes are needed, it has 16", "fifo", "'dir'")


def test_a_symlink_out_of_the_folder_is_refused_and_one_inside_is_accepted(folder):
    (folder / "in.data").symlink_to("m.data")
    (folder / "out.data").symlink_to("../secret")
    check_external_data(model_of(external("w", "in.data")), folder)
    assert_refused(model_of(external("w", "out.data")), folder, "leaves the model's folder")


def test_a_symlinked_folder_out_of_the_models_folder_is_refused(folder):
    (folder.parent / "elsewhere").mkdir()
    (folder.parent / "elsewhere" / "x").write_bytes(bytes(16))
    (folder / "sub").symlink_to("../elsewhere")
    assert_refused(model_of(external("w", "sub/x")), folder, "leaves the model's folder")


def test_the_layout_of_the_hugging_face_cache_is_accepted_only_when_model_and_data_share_the_blobs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "aa").write_bytes(b"")
    (blobs / "bb").write_bytes(bytes(16))
    (tmp_path / "other").write_bytes(bytes(16))
    (snapshot / "m.onnx").symlink_to("../../blobs/aa")
    (snapshot / "m.data").symlink_to("../../blobs/bb")
    (snapshot / "bad.data").symlink_to("../../other")
    check_external_data(model_of(external("w", "m.data")), snapshot, model_file=snapshot / "m.onnx")
    assert_refused(model_of(external("w", "m.data")), snapshot, "leaves")
    assert_refused(model_of(external("w", "bad.data")), snapshot, "leaves", model_file=snapshot / "m.onnx")


def test_a_length_that_is_not_that_of_the_shape_is_refused(folder):
    assert_refused(model_of(external("w", "m.data", (3,), length=16)), folder, "w", "16 bytes", "takes 12")
    assert_refused(model_of(external("w", "m.data", (4,), offset="x")), folder, "w", "integers")
    assert_refused(model_of(external("w", "m.data", (4,), offset=-4)), folder, "w", "negative")
    assert_refused(model_of(external("w", "m.data", (-4,))), folder, "w", "negative")


def test_tensors_in_subgraphs_and_functions_are_looked_at_too(folder):
    inner = helper.make_graph([], "inner", [], [], [external("deep", "../secret")])
    constant = helper.make_node("Constant", [], ["c"], value=external("in_function", "/etc/hostname"))
    function = helper.make_function("d", "f", [], ["c"], [constant], [helper.make_opsetid("", 18)])
    graph = helper.make_graph([helper.make_node("If", ["c"], [], then_branch=inner)], "g", [], [])
    assert_refused(helper.make_model(graph, functions=[function]), folder, "deep: ", "in_function: ")


def test_ignored_locations_and_tensors_inside_the_model_are_not_looked_at(folder):
    weight = numpy_helper.from_array(np.ones(3, np.float32), "inline")
    model = model_of(weight, external("port", "adapter.weights"))
    check_external_data(model, folder, ignore=frozenset({"adapter.weights"}))
    assert list(external_tensors(model)) == [ExternalTensor("port", "adapter.weights", 0, 16)]
    assert_refused(model, folder, "adapter.weights")
