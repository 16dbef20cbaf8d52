"""A merged model is PyTorch with the adapter: on bases that never had one, on models with ports, for every kind."""

import os

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from adapterx import weight_rows
from adapterx.adapter import Adapter, LowRank
from adapterx.combination import combine
from adapterx.errors import MismatchError
from adapterx.formats import load_adapter
from adapterx.fused import split
from adapterx.graph import merged_files
from adapterx.graph.merge import merge_adapter, unmerge_adapter
from adapterx.manifest import KEY
from adapterx.runtime.session import AdapterSession
from tests.graph.base_models import floats, proto
from tests.graph.merging import assert_outputs, external, initializers, ported, run
from tests.zoo import CASES, build

# Bases without an adapter, as exporters write them, optimized and not.
BASES = [
    *("ts_llama", "ts_phi3", "dy_llama", "dy_phi3", "optimum_llama", "optimum_bert", "genai_llama", "genai_phi3"),
    *("ts_gpt2", "ts_bert", "ts_vit", "ts_mlp", "dy_mlp", "ts_normed", "dy_normed", "ts_conv", "dy_conv"),
]
PORTED = [
    *("ts_llama_ort_extended", "dy_llama_stripped", "ts_llama_two_active", "ts_llama_lm_head", "ts_llama_half"),
    *("dy_llama_external", "optimum_t5_merged_first", "ts_gpt2_ort_extended", "ts_bert_ort_transformers"),
    *("ts_repeated", "dy_repeated", "ts_normed_ort_extended", "dy_normed_ort_extended", "dy_bert_classifier"),
]
# What an adapter of another kind is merged into: a base of the same seeded model, exported without one.
MLP, LLAMA, NORMED = ("plain", "ts_plain"), ("plain", "dy_plain"), ("base", "ts_normed")
KINDS = {
    **dict.fromkeys(("ts_dora", "ts_lora_bias", "ts_ia3", "ts_bias", "ts_vera_mlp", "ts_loha", "dy_lokr"), MLP),
    **dict.fromkeys(("ts_embedding", "ts_dora_llama", "ts_vera"), LLAMA),
    **dict.fromkeys(("ts_dora_normed", "ts_lora_bias_normed", "ts_ia3_normed", "ts_bias_normed"), NORMED),
    "ts_saved": ("ported", "ts_bert_classifier"),
    "ts_embedding_tied": ("ported", "ts_llama_lm_head"),
    "dy_dora_normed": ("ported", "ts_normed_ort_extended"),
}


def base_of(how, name, tmp_path):
    if how == "ported":
        return ported(name, tmp_path / "ported")
    return build(name).model if how == "plain" else build(name).base_model


@pytest.mark.parametrize("name", BASES)
def test_a_base_with_an_adapter_merged_in_is_pytorch_with_it(name, tmp_path):
    built = build(name)
    merge_adapter(built.base_model, built.adapters["b"], tmp_path / "merged.onnx")
    assert_outputs(run(tmp_path / "merged.onnx", built.feeds), built.expected["b"], CASES[name].atol)


@pytest.mark.parametrize("name", PORTED)
def test_a_model_with_ports_becomes_a_plain_one_with_the_adapter_in_it(name, tmp_path):
    built, model = build(name), ported(name, tmp_path / "ported")
    path = tmp_path / "merged.onnx"
    merge_adapter(model, built.adapters["b"], path, partial=bool(CASES[name].file))
    assert_outputs(run(path, built.feeds), built.expected["b"], CASES[name].atol)
    merged, before = onnx.load(path), onnx.load(built.model, load_external_data=False)
    assert [value.name for value in merged.graph.input] == [value.name for value in before.graph.input]
    assert [value.name for value in merged.graph.output] == [value.name for value in before.graph.output]
    assert not merged.functions
    assert "ai.adapterx" not in merged.SerializeToString().decode("latin1")
    assert KEY not in {entry.key for entry in merged.metadata_props}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_adapter_is_merged(name, tmp_path):
    built = build(name)
    merge_adapter(base_of(*KINDS[name], tmp_path), built.adapters["b"], tmp_path / "merged.onnx")
    assert_outputs(run(tmp_path / "merged.onnx", built.feeds), built.expected["b"], CASES[name].atol)


# From opset 18 on a packed port is split by sizes that the graph takes from its shape.
SORTS = [
    ("ts_llama", {"pack_inputs": True}),
    ("dy_vit", {"pack_inputs": True}),
    ("ts_llama", {"make_inputs": False}),
    ("ts_llama", {"optional_inputs": False}),
]


@pytest.mark.parametrize(("name", "options"), SORTS)
def test_ports_of_every_sort_are_taken_out(name, options, tmp_path):
    built, model = build(name), ported(name, tmp_path / "ported", **options)
    merge_adapter(model, built.adapters["b"], tmp_path / "merged.onnx")
    assert_outputs(run(tmp_path / "merged.onnx", built.feeds), built.expected["b"], 1e-4)


@pytest.mark.parametrize("another", [True, False])
def test_ports_that_are_kept_take_another_adapter_on_top(another, tmp_path):
    built, model = build("ts_llama"), ported("ts_llama", tmp_path / "ported")
    merge_adapter(model, built.adapters["b"], tmp_path / "merged.onnx", keep_ports=True)
    session = AdapterSession(tmp_path / "merged.onnx", adapters={"c": built.adapters["c"]})
    b, c = (load_adapter(built.adapters[name]) for name in "bc")
    both = AdapterSession(model, adapters={"both": combine([(b, 1.0), (c, 1.0)]) if another else b})
    want = both.run(None, built.feeds, adapter="both")
    assert_outputs(session.run(None, built.feeds, adapter="c" if another else None), want, 1e-4)


@pytest.mark.parametrize("weight", [0.5, -1.5])
def test_a_part_of_an_adapter_is_what_a_session_makes_of_that_weight(weight, tmp_path):
    built, model = build("ts_llama"), ported("ts_llama", tmp_path / "ported")
    session = AdapterSession(model, adapters={"part": combine([(load_adapter(built.adapters["b"]), weight)])})
    want = session.run(None, built.feeds, adapter="part")
    merge_adapter(model, built.adapters["b"], tmp_path / "merged.onnx", weight=weight)
    assert_outputs(run(tmp_path / "merged.onnx", built.feeds), want, 1e-4)


UNMERGED = {"ts_llama": 1e-6, "ts_gpt2": 1e-6, "ts_conv": 1e-6, "ts_ia3": 1e-6, "ts_llama_half": 2e-3}


@pytest.mark.parametrize("name", UNMERGED)
def test_what_was_merged_can_be_taken_out_to_within_rounding(name, tmp_path):
    built = build(name)
    how = KINDS.get(name, ("base" if built.base_model else "ported", name))
    base = base_of(*how, tmp_path)
    if how[0] == "ported":
        sites = load_adapter(built.adapters["b"]).sites.items()
        zero = Adapter({site: LowRank(a=one.a, b=0 * one.b) for site, one in sites})
        merge_adapter(base, zero, tmp_path / "plain.onnx")
        base = tmp_path / "plain.onnx"
    merge_adapter(base, built.adapters["b"], tmp_path / "merged.onnx")
    unmerge_adapter(tmp_path / "merged.onnx", built.adapters["b"], tmp_path / "again.onnx")
    old, again, merged = (initializers(path) for path in (base, tmp_path / "again.onnx", tmp_path / "merged.onnx"))
    assert old.keys() == again.keys()
    for key, array in old.items():
        np.testing.assert_allclose(again[key].astype(np.float64), array, rtol=0, atol=UNMERGED[name])
    assert any(not np.array_equal(merged[key], old[key]) for key in old)


def test_dora_cannot_be_taken_out_of_the_merged_weight_alone(tmp_path):
    built = build("ts_dora")
    merge_adapter(build("ts_plain").model, built.adapters["b"], tmp_path / "merged.onnx")
    with pytest.raises(MismatchError, match="cannot be undone from the merged weight alone"):
        unmerge_adapter(tmp_path / "merged.onnx", built.adapters["b"], tmp_path / "again.onnx")
    assert not (tmp_path / "again.onnx").exists()


# -- Shared weights, fused layers, biases -----------------------------------------------------------------------------


VOCABULARY, HIDDEN = 10, 24
TABLE = floats(VOCABULARY, HIDDEN)


def tied():
    """An embedding and a head that read one initializer."""
    body = "e = Gather(w, i)\nv = Transpose<perm=[1,0]>(w)\ny = MatMul(e, v)"
    paths = {"w": "model.embed_tokens.weight", "e": "/model/embed_tokens/Gather", "y": "/lm_head/MatMul"}
    return proto(body, {"w": TABLE}, inputs="int64[n,t] i", names=paths)


def random_change(d_in, d_out):
    rng = np.random.default_rng(d_in)
    return LowRank(*(rng.standard_normal((3, width)).astype(np.float32) for width in (d_in, d_out)))


@pytest.mark.parametrize("sites", [("lm_head",), ("model.embed_tokens",), ("lm_head", "model.embed_tokens")])
@pytest.mark.parametrize("in_file", [True, False])
def test_only_the_adapted_one_of_two_tied_modules_changes(sites, in_file, tmp_path):
    sizes = {"lm_head": (HIDDEN, VOCABULARY), "model.embed_tokens": (VOCABULARY, HIDDEN)}
    adapter = Adapter({site: random_change(*sizes[site]) for site in sites})
    onnx.save(tied(), tmp_path / "model.onnx")
    if in_file:
        external(tmp_path / "model.onnx", tmp_path / "model.onnx", one_file=True)
        with (tmp_path / "weights.bin").open("ab") as file:
            file.write(b"odd")
    merge_adapter(tmp_path / "model.onnx", adapter, tmp_path / "merged.onnx")
    delta = {site: one.a.T @ one.b for site, one in adapter.sites.items()}
    table, head = TABLE + delta.get("model.embed_tokens", 0), TABLE.T + delta.get("lm_head", 0)
    ids = np.array([[1, 9, 0]])
    assert_outputs(run(tmp_path / "merged.onnx", {"i": ids}), [table[ids] @ head], 1e-4)
    if in_file:
        size = (tmp_path / "merged.onnx.data").stat().st_size - (tmp_path / "weights.bin").stat().st_size
        assert TABLE.nbytes <= size < TABLE.nbytes + 64
        tensors = onnx.load(tmp_path / "merged.onnx", load_external_data=False).graph.initializer
        offsets = [entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "offset"]
        assert len(offsets) == 2
        assert not any(int(offset) % 64 for offset in offsets)


def test_an_adapter_of_split_modules_is_merged_into_a_fused_one(tmp_path):
    built = build("ts_phi3")
    sites = {}
    for name, change in load_adapter(built.adapters["b"]).sites.items():
        if name.endswith("qkv_proj"):
            names = [f"{name.removesuffix('qkv_proj')}{part}_proj" for part in "qkv"]
            sites |= dict(zip(names, split(change, (48, 24, 24)), strict=True))
        else:
            sites[name] = change
    assert len(sites) > len(load_adapter(built.adapters["b"]).sites)
    merge_adapter(built.base_model, Adapter(sites), tmp_path / "merged.onnx")
    assert_outputs(run(tmp_path / "merged.onnx", built.feeds), built.expected["b"], 1e-4)


def test_a_shift_makes_a_bias_where_there_was_none(tmp_path):
    """`up` of the model has no bias."""
    built = build("ts_normed")
    shift = np.random.default_rng(1).standard_normal((1, 56)).astype(np.float32)
    merge_adapter(built.base_model, Adapter({"up": LowRank.of_parts({"shift": shift})}), tmp_path / "merged.onnx")
    [x] = built.feeds.values()
    weights = initializers(built.base_model)
    h = x @ next(w if w.shape == (40, 56) else w.T for w in weights.values() if sorted(w.shape) == [40, 56]) + shift
    merged = onnx.load(tmp_path / "merged.onnx")
    [add] = [node for node in merged.graph.node if node.name == "up/bias"]
    merged.graph.output.append(onnx.helper.make_tensor_value_info(add.output[0], 1, None))
    onnx.save(merged, tmp_path / "shown.onnx")
    np.testing.assert_allclose(run(tmp_path / "shown.onnx", built.feeds)[-1], h, atol=1e-5)


# -- Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_file", [True, False])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_data_files_are_copied_with_the_merged_weights_in_them(one_file, elsewhere, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    built = build("ts_llama")
    (tmp_path / "in").mkdir()
    model = external(tmp_path / "in" / "model.onnx", built.base_model, one_file=one_file)
    before = {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    output = (tmp_path / "out" if elsewhere else tmp_path / "in") / "merged.onnx"
    merge_adapter(model, built.adapters["b"], output)
    assert_outputs(run(output, built.feeds), built.expected["b"], 1e-4)
    onnx.checker.check_model(str(output))
    for name, content in before.items():
        assert (tmp_path / "in" / name).read_bytes() == content
    new = {path.name for path in output.parent.iterdir()} - (set() if elsewhere else set(before))
    if one_file:
        assert new == {"merged.onnx", "merged.onnx.data"}
        assert (output.parent / "merged.onnx.data").stat().st_size == len(before["weights.bin"])
    if elsewhere:
        (tmp_path / "in").rename(tmp_path / "gone")
        assert_outputs(run(output, built.feeds), built.expected["b"], 1e-4)


def test_blocks_of_rows_make_the_weight_that_one_block_makes(tmp_path, monkeypatch):
    built = build("ts_llama")
    model = external(tmp_path / "model.onnx", built.base_model, one_file=True)
    merge_adapter(model, built.adapters["b"], tmp_path / "one.onnx")
    rows = []

    def small(ref, nbytes):
        rows.append(weight_rows.row_blocks(ref, nbytes, block_bytes=1000))
        return rows[-1]

    monkeypatch.setattr(merged_files, "row_blocks", small)
    merge_adapter(model, built.adapters["b"], tmp_path / "many.onnx")
    assert min(len(blocks) for blocks in rows) > 3
    one, many = initializers(tmp_path / "one.onnx"), initializers(tmp_path / "many.onnx")
    for name, array in one.items():
        np.testing.assert_allclose(many[name], array, rtol=0, atol=1e-6)


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    built = build("ts_llama")
    model = external(tmp_path / "model.onnx", built.base_model, one_file=True)
    (tmp_path / "merged.onnx").write_text("old")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        merge_adapter(model, built.adapters["b"], tmp_path / "merged.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "merged.onnx").read_text() == "old"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_sums_are_made_wide_and_rounded_once(dtype, tmp_path):
    base = floats(32, HIDDEN, dtype=dtype)
    element = {np.float16: "float16", ml_dtypes.bfloat16: "bfloat16", np.float64: "double"}[dtype]
    model = proto(
        "y = MatMul(x, w)", {"w": base}, inputs=f"{element}[n,32] x", outputs=f"{element} y", names={"w": "fc.weight"}
    )
    one = random_change(32, HIDDEN)
    merge_adapter(model, Adapter({"fc": one}), tmp_path / "merged.onnx")
    merged = ir.load(tmp_path / "merged.onnx").graph.initializers["fc.weight"].const_value.numpy()
    assert merged.dtype == dtype
    wide = np.float64 if dtype == np.float64 else np.float32
    expected = (base.astype(wide) + one.a.T @ one.b).astype(dtype)
    # The order of a float32 sum may move a number over the edge of a rounding.
    assert (merged != expected).mean() < 1e-3 or dtype == np.float64
    np.testing.assert_allclose(merged.astype(wide), expected.astype(wide), rtol=2**-7, atol=1e-6)


def test_a_model_behind_links_is_merged_as_one_in_a_folder(tmp_path):
    """As Hugging Face's cache lays it: names in one folder are links into another, of contents."""
    built = build("ts_mlp")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    external(tmp_path / "blobs" / "model.onnx", built.base_model, one_file=True)
    (tmp_path / "blobs" / "weights.bin").rename(tmp_path / "blobs" / "0f3c")
    (tmp_path / "blobs" / "model.onnx").rename(tmp_path / "blobs" / "9a1b")
    (tmp_path / "snapshot" / "model.onnx").symlink_to(tmp_path / "blobs" / "9a1b")
    (tmp_path / "snapshot" / "weights.bin").symlink_to(tmp_path / "blobs" / "0f3c")
    before = (tmp_path / "blobs" / "0f3c").read_bytes()
    merge_adapter(tmp_path / "snapshot" / "model.onnx", built.adapters["b"], tmp_path / "out" / "merged.onnx")
    assert_outputs(run(tmp_path / "out" / "merged.onnx", built.feeds), built.expected["b"], 1e-4)
    assert (tmp_path / "blobs" / "0f3c").read_bytes() == before


def test_the_argument_is_left_alone(tmp_path):
    built = build("ts_mlp")
    proto = onnx.load(built.base_model)
    model = ir.from_proto(proto)
    for given in (proto, model):
        merge_adapter(given, built.adapters["b"], tmp_path / "merged.onnx")
        assert_outputs(run(tmp_path / "merged.onnx", built.feeds), built.expected["b"], 1e-4)
    assert ir.to_proto(model).SerializeToString() == ir.to_proto(ir.from_proto(proto)).SerializeToString()
