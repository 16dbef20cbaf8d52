"""Adapters in graphs that ONNX Runtime's quantizers made, base and adapter together.

The oracle is ONNX Runtime on the same pipeline: another adapter put into the float model, which is then quantized but
for the adapter's nodes.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantFormat

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import MismatchError, ModelError, NoAdaptersFound, OptionError
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.manifest import KEY
from adapterx.runtime.session import AdapterSession
from adapterx.verify import verify_extraction
from tests.graph.quantizers import HOW, quantized, static
from tests.graph.text_models import Layer, text_model

# Wider than a block, so that blocks and padding both occur; B's inner dimension is shorter than a block.
LAYERS = (Layer("model.layers.0.q_proj", 64, 96, 8, 2.0), Layer("model.layers.0.o_proj", 96, 48, 4, 0.75))
LORA_NODES = [f"node_{factor}{i}" for i in range(len(LAYERS)) for factor in "lz"]
# Rounding of float32 sums, relative to the largest output.
FLOAT = 1e-6


def blank(layers=LAYERS):
    model = text_model(layers)
    # Blocks of DequantizeLinear came with opset 21.
    model.proto.opset_import[0].version = 21
    return model


def with_adapter(adapter):
    """The float model with other numbers in the place of its adapter's."""
    proto = blank().proto
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for layer in LAYERS:
        one = adapter.sites[layer.name]
        for side, array in (("A", one.a.T), ("B", one.b / np.float32(layer.scale))):
            name = f"base_model.model.{layer.name}.lora_{side}.default.weight"
            tensors[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return proto


def base_alone():
    """The float model without a branch."""
    proto = blank().proto
    kept = [node for node in proto.graph.node if node.op_type == "Add" or node.output[0][0] == "b"]
    for node in kept:
        if node.op_type == "Add":
            node.op_type = "Identity"
            del node.input[1:]
    used = {name for node in kept for name in node.input}
    weights = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    for old, new in ((proto.graph.node, kept), (proto.graph.initializer, weights)):
        del old[:]
        old.extend(new)
    return proto


def random_adapter(rank=8, seed=5):
    rng = np.random.default_rng(seed)
    sites = {}
    for layer in LAYERS:
        a, b = rng.standard_normal((rank, layer.d_in)), rng.standard_normal((rank, layer.d_out)) / np.sqrt(rank)
        sites[layer.name] = LowRank(a=(a / np.sqrt(layer.d_in)).astype(np.float32), b=b.astype(np.float32))
    return Adapter(sites)


X = np.random.default_rng(9).standard_normal((2, 5, 64)).astype(np.float32)


def run(path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options).run(None, {"x": X})[0]


def relative_error(got, want):
    return float(np.abs(got - want).max() / np.abs(want).max())


@functools.cache
def folder():
    kept = tempfile.TemporaryDirectory()
    folder.kept = kept
    return Path(kept.name)


@functools.cache
def exported(how):
    """Base and adapter quantized together."""
    return quantized(how, blank().proto, folder() / f"{how}.onnx")


@pytest.mark.parametrize("how", HOW)
def test_an_adapter_that_was_quantized_with_its_base_is_found_by_its_names(how):
    rows = [(s.name, s.adapter, s.d_in, s.rank, s.d_out, s.scale, s.dtype) for s in find_sites(exported(how))]
    assert rows == [(one.name, "default", one.d_in, one.rank, one.d_out, one.scale, "float32") for one in LAYERS]


def test_a_row_shows_the_operation_of_the_base():
    ops = {how: {site.op for site in find_sites(exported(how))} for how in HOW}
    assert ops["int4"] == {"MatMulNBits"}
    assert ops["int4_qdq"] == {"MatMul"}
    assert ops["int8_dynamic"] == {"MatMulInteger"}


@pytest.mark.parametrize("make_inputs", [True, False])
@pytest.mark.parametrize("how", HOW)
def test_the_base_is_the_quantized_base_to_the_last_bit_and_other_adapters_of_any_rank_are_as_if_baked_in(
    how, make_inputs, tmp_path
):
    out = extract_adapters(exported(how), tmp_path / "out", make_inputs=make_inputs)
    session = AdapterSession(out.model_path)
    base = run(quantized(how, base_alone(), tmp_path / "base.onnx"))
    assert np.array_equal(session.run(None, {"x": X})[0], base)
    for rank in (8, 3):
        other = random_adapter(rank)
        session.load_adapter("other", other)
        baked = quantized(how, with_adapter(other), tmp_path / f"rank_{rank}.onnx", exclude=LORA_NODES)
        got = session.run(None, {"x": X}, adapter="other")[0]
        assert relative_error(got, run(baked)) <= FLOAT
        assert relative_error(got, base) > 0.1, "the adapter does something"


@pytest.mark.parametrize("how", HOW)
def test_the_exported_adapter_is_what_its_codes_stand_for(how, tmp_path):
    """Within a step of the quantizer from the float adapter, and the same as in the graph that held the codes."""
    out = extract_adapters(exported(how), tmp_path, make_inputs=True)
    step = 1 / 127 if "int8" in how else 1 / 6 if how == "nf4" else 1 / 8
    for name, (a, b) in blank().exported().items():
        for got, want in ((out.adapter.sites[name].a, a), (out.adapter.sites[name].b, b)):
            assert 0 < np.abs(got - want).max() <= np.abs(want).max() * step
    got = AdapterSession(out.model_path, {"own": out.adapter}).run(None, {"x": X}, adapter="own")[0]
    # Rounding of activations to 8 bits took part there: in sums of that many products, two percent.
    assert relative_error(got, run(exported(how))) <= 3e-2


@pytest.mark.parametrize("how", ["int4", "int4_qdq", "int8_dynamic"])
def test_a_graph_without_names_is_named_by_the_float_adapter_that_was_exported(how, tmp_path):
    proto = onnx.load(exported(how))
    text = proto.SerializeToString().replace(b"lora_", b"llll_")
    nameless = tmp_path / "nameless.onnx"
    nameless.write_bytes(text)
    other = random_adapter()
    given = Adapter({name: LowRank(a=a, b=b) for name, (a, b) in blank().exported().items()})
    assert [site.name for site in find_sites(nameless, adapter=given)] == [layer.name for layer in LAYERS]
    assert {site.name_source for site in find_sites(nameless, adapter=given)} == {"adapter_values"}
    assert other.sites.keys() == given.sites.keys()


@pytest.mark.parametrize("how", ["int4_accuracy_4", "int4_qdq", "int8_dynamic"])
@pytest.mark.parametrize("make_inputs", [True, False])
def test_verification_passes(how, make_inputs, tmp_path):
    out = extract_adapters(exported(how), tmp_path, make_inputs=make_inputs)
    verification = verify_extraction(exported(how), out.model_path)
    assert verification.passed, verification.rows


def calibrated(tmp_path, **options):
    """Base and adapter quantized with ranges of activations that were measured with this adapter."""
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal(X.shape).astype(np.float32)} for _ in range(3)]
    return static(blank().proto, tmp_path / "static.onnx", feeds, **options)


def test_ranges_that_were_measured_with_the_exported_adapter_are_refused_and_nothing_is_written(
    tmp_path,
):
    with pytest.raises(ModelError) as error:
        extract_adapters(calibrated(tmp_path), tmp_path / "out", make_inputs=True, partial=True)
    for words in ("measured with the exported adapter, at 2 of its places", "rounded to multiples of", "static_qdq"):
        assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_sites_with_measured_ranges_are_listed_with_what_stands_against_them(tmp_path):
    sites = find_sites(calibrated(tmp_path))
    assert [site.name for site in sites] == [layer.name for layer in LAYERS]
    assert [line.partition(":")[0] for line in sites.left] == [layer.name for layer in LAYERS]


def test_on_request_ranges_stay_and_the_result_says_how_coarse_they_are(tmp_path):
    out = extract_adapters(calibrated(tmp_path), tmp_path / "out", make_inputs=True, static_qdq="allow")
    # The last layer's grid is that of the output.
    step = np.diff(np.unique(run(tmp_path / "static.onnx"))).min()
    assert f"rounded to multiples of {step:.3g} and cut off at" in out.notes[-1]
    half = halved(out.adapter)
    session = AdapterSession(out.model_path, {"own": out.adapter, "half": half})
    own, small = (session.run(None, {"x": X}, adapter=name)[0] for name in ("own", "half"))
    # The quantized graph itself is six percent away from the float one; ours with its adapter, two.
    want = blank().expected(X, {name: (one.a, one.b) for name, one in half.sites.items()})
    assert distance(own, run(tmp_path / "static.onnx")) <= 0.1
    assert distance(small, want) <= 0.1
    assert distance(own, want) > 0.5


def distance(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def halved(adapter):
    return Adapter({name: LowRank(a=one.a, b=one.b / 2) for name, one in adapter.sites.items()})


def test_an_adapter_left_in_float_on_a_base_of_measured_ranges_is_taken(tmp_path):
    model = calibrated(tmp_path, exclude=LORA_NODES, op_types_to_quantize=["MatMul"])
    out = extract_adapters(model, tmp_path / "out", make_inputs=True)
    assert out.notes == ()
    session = AdapterSession(out.model_path, {"own": out.adapter})
    assert relative_error(session.run(None, {"x": X}, adapter="own")[0], run(model)) <= FLOAT


def test_a_graph_of_codes_throughout_is_refused_with_what_to_do(tmp_path):
    model = calibrated(tmp_path, quant_format=QuantFormat.QOperator)
    nameless = tmp_path / "nameless.onnx"
    nameless.write_bytes(model.read_bytes().replace(b"lora_", b"llll_"))
    with pytest.raises(NoAdaptersFound, match="quantize the export to the QDQ format"):
        find_sites(nameless)


@pytest.mark.parametrize("how", ["int4", "int4_qdq", "int8_dynamic"])
def test_a_quantized_base_has_no_fingerprint_for_its_signs_are_not_those_of_the_float_base(how, tmp_path):
    """Else adapters of the float model would be refused as those of another base."""
    whole = extract_adapters(exported(how), tmp_path / "whole")
    assert whole.adapter.metadata["base_fingerprint"] == ""
    half = quantized(how, blank().proto, tmp_path / "half.onnx", exclude=["node_b0"])
    assert extract_adapters(half, tmp_path / "half").adapter.metadata["base_fingerprint"] == ""


# Codes of 4-bit floats can be read but not written.
KEEPING = [how for how in HOW if how != "nf4"]


def padded(adapter):
    """The same with rows of zeros, up to the rank that the graph has."""
    sites = {}
    for layer in LAYERS:
        one = adapter.sites[layer.name]
        rows = ((0, layer.rank - one.rank), (0, 0))
        sites[layer.name] = LowRank(a=np.pad(one.a, rows), b=np.pad(one.b, rows))
    return Adapter(sites)


@pytest.mark.parametrize("how", KEEPING)
def test_codes_that_are_kept_give_the_exported_adapter_and_the_base_to_the_last_bit(how, tmp_path):
    out = extract_adapters(exported(how), tmp_path / "out", quantized="keep")
    session = AdapterSession(out.model_path, {"own": out.adapter_path})
    assert np.array_equal(session.run(None, {"x": X}, adapter="own")[0], run(exported(how)))
    base = run(quantized(how, base_alone(), tmp_path / "base.onnx"))
    assert np.array_equal(session.run(None, {"x": X})[0], base)


@pytest.mark.parametrize("how", KEEPING)
def test_another_adapter_in_kept_codes_is_what_the_quantizer_makes_of_it(how, tmp_path):
    out = extract_adapters(exported(how), tmp_path / "out", quantized="keep")
    session = AdapterSession(out.model_path)
    for rank in (4, 3):
        other = random_adapter(rank)
        session.load_adapter("other", other)
        want = run(quantized(how, with_adapter(padded(other)), tmp_path / f"rank_{rank}.onnx"))
        assert relative_error(session.run(None, {"x": X}, adapter="other")[0], want) <= FLOAT
        assert relative_error(run(exported(how)), want) > 0.1


@pytest.mark.parametrize("how", ["int4_asymmetric", "int4_qdq", "int8_dynamic"])
def test_verification_passes_on_kept_codes(how, tmp_path):
    out = extract_adapters(exported(how), tmp_path, quantized="keep")
    verification = verify_extraction(exported(how), out.model_path)
    assert verification.passed, verification.rows


@pytest.mark.parametrize("how", ["int4", "uint4_qdq", "int8_dynamic"])
def test_kept_codes_lie_in_a_file_of_their_own_under_the_names_of_their_sites(how, tmp_path):
    out = extract_adapters(exported(how), tmp_path, quantized="keep")
    tensors = onnx.load(out.model_path, load_external_data=False).graph.initializer
    lying = {t.name: {e.key: e.value for e in t.external_data}.get("location") for t in tensors}
    for layer in LAYERS:
        for side in "AB":
            name = f"{layer.name}.lora_{side}.weight"
            assert {lying[name], lying[f"{name}.scale"]} == {f"{how}.adapter.codes.bin"}
    # Whoever opens the model without a session of ours has the exported adapter.
    assert np.array_equal(run(out.model_path), run(exported(how)))
    assert [(s.name, s.rank) for s in find_sites(out.model_path)] == [(one.name, one.rank) for one in LAYERS]


def test_kept_codes_take_no_rank_above_the_exported_one(tmp_path):
    session = AdapterSession(extract_adapters(exported("int4"), tmp_path, quantized="keep").model_path)
    with pytest.raises(MismatchError, match="rank 5, the model's port takes 4"):
        session.load_adapter("other", random_adapter(5))


def test_codes_are_never_fed(tmp_path):
    with pytest.raises(OptionError, match="computes otherwise with codes that are fed"):
        extract_adapters(exported("int4"), tmp_path / "out", make_inputs=True, quantized="keep")
    assert not (tmp_path / "out").exists()


def test_codes_that_cannot_be_written_are_not_kept(tmp_path):
    with pytest.raises(ModelError, match="can be read but not written"):
        extract_adapters(exported("nf4"), tmp_path / "out", quantized="keep")
    assert not (tmp_path / "out").exists()


def test_a_float_adapter_on_a_quantized_base_has_float_ports_whatever_is_kept(tmp_path):
    half = quantized("int4", blank().proto, tmp_path / "half.onnx", exclude=LORA_NODES[:2])
    out = extract_adapters(half, tmp_path / "out", quantized="keep")
    session = AdapterSession(out.model_path, {"own": out.adapter})
    assert list(session.manifest.kept) == [LAYERS[1].name]
    assert relative_error(session.run(None, {"x": X}, adapter="own")[0], run(half)) <= FLOAT
    wide = random_adapter(4).sites | {LAYERS[0].name: random_adapter(12).sites[LAYERS[0].name]}
    session.load_adapter("wide", Adapter(wide))
    baked = quantized("int4", with_adapter(Adapter(wide)), tmp_path / "wide.onnx", exclude=LORA_NODES[:2])
    assert relative_error(session.run(None, {"x": X}, adapter="wide")[0], run(baked)) <= FLOAT


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("keeps codes of sites", lambda kept: kept.update(nowhere=next(iter(kept.values())))),
        ("scale 0", lambda kept: kept[LAYERS[0].name].update(scale=0)),
        ("not what the manifest says", lambda kept: kept[LAYERS[0].name]["a"].update(bits=8)),
        ("stand for matrices", lambda kept: kept[LAYERS[0].name]["b"].update(form="in_out")),
        ("no initializer", lambda kept: kept[LAYERS[0].name]["a"]["tensors"].update(scale="elsewhere")),
    ],
)
def test_a_manifest_that_does_not_fit_the_kept_codes_is_refused(words, change, tmp_path):
    model = onnx.load(
        extract_adapters(exported("int4"), tmp_path, quantized="keep").model_path, load_external_data=False
    )
    entry = next(entry for entry in model.metadata_props if entry.key == KEY)
    manifest = json.loads(entry.value)
    change(manifest["kept"])
    entry.value = json.dumps(manifest)
    (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=words):
        AdapterSession(tmp_path / "changed.onnx")


def test_a_model_whose_kept_codes_are_gone_is_refused(tmp_path):
    out = extract_adapters(exported("int4"), tmp_path, quantized="keep")
    (tmp_path / "int4.adapter.codes.bin").unlink()
    with pytest.raises(ModelError, match=r"int4\.adapter\.codes\.bin"):
        AdapterSession(out.model_path)


def test_keeping_codes_of_an_adapter_that_has_none_is_an_error(tmp_path):
    half = quantized("int4", blank().proto, tmp_path / "half.onnx", exclude=LORA_NODES)
    with pytest.raises(ModelError, match="none to keep"):
        extract_adapters(half, tmp_path / "out", quantized="keep")
    assert not (tmp_path / "out").exists()


def test_operators_that_onnx_runtime_fused_around_codes_are_products_too(tmp_path):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    ort.InferenceSession(str(exported("int8_dynamic")), options)
    out = extract_adapters(tmp_path / "fused.onnx", tmp_path / "float", make_inputs=True)
    assert {site.op for site in out.sites} == {"MatMulIntegerToFloat"}
    other = random_adapter(3)
    session = AdapterSession(out.model_path, {"other": other})
    want = run(quantized("int8_dynamic", with_adapter(other), tmp_path / "baked.onnx", exclude=LORA_NODES))
    assert relative_error(session.run(None, {"x": X}, adapter="other")[0], want) <= FLOAT
    kept = extract_adapters(tmp_path / "fused.onnx", tmp_path / "kept", quantized="keep")
    own = AdapterSession(kept.model_path, {"own": kept.adapter}).run(None, {"x": X}, adapter="own")[0]
    assert np.array_equal(own, run(tmp_path / "fused.onnx"))
