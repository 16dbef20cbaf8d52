"""A quantized base is the base in fewer bits and nothing else: adapters act on it as numpy says."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import FeedError, ModelError
from adapterx.graph.base_methods import HQQ, RTN, Bnb4, DynamicInt8, KQuant, StaticInt8
from adapterx.graph.extract import extract_adapters
from adapterx.graph.inject import inject_adapters
from adapterx.graph.quantize import quantize_base
from adapterx.graph.sites import find_sites
from adapterx.manifest import KEY, Manifest
from adapterx.runtime.session import AdapterSession
from tests.graph.base_models import floats, proto
from tests.graph.dequantized import weights
from tests.graph.text_models import Layer, text_model
from tests.zoo import build

LAYERS = (Layer("model.up", 70, 50, 4, 2.0), Layer("model.down", 50, 30, 4, 0.5, join="gemm_c"))
EXACT = {
    "rtn4": RTN(accuracy_level=0),
    "rtn4_asymmetric": RTN(symmetric=False, accuracy_level=0),
    "rtn2": RTN(bits=2, block_size=16, accuracy_level=0),
    "rtn8_by_row": RTN(bits=8, block_size=-1, symmetric=False, accuracy_level=0),
    "rtn4_groups_of_48": RTN(block_size=48, symmetric=False, accuracy_level=0),
    "rtn4_qdq": RTN(format="qdq"),
    "rtn8_qdq": RTN(bits=8, format="qdq"),
    "rtn8_qdq_asymmetric": RTN(bits=8, symmetric=False, format="qdq"),
    "kquant4_qdq": KQuant(format="qdq"),
    "kquant4": KQuant(accuracy_level=0),
    "hqq2": HQQ(bits=2, accuracy_level=0),
    "hqq4": HQQ(),
    "hqq8": HQQ(bits=8, accuracy_level=0),
    "nf4": Bnb4(),
    "fp4": Bnb4("fp4", 32),
}
# Error of the weights, over the weights: what the number of bits allows.
ALLOWED = {2: 0.5, 4: 0.13, 8: 0.012}


def exact_options():
    """ONNX Runtime makes MatMulNBits of QDQ, at a level of its own."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def other_adapter(layers, seed=5):
    rng = np.random.default_rng(seed)
    draw = [(layer.name, rng.normal(size=(3, layer.d_in)), rng.normal(size=(3, layer.d_out))) for layer in layers]
    return {name: (a.astype(np.float32), b.astype(np.float32)) for name, a, b in draw}


def as_adapter(arrays):
    return Adapter({name: LowRank(a=a, b=b) for name, (a, b) in arrays.items()})


def expected(model, found, x, adapter):
    """numpy's answer on the base whose weights are those that the quantized file holds."""
    kept = dict(model.weights)
    for index, layer in enumerate(model.layers):
        name = next(
            name for name in found if name in {f"node_b{index}", "node_y"} and found[name].shape[0] == layer.d_in
        )
        model.weights[layer.name] = (found[name], *kept[layer.name][1:])
    answer = model.expected(x, adapter)
    model.weights.update(kept)
    return answer


@pytest.mark.parametrize("name", EXACT)
def test_another_adapter_on_the_quantized_base_is_numpys(name, tmp_path):
    model = text_model(LAYERS, seed=3, dims=2)
    done = quantize_base(model.proto, tmp_path / "q.onnx", method=EXACT[name])
    assert [row.shape for row in done.rows] == [(70, 50), (50, 30)]
    method = EXACT[name]
    bits = 4 if isinstance(method, Bnb4) else method.bits
    assert all(0 < row.error < (0.2 if isinstance(method, Bnb4) else ALLOWED[bits]) for row in done.rows)
    found = weights(onnx.load(tmp_path / "q.onnx"))
    out = extract_adapters(tmp_path / "q.onnx", tmp_path / "x", make_inputs=True)
    x = np.random.default_rng(1).normal(size=(5, 70)).astype(np.float32)
    adapter = other_adapter(LAYERS)
    adapters = {"other": as_adapter(adapter), "exported": out.adapter}
    session = AdapterSession(out.model_path, adapters=adapters, session_options=exact_options())
    for label, arrays in (("other", adapter), ("exported", model.exported()), (None, None)):
        want = expected(model, found, x, arrays)
        [got] = session.run(None, {"x": x}, adapter=label)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", EXACT)
def test_the_weights_of_the_file_are_near_those_of_the_model(name, tmp_path):
    model = text_model(LAYERS, seed=3)
    quantize_base(model.proto, tmp_path / "q.onnx", method=EXACT[name])
    found = weights(onnx.load(tmp_path / "q.onnx"))
    assert len(found) == 2
    method = EXACT[name]
    allowed = 0.2 if isinstance(method, Bnb4) else ALLOWED[method.bits]
    for weight in found.values():
        whole = next(w for w, _, _ in model.weights.values() if w.shape == weight.shape)
        assert np.linalg.norm(weight - whole) < allowed * np.linalg.norm(whole)


@pytest.mark.parametrize("method", [DynamicInt8(), StaticInt8()], ids=["dynamic", "static"])
def test_int8_of_activations_too_is_near_and_adapters_read_floats(method, tmp_path):
    model = text_model(LAYERS, seed=3, dims=2)
    x = np.random.default_rng(1).normal(size=(5, 70)).astype(np.float32)
    out = extract_adapters(model.proto, tmp_path / "x", make_inputs=True)
    quantize_base(out.model_path, tmp_path / "q.onnx", method=method, calibration=[{"x": x / 2}, {"x": x}])
    adapter = {name: (a / 100, b) for name, (a, b) in other_adapter(LAYERS).items()}
    session = AdapterSession(tmp_path / "q.onnx", adapters={"other": as_adapter(adapter)})
    want, base = model.expected(x, adapter), model.expected(x, None)
    assert np.abs(want - base).max() > 0.1 * np.abs(want).max()
    # Static ranges are those of the base, and the adapter goes beyond them.
    allowed = 0.03 if method == DynamicInt8() else 0.08
    assert np.abs(session.run(None, {"x": x}, adapter="other")[0] - want).max() < allowed * np.abs(want).max()
    quantize_base(model.proto, tmp_path / "export.onnx", method=method, calibration=[{"x": x}])
    assert extract_adapters(tmp_path / "export.onnx", tmp_path / "again").adapter == out.adapter


# -- What is an adapter's stays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ts_llama_zero_b", "dy_llama_external", "ts_bert_classifier"])
def test_adapters_inside_an_export_keep_every_bit_and_are_found_again(name, tmp_path):
    built = build(name)
    quantize_base(built.model, tmp_path / "q.onnx")
    before, after = (find_sites(model) for model in (built.model, tmp_path / "q.onnx"))
    assert before.names == after.names
    exported = [extract_adapters(model, tmp_path / str(i), make_inputs=True)
                for i, model in enumerate((built.model, tmp_path / "q.onnx"))]  # fmt: skip
    assert exported[0].adapter == exported[1].adapter
    # No fingerprint can be made of rounded weights, and none is compared with any.
    held = Manifest.loads(onnx.load(exported[1].model_path).metadata_props[-1].value, where="it")
    assert held.fingerprint == ""


@pytest.mark.parametrize(
    "options", [{"make_inputs": True}, {"make_inputs": True, "pack_inputs": True}, {"make_inputs": False}]
)
def test_adapter_files_serve_an_extracted_model_before_and_after(options, tmp_path):
    built = build("ts_llama")
    out = extract_adapters(built.model, tmp_path / "x", **options)
    quantize_base(out.model_path, tmp_path / "q" / "q.onnx", method=RTN(bits=8, accuracy_level=0), head=True)
    session = AdapterSession(tmp_path / "q" / "q.onnx", adapters={"b": built.adapters["b"], "x": out.adapter_path})
    for got, want in zip(session.run(None, built.feeds, adapter="b"), built.expected["b"], strict=True):
        assert 0 < np.abs(got - want).max() < 0.1
    # An adapter that was taken from the float model still tells another base from this one.
    manifests = [Manifest.loads({e.key: e.value for e in onnx.load(path, load_external_data=False).metadata_props}[KEY],
                                where="it") for path in (out.model_path, tmp_path / "q" / "q.onnx")]  # fmt: skip
    assert manifests[0].fingerprint == manifests[1].fingerprint != ""
    assert {site.op for site in manifests[1].sites} == {"MatMulNBits"}


def test_rows_of_a_mixed_batch_are_what_each_is_alone(tmp_path):
    built = build("ts_llama")
    out = inject_adapters(built.base_model, tmp_path / "x", adapter=built.adapters["b"])
    quantize_base(out.model_path, tmp_path / "q.onnx")
    session = AdapterSession(tmp_path / "q.onnx", adapters={name: built.adapters[name] for name in "bc"})
    chosen = ["b", None, "c"][: len(next(iter(built.feeds.values())))]
    mixed = session.run(None, built.feeds, adapters=chosen)[0]
    for row, name in enumerate(chosen):
        alone = session.run(None, built.feeds, adapter=name)[0]
        np.testing.assert_allclose(mixed[row], alone[row], rtol=0, atol=1e-5)


def test_an_adapter_that_needs_the_base_weight_reads_the_quantized_one(tmp_path):
    built = build("ts_dora")
    out = inject_adapters(build("ts_plain").model, tmp_path / "x", adapter=built.adapters["b"])
    for method in (RTN(bits=8, accuracy_level=0), RTN(bits=8, format="qdq"), DynamicInt8()):
        quantize_base(out.model_path, tmp_path / "q.onnx", method=method)
        session = AdapterSession(tmp_path / "q.onnx", adapters={"b": built.adapters["b"]})
        got = session.run(None, built.feeds, adapter="b")
        assert np.abs(got[0] - built.expected["b"][0]).max() < 0.05


def test_an_adapter_without_a_name_stays_unless_the_layer_is_named(tmp_path):
    built = build("dy_llama_stripped")
    kept = quantize_base(built.model, tmp_path / "q.onnx")
    assert sum("perhaps an adapter's" in row.reason for row in kept.floats) == 28
    known = quantize_base(built.model, tmp_path / "known.onnx", adapter=built.adapters["a"])
    assert len(kept.rows) == len(known.rows) == known.adapters == 14
    out = extract_adapters(tmp_path / "q.onnx", tmp_path / "x", adapter=built.adapters["a"])
    assert len(out.sites) == 14


@pytest.mark.parametrize("name", ["ts_dora", "ts_loha"])
def test_a_base_that_its_adapter_is_woven_into_is_refused_with_the_reason(name, tmp_path):
    with pytest.raises(ModelError, match="extract the adapter, then quantize"):
        quantize_base(build(name).model, tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())


def test_a_head_that_was_trained_whole_is_the_adapters(tmp_path):
    built = build("ts_saved")
    done = quantize_base(built.model, tmp_path / "q.onnx", head=True)
    reasons = {row.module: row.reason for row in done.floats}
    assert any("saved adapter" in reason for reason in reasons.values())
    extracted = [
        extract_adapters(model, tmp_path / str(i)).adapter for i, model in enumerate((built.model, tmp_path / "q.onnx"))
    ]
    assert extracted[0] == extracted[1]


# -- Refused ----------------------------------------------------------------------------------------------------------


def test_weights_that_are_no_numbers_are_refused_and_nothing_is_written(tmp_path):
    broken = floats(32, 24)
    broken[3, 4] = np.nan
    with pytest.raises(ModelError, match="w: 1 of 768 weights are NaN"):
        quantize_base(proto("y = MatMul(x, w)", {"w": broken}), tmp_path / "q.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_quantized_already_says_so(tmp_path):
    with pytest.raises(ModelError, match=r"q_proj \(MatMulNBits\): its weight is in codes already"):
        quantize_base(build("ts_llama_int4").model, tmp_path / "q.onnx")


def test_the_model_itself_is_no_place_to_write(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(proto("y = MatMul(x, w)", {"w": floats(32, 24)}), path)
    before = path.read_bytes()
    with pytest.raises(ModelError, match="is the model itself"):
        quantize_base(path, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("feeds", "match"), [([], "needs calibration feeds"), ([{"z": floats(1, 2, 32)}], "feed 0")])
def test_static_needs_feeds_that_fit(feeds, match, tmp_path):
    with pytest.raises(FeedError, match=match):
        quantize_base(
            proto("y = MatMul(x, w)", {"w": floats(32, 24)}), tmp_path / "q.onnx", method="static", calibration=feeds
        )


def test_the_argument_is_never_changed(tmp_path):
    model = ir.from_proto(proto("y = MatMul(x, w)", {"w": floats(32, 24)}))
    before = ir.to_proto(model).SerializeToString()
    quantize_base(model, tmp_path / "q.onnx")
    assert ir.to_proto(model).SerializeToString() == before
