"""Data files beside the model: linked, copied, shared, aligned, and gone when the write fails."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adapterx.errors import ModelError
from adapterx.graph import save
from adapterx.graph.extract import extract_adapters
from adapterx.graph.load import load_model
from adapterx.graph.save import save_model
from adapterx.graph.sites import find_sites
from tests.graph.text_models import Layer, text_model

LAYERS = (Layer("a.q", 32, 40, 2, 2.0), Layer("b.q", 40, 32, 2, 2.0))
X = np.random.default_rng(1).standard_normal((2, 3, 32)).astype(np.float32)


@pytest.fixture
def model():
    return text_model(LAYERS)


def saved(model, folder, location="weights.bin"):
    (folder / location).parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model.proto, folder / "model.onnx", save_as_external_data=True, location=location, size_threshold=0)
    return folder / "model.onnx"


def fail(*_):
    raise OSError(28, "No space left on device")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_in_external_mode_large_inline_weights_move_to_a_page_aligned_file_that_sessions_can_map(model, tmp_path):
    out = extract_adapters(model.proto, tmp_path)
    assert names(tmp_path) == ["adapter.safetensors", "model.onnx", "model.onnx.data"]
    stored = list(ir.load(out.model_path).graph.initializers.values())
    inside = [t.const_value for t in stored if isinstance(t.const_value, ir.ExternalTensor)]
    base = [tensor for tensor in inside if tensor.location == "model.onnx.data"]
    assert [tensor.offset for tensor in base] == [0, 8192]
    for tensor, layer in zip(base, LAYERS, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), model.weights[layer.name][0])
    small = [value.name for value in stored if value.const_value is not None and value.const_value.nbytes < 1024]
    assert "adapter_mask" in small


def test_in_input_mode_weights_stay_where_they_are(model, tmp_path):
    extract_adapters(model.proto, tmp_path, make_inputs=True)
    assert names(tmp_path) == ["adapter.safetensors", "model.onnx"]


def test_weights_that_fit_no_protobuf_move_to_a_file_in_any_mode(model, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_INLINE_LIMIT", 1)
    out = extract_adapters(model.proto, tmp_path, make_inputs=True)
    assert "model.onnx.data" in names(tmp_path)
    got = ort.InferenceSession(str(out.model_path)).run(None, {"x": X})[0]
    np.testing.assert_allclose(got, model.expected(X, None), atol=1e-4)


def test_strings_and_defaults_of_inputs_are_never_moved(tmp_path):
    words = ir.Value(name="words", const_value=ir.tensor(["word " * 100] * 20, name="words"))
    default = ir.Value(name="default", const_value=ir.tensor(np.ones(999, np.float32), name="default"))
    graph = ir.Graph([default], [], nodes=[], initializers=[words, default], name="g", opset_imports={"": 18})
    save_model(ir.Model(graph, ir_version=10), tmp_path / "m.onnx", tmp_path, ours=None, share_weights=True)
    assert names(tmp_path) == ["m.onnx"]


def test_the_models_own_file_of_the_name_is_not_written_over(model, tmp_path):
    path = saved(model, tmp_path / "in", location="model.onnx.data")
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((32, 32), np.float32), "inline"))
    proto.graph.node.append(onnx.helper.make_node("MatMul", ["y", "inline"], ["w"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("w", 1, ["N", "T", 32]))
    path.write_bytes(proto.SerializeToString())
    extract_adapters(path, tmp_path / "out")
    assert {"model.onnx.data", "model.onnx.data.inline"} <= set(names(tmp_path / "out"))
    assert (tmp_path / "out" / "model.onnx.data").read_bytes() == (path.parent / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("options", [{}, {"make_inputs": True}])
def test_a_failed_write_leaves_no_file_of_any_kind(model, tmp_path, monkeypatch, options):
    monkeypatch.setattr(save, "atomic_write", fail)
    inline = onnx.ModelProto.FromString(model.proto.SerializeToString())
    for source in (inline, saved(model, tmp_path / "in")):
        with pytest.raises(OSError, match="No space"):
            extract_adapters(source, tmp_path / "out", **options)
        assert names(tmp_path / "out") == []


def test_data_in_a_folder_below_the_model_goes_to_a_folder_below_the_new_one(model, tmp_path):
    path = saved(model, tmp_path / "in", location="data/weights.bin")
    out = extract_adapters(path, tmp_path / "out", make_inputs=True)
    assert (tmp_path / "out" / "data" / "weights.bin").is_file()
    got = ort.InferenceSession(str(out.model_path)).run(None, {"x": X})[0]
    np.testing.assert_allclose(got, model.expected(X, None), atol=1e-4)


def test_large_data_behind_a_link_is_linked_to_the_bytes_and_not_to_the_link(model, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "LINK_FROM_BYTES", 1)
    path = saved(model, tmp_path / "snapshot")
    blob = tmp_path / "snapshot" / "blob"
    (tmp_path / "snapshot" / "weights.bin").rename(blob)
    (tmp_path / "snapshot" / "weights.bin").symlink_to(blob)
    out = extract_adapters(path, tmp_path / "out", make_inputs=True)
    assert not (tmp_path / "out" / "weights.bin").is_symlink()
    assert (tmp_path / "out" / "weights.bin").samefile(blob)
    got = ort.InferenceSession(str(out.model_path)).run(None, {"x": X})[0]
    np.testing.assert_allclose(got, model.expected(X, None), atol=1e-4)


def test_extracting_again_into_the_same_folder_is_no_different_when_its_data_is_linked(model, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "LINK_FROM_BYTES", 1)
    path = saved(model, tmp_path / "in")
    for _ in range(2):
        out = extract_adapters(path, tmp_path / "out", make_inputs=True)
        assert (tmp_path / "out" / "weights.bin").samefile(tmp_path / "in" / "weights.bin")
    assert find_sites(out.model_path) == out.sites


def test_a_data_file_is_never_its_own_copy(model, tmp_path):
    path = saved(model, tmp_path)
    path.rename(tmp_path / "other.onnx")
    with pytest.raises(ModelError, match=r"weights\.bin is the source's own data file"):
        save_model(load_model(tmp_path / "other.onnx"), tmp_path / "new.onnx", [], ours=None, share_weights=False)
    assert (tmp_path / "weights.bin").stat().st_size > 0


def test_two_files_of_one_name_cannot_lie_beside_one_model(tmp_path):
    values = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "w.bin").write_bytes(bytes(4))
        tensor = ir.ExternalTensor(
            "w.bin", 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name=folder, base_dir=tmp_path / folder
        )
        values.append(ir.Value(name=folder, const_value=tensor))
    graph = ir.Graph([], [], nodes=[], initializers=values, name="g", opset_imports={"": 18})
    with pytest.raises(ModelError, match=r"'w\.bin' comes from two folders"):
        save_model(ir.Model(graph, ir_version=10), tmp_path / "m.onnx", [], ours=None, share_weights=False)


def test_a_model_whose_adapter_file_does_not_exist_lists_its_sites(model, tmp_path):
    out = extract_adapters(model.proto, tmp_path)
    assert find_sites(out.model_path) == out.sites
    out = extract_adapters(saved(model, tmp_path / "in"), tmp_path / "out")
    assert find_sites(out.model_path) == out.sites
