"""What extract_adapters writes: ports in every mode, files, manifest, and what it refuses to write."""

from __future__ import annotations

import json
import os

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adapterx.errors import ModelError, OptionError
from adapterx.formats import load_adapter
from adapterx.graph import save
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.manifest import KEY, Manifest
from tests.graph.text_models import Layer, text_model

LAYERS = (
    Layer("model.layers.0.q_proj", 8, 8, 2, 2.0),
    Layer("model.layers.1.q_proj", 8, 8, 2, 0.5),
    Layer("model.layers.2.fc", 8, 4, 3, 1.5),
)


@pytest.fixture
def model():
    return text_model(LAYERS)


def run(model, feeds, **external):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if external:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in external.values()]
        options.add_external_initializers(list(external), values)
    return ort.InferenceSession(str(model), options).run(None, feeds)[0]


def inputs_of(path):
    return {
        i.name: [d.dim_value or d.dim_param for d in i.type.tensor_type.shape.dim] for i in onnx.load(path).graph.input
    }


X = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)


def other(model, rank=None):
    rng = np.random.default_rng(9)

    def sides(layer):
        widths = (layer.d_in, layer.d_out)
        return tuple(rng.standard_normal((rank or layer.rank, width)).astype(np.float32) for width in widths)

    return {layer.name: sides(layer) for layer in model.layers}


def test_inputs_have_one_symbolic_rank_a_site_and_rank_zero_defaults(model, tmp_path):
    out = extract_adapters(model.proto, tmp_path, make_inputs=True)
    inputs = inputs_of(out.model_path)
    assert inputs["model.layers.0.q_proj.lora_A.weight"] == ["model.layers.0.q_proj.rank", 8]
    assert inputs["model.layers.0.q_proj.lora_B.weight"] == ["model.layers.0.q_proj.rank", 8]
    defaults = {t.name: list(t.dims) for t in onnx.load(out.model_path).graph.initializer}
    assert defaults["model.layers.2.fc.lora_B.weight"] == [0, 4]


def test_required_inputs_have_no_default_and_fixed_rank_has_no_symbol(model, tmp_path):
    out = extract_adapters(model.proto, tmp_path, make_inputs=True, optional_inputs=False, dynamic_rank=False)
    assert inputs_of(out.model_path)["model.layers.2.fc.lora_A.weight"] == [3, 8]
    names = {t.name for t in onnx.load(out.model_path).graph.initializer}
    assert not any("lora" in name for name in names)


def test_packed_inputs_stack_members_of_one_type_in_natural_order(tmp_path):
    layers = tuple(Layer(f"model.layers.{i}.q_proj", 8, 8, 2, 2.0) for i in range(11))
    model = text_model((*layers, Layer("model.head.fc", 8, 4, 3, 1.5)))
    out = extract_adapters(model.proto, tmp_path, make_inputs=True, pack_inputs=True)
    manifest = Manifest.loads(ir.load(out.model_path).metadata_props[KEY], where="m")
    assert manifest.packs[0].name == "q_proj.lora_A.weight.packed"
    assert manifest.packs[0].sites == tuple(layer.name for layer in layers)
    adapter = other(model)
    feeds = {"x": X}
    for pack in manifest.packs:
        feeds[pack.name] = np.concatenate([adapter[name][pack.side == "lora_B"] for name in pack.sites])
    np.testing.assert_allclose(run(out.model_path, feeds), model.expected(X, adapter), rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(run(out.model_path, {"x": X}), model.expected(X, None), rtol=1e-4, atol=1e-4)


def test_a_type_of_unequal_shapes_stays_unpacked_and_the_manifest_says_so(tmp_path):
    model = text_model((Layer("a.dense", 8, 8, 2, 2.0), Layer("b.dense", 8, 4, 2, 2.0)))
    out = extract_adapters(model.proto, tmp_path, make_inputs=True, pack_inputs=True)
    assert Manifest.loads(ir.load(out.model_path).metadata_props[KEY], where="m").packs == ()
    assert "a.dense.lora_A.weight" in inputs_of(out.model_path)


def test_external_weights_are_given_to_the_session_and_their_file_does_not_exist(model, tmp_path):
    out = extract_adapters(model.proto, tmp_path)
    manifest = Manifest.loads(ir.load(out.model_path).metadata_props[KEY], where="m")
    assert not (tmp_path / manifest.location).exists()
    adapter = other(model)
    names = {
        f"{n}.{side}.weight": pair[i] for n, pair in adapter.items() for i, side in enumerate(("lora_A", "lora_B"))
    }
    np.testing.assert_allclose(run(out.model_path, {"x": X}, **names), model.expected(X, adapter), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("suffix", ["safetensors", "onnx_adapter", "npz"])
def test_the_adapter_is_written_in_the_format_asked_for_with_its_scale_folded_in(model, tmp_path, suffix):
    out = extract_adapters(model.proto, tmp_path, make_inputs=True, adapter_format=suffix)
    assert out.adapter_path.name == f"adapter.{suffix}"
    assert load_adapter(out.adapter_path) == out.adapter
    a, b = model.exported()["model.layers.1.q_proj"]
    np.testing.assert_array_equal(out.adapter.sites["model.layers.1.q_proj"].a, a)
    np.testing.assert_allclose(out.adapter.sites["model.layers.1.q_proj"].b, b, rtol=1e-6)


def test_onnxruntimes_own_adapter_call_takes_what_we_write(model, tmp_path):
    out = extract_adapters(model.proto, tmp_path, make_inputs=True, adapter_format="onnx_adapter")
    loaded = ort.LoraAdapter()
    loaded.Load(str(out.adapter_path))
    options = ort.RunOptions()
    options.add_active_adapter(loaded)
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 3
    got = ort.InferenceSession(str(out.model_path), session_options).run(None, {"x": X}, options)[0]
    np.testing.assert_allclose(got, model.expected(X, model.exported()), rtol=1e-3, atol=1e-3)


def test_nodes_that_are_not_part_of_the_adapter_keep_their_names(model, tmp_path):
    kept = {node.name for node in model.proto.graph.node if node.output[0][0] in "bvy"}
    out = extract_adapters(model.proto, tmp_path, make_inputs=True)
    assert kept <= {node.name for node in onnx.load(out.model_path).graph.node}


def test_old_weights_and_value_info_are_gone(model, tmp_path):
    proto = onnx.shape_inference.infer_shapes(model.proto)
    out = extract_adapters(proto, tmp_path, make_inputs=True)
    written = onnx.load(out.model_path)
    produced = {name for node in written.graph.node for name in node.output} | {
        t.name for t in written.graph.initializer
    }
    assert {value.name for value in written.graph.value_info} <= produced
    assert not any("base_model" in tensor.name for tensor in written.graph.initializer)


def test_two_adapters_at_one_place_are_written_each_by_its_name_and_as_their_sum(tmp_path):
    one = text_model((Layer("fc", 8, 8, 2, 2.0), Layer("fc2", 8, 8, 2, 2.0)))
    proto = onnx.ModelProto.FromString(one.proto.SerializeToString())
    second = {"A1": "base_model.model.fc.lora_A.style.weight", "B1": "base_model.model.fc.lora_B.style.weight"}
    old = {
        "base_model.model.fc2.lora_A.default.weight": second["A1"],
        "base_model.model.fc2.lora_B.default.weight": second["B1"],
    }
    for tensor in proto.graph.initializer:
        tensor.name = old.get(tensor.name, tensor.name)
    for node in proto.graph.node:
        node.input[:] = [old.get(name, name) for name in node.input]
    # The second layer's branch reads what the first layer's reads, and is added to the first layer's sum.
    kept = [node for node in proto.graph.node if node.output[0] != "b1"]
    for node in kept:
        node.input[:] = [
            "x" if name == "v0" and node.op_type != "Add" else "v0" if name == "b1" else name for name in node.input
        ]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    rows = [(site.name, site.adapter) for site in find_sites(proto)]
    assert rows == [("fc", "default"), ("fc", "style")]
    out = extract_adapters(proto, tmp_path, make_inputs=True)
    assert sorted(out.adapters) == ["default", "style"]
    assert out.adapter.sites["fc"].rank == 4
    assert sorted(p.name for p in tmp_path.iterdir())[:3] == [
        "adapter.default.safetensors",
        "adapter.safetensors",
        "adapter.style.safetensors",
    ]
    base, x = X @ one.weights["fc"][0], X
    for name, layer in (("default", "fc"), ("style", "fc2")):
        low_rank = out.adapters[name].sites["fc"]
        feeds = {"x": x, "fc.lora_A.weight": low_rank.a, "fc.lora_B.weight": low_rank.b}
        _, a, b = one.weights[layer]
        np.testing.assert_allclose(run(out.model_path, feeds), base + 2 * (x @ a.T @ b), rtol=1e-3, atol=1e-3)
    both = dict(out.adapter.tensors())
    np.testing.assert_allclose(run(out.model_path, {"x": x, **both}), run_proto(proto, x), rtol=1e-3, atol=1e-3)


def run_proto(proto, x):
    return ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]


def external(model, folder):
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    proto = onnx.ModelProto.FromString(model.proto.SerializeToString())
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_small_external_data_is_copied_so_that_onnx_load_still_reads_both_models(model, tmp_path):
    path = external(model, tmp_path / "in")
    out = extract_adapters(path, tmp_path / "out", make_inputs=True)
    onnx.load(path)
    onnx.checker.check_model(str(out.model_path))
    assert (tmp_path / "out" / "weights.bin").read_bytes() == (tmp_path / "in" / "weights.bin").read_bytes()
    np.testing.assert_allclose(run(out.model_path, {"x": X}), model.expected(X, None), rtol=1e-4, atol=1e-4)


def test_large_external_data_is_hard_linked(model, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "LINK_FROM_BYTES", 1)
    path = external(model, tmp_path / "in")
    extract_adapters(path, tmp_path / "out", make_inputs=True)
    assert (tmp_path / "out" / "weights.bin").samefile(tmp_path / "in" / "weights.bin")


def test_where_a_link_cannot_be_made_the_data_is_copied(model, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "LINK_FROM_BYTES", 1)
    monkeypatch.setattr("pathlib.Path.hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    path = external(model, tmp_path / "in")
    extract_adapters(path, tmp_path / "out", make_inputs=True)
    assert not (tmp_path / "out" / "weights.bin").samefile(tmp_path / "in" / "weights.bin")
    assert (tmp_path / "out" / "weights.bin").read_bytes() == (tmp_path / "in" / "weights.bin").read_bytes()


def test_a_failed_write_leaves_nothing_of_the_model(model, tmp_path, monkeypatch):
    path = external(model, tmp_path / "in")
    monkeypatch.setattr(save, "atomic_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        extract_adapters(path, tmp_path / "out", make_inputs=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_write_leaves_an_earlier_extraction_as_it_was(model, tmp_path, monkeypatch):
    path = external(model, tmp_path / "in")
    extract_adapters(path, tmp_path / "out", make_inputs=True)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(save, "atomic_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        extract_adapters(path, tmp_path / "out", make_inputs=True, pack_inputs=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_written_files_have_the_permissions_of_any_new_file(model, tmp_path):
    out = extract_adapters(model.proto, tmp_path, make_inputs=True)
    umask = os.umask(0)
    os.umask(umask)
    for path in (out.model_path, out.adapter_path):
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_extracted_model_lists_its_sites_and_is_not_extracted_again(model, tmp_path):
    out = extract_adapters(model.proto, tmp_path / "out", make_inputs=True)
    assert find_sites(out.model_path) == out.sites
    with pytest.raises(ModelError, match="extracted already"):
        extract_adapters(out.model_path, tmp_path / "again", make_inputs=True)


def test_an_ir_model_is_taken_and_left_as_it_was(model, tmp_path):
    loaded = ir.from_proto(model.proto)
    before = ir.to_proto(loaded).SerializeToString(deterministic=True)
    extract_adapters(loaded, tmp_path, make_inputs=True)
    assert ir.to_proto(loaded).SerializeToString(deterministic=True) == before


def test_packing_needs_inputs_and_formats_are_known(model, tmp_path):
    with pytest.raises(OptionError, match="make_inputs=True"):
        extract_adapters(model.proto, tmp_path / "out", pack_inputs=True)
    with pytest.raises(OptionError, match="nearest is safetensors"):
        extract_adapters(model.proto, tmp_path / "out", adapter_format="safetensor")
    assert not (tmp_path / "out").exists()


def test_the_source_is_never_overwritten(model, tmp_path):
    path = external(model, tmp_path)
    with pytest.raises(ModelError, match="another folder"):
        extract_adapters(path, tmp_path, make_inputs=True)


def test_an_inner_value_by_the_name_of_a_port_gives_way(model, tmp_path):
    proto = model.proto
    for node in proto.graph.node:
        node.input[:] = ["adapter_mask" if name == "b0" else name for name in node.input]
        node.output[:] = ["adapter_mask" if name == "b0" else name for name in node.output]
    out = extract_adapters(proto, tmp_path, make_inputs=True)
    np.testing.assert_allclose(run(out.model_path, {"x": X}), model.expected(X, None), rtol=1e-4, atol=1e-4)


def test_a_models_own_input_by_the_name_of_a_port_is_refused(model, tmp_path):
    proto = model.proto
    proto.graph.input[0].name = "adapter_mask"
    for node in proto.graph.node:
        node.input[:] = ["adapter_mask" if name == "x" else name for name in node.input]
    with pytest.raises(ModelError, match="adapter_mask"):
        extract_adapters(proto, tmp_path / "out", make_inputs=True)


def test_rows_of_a_mask_reach_the_rows_of_x_at_every_site_however_deep(model, tmp_path):
    out = extract_adapters(model.proto, tmp_path, make_inputs=True)
    adapter = other(model, rank=2)
    feeds = {
        f"{n}.{side}.weight": pair[i] for n, pair in adapter.items() for i, side in enumerate(("lora_A", "lora_B"))
    }
    got = run(out.model_path, {"x": X, "adapter_mask": np.array([[1, 1], [0, 0]], np.float32), **feeds})
    np.testing.assert_allclose(got[0], model.expected(X, adapter)[0], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(got[1], model.expected(X, None)[1], rtol=1e-4, atol=1e-4)


def test_a_model_older_than_functions_becomes_one_that_has_them(model, tmp_path):
    model.proto.ir_version = 7
    assert onnx.load(extract_adapters(model.proto, tmp_path, make_inputs=True).model_path).ir_version == 8


def test_only_a_model_with_inputs_has_a_mask(model, tmp_path):
    masks = []
    for options in ({}, {"make_inputs": True}):
        out = extract_adapters(model.proto, tmp_path / f"{len(options)}", **options)
        masks.append(Manifest.loads(ir.load(out.model_path).metadata_props[KEY], where="m").mask)
    assert masks == [None, "adapter_mask"]


def fingerprint(model, folder, *, change=None):
    proto = onnx.ModelProto.FromString(model.proto.SerializeToString())
    for tensor in proto.graph.initializer:
        if tensor.name == "w1" and change is not None:
            tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), "w1"))
    out = extract_adapters(proto, folder, make_inputs=True)
    manifest = Manifest.loads(ir.load(out.model_path).metadata_props[KEY], where="m")
    assert out.adapter.metadata["base_fingerprint"] == manifest.fingerprint
    return manifest.fingerprint


def flipped(at):
    def change(array):
        array = array.copy()
        array[at] *= -1
        return array

    return change


def test_a_base_is_known_by_the_signs_on_its_diagonal_first_to_last(model, tmp_path):
    want = fingerprint(model, tmp_path / "0")
    for i, same in enumerate((lambda array: 3 * array, flipped((0, 1)))):
        assert fingerprint(model, tmp_path / f"same{i}", change=same) == want
    for at in ((0, 0), (7, 7)):
        assert fingerprint(model, tmp_path / f"other{at[0]}", change=flipped(at)) != want


def test_the_order_of_the_sites_is_not_part_of_the_fingerprint(tmp_path):
    # Layers of one shape, whose seeds give them equal weights in any order.
    one, two = Layer("a.q", 1, 1, 1, 2.0), Layer("b.q", 1, 1, 1, 2.0)
    prints = [fingerprint(text_model(order, seed=0), tmp_path / order[0].name) for order in ((one, two), (two, one))]
    signs = [np.sign(text_model((one, two)).weights[name][0]) for name in ("a.q", "b.q")]
    assert signs[0] == signs[1], "choose a seed under which the two bases look alike"
    assert prints[0] == prints[1]


def test_a_model_without_external_data_is_not_written_over_itself(model, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(model.proto, path)
    before = path.read_bytes()
    with pytest.raises(ModelError, match="is the model itself"):
        extract_adapters(path, tmp_path, make_inputs=True)
    assert path.read_bytes() == before


def test_the_manifest_is_json_that_needs_no_weights(model, tmp_path):
    out = extract_adapters(model.proto, tmp_path, make_inputs=True)
    raw = json.loads(onnx.load(out.model_path, load_external_data=False).metadata_props[0].value)
    assert raw["format_version"] == 1
    assert [site["name"] for site in raw["sites"]] == [layer.name for layer in LAYERS]
    assert len(raw["fingerprint"]) == 64
