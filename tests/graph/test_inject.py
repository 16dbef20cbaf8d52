"""Injection: the very base without an adapter, PyTorch with any, and the same model that extraction makes."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import OptionError
from adapterx.graph.extract import extract_adapters
from adapterx.graph.inject import inject_adapters, injected
from adapterx.graph.sites import find_sites
from adapterx.manifest import manifest_of
from adapterx.runtime.session import AdapterSession
from tests.graph.base_models import (
    CONVOLUTIONS,
    D_IN,
    D_OUT,
    GEMMS,
    LINEARS,
    PICTURES,
    ROWS,
    C,
    W,
    floats,
    proto,
    two_layers,
)
from tests.zoo import CASES, build

WITH_BASE = [name for name, case in CASES.items() if case.with_base]
FLOAT_KINDS = ("ts_dora", "ts_ia3", "ts_lora_bias", "ts_bias", "ts_vera_mlp", "ts_loha", "dy_lokr", "ts_conv1d")


def run(model, feeds, *, optimized=True):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def assert_equal(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_near(got, want, atol, what):
    for one, other in zip(got, want, strict=True):
        error = np.abs(one.astype(np.float32) - other.astype(np.float32)).max(initial=0)
        assert error <= atol, f"{what}: {error:.1e} > {atol:.0e}"


# -- Laws, on real exports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WITH_BASE)
def test_an_injected_model_is_the_base_to_the_bit_and_pytorch_with_every_adapter(name, tmp_path):
    """Float, int4 (MatMulNBits, QDQ) and dynamic int8 bases; q, k and v fused in genai's, packed in Phi-3's."""
    built = build(name)
    out = inject_adapters(built.base_model, tmp_path, adapter=built.adapters["b"])
    assert_equal(run(out.model_path, built.feeds), run(built.base_model, built.feeds))
    session = AdapterSession(out.model_path)
    for adapter in ("a", "b", "c"):
        session.load_adapter(adapter, built.adapters[adapter])
        got = session.run(None, built.feeds, adapter=adapter)
        assert_near(got, built.expected[adapter], CASES[name].atol, f"{name} with {adapter}")


@pytest.mark.parametrize("name", FLOAT_KINDS)
def test_every_kind_of_adapter_is_put_on_a_base_that_never_had_one(name, tmp_path):
    built, case = build(name), CASES[name]
    twins = [n for n in WITH_BASE if (CASES[n].model, CASES[n].export) == (case.model, case.export)]
    base = build(twins[0]).base_model
    out = inject_adapters(base, tmp_path, adapter=built.adapters["b"])
    assert_equal(run(out.model_path, built.feeds), run(base, built.feeds))
    session = AdapterSession(out.model_path)
    for adapter in ("b", "c"):
        session.load_adapter(adapter, built.adapters[adapter])
        got = session.run(None, built.feeds, adapter=adapter)
        assert_near(got, built.expected[adapter], case.atol, f"{name} with {adapter}")


FIELDS = ("name", "kind", "op", "d_in", "d_out", "rank", "dtype", "kernel", "ports")


@pytest.mark.parametrize("name", ["ts_llama", "dy_llama", "ts_gpt2", "dy_mlp", "ts_llama_int4", "ts_conv"])
@pytest.mark.parametrize("how", ["input", "packed", "external", "fixed"])
def test_injection_equals_extraction(name, how, tmp_path):
    built = build(name)
    options = {
        "input": {"make_inputs": True},
        "packed": {"make_inputs": True, "pack_inputs": True},
        "external": {"make_inputs": False},
        "fixed": {"make_inputs": True, "dynamic_rank": False, "optional_inputs": False},
    }[how]
    extraction = extract_adapters(built.model, tmp_path / "extracted", **options)
    injection = inject_adapters(built.base_model, tmp_path / "injected", adapter=built.adapters["a"], **options)
    both = [onnx.load(one.model_path, load_external_data=False) for one in (extraction, injection)]
    names = [sorted(value.name for value in model.graph.input) for model in both]
    assert names[0] == names[1]
    manifests = [manifest_of({e.key: e.value for e in model.metadata_props}, where=how) for model in both]
    rows = [sorted(tuple(getattr(s, f) for f in FIELDS) for s in m.sites) for m in manifests]
    assert rows[0] == rows[1]
    for field in ("port", "dynamic_rank", "optional", "mask", "row_mask", "fingerprint", "required"):
        assert getattr(manifests[0], field) == getattr(manifests[1], field), field
    assert {p.name: p.sites for p in manifests[0].packs} == {p.name: p.sites for p in manifests[1].packs}
    adapter = "b" if how == "fixed" else "c"
    session = AdapterSession(injection.model_path, adapters={"it": built.adapters[adapter]})
    assert_near(session.run(None, built.feeds, adapter="it"), built.expected[adapter], CASES[name].atol, name)


@pytest.mark.parametrize("name", ["ts_gpt2", "ts_llama_int4", "ts_vit", "genai_llama"])
def test_rows_of_a_batch_can_have_an_adapter_each_at_every_linear_layer(name, tmp_path):
    """Also where rows are flattened in front of the operation: row 0 is masked out, the others are not."""
    built = build(name)
    model = built.base_model
    out = inject_adapters(model, tmp_path, targets="all-linear")
    rng = np.random.default_rng(0)
    adapter = {
        f"{site.name}.{side}.weight": 0.3 * rng.standard_normal((2, width)).astype(site.dtype)
        for site in out.sites
        for side, width in (("lora_A", site.d_in), ("lora_B", site.d_out))
    }
    rows = next(iter(built.feeds.values())).shape[0]
    mask = np.ones((rows, 2), np.float32)
    mask[0] = 0
    base, whole = run(model, built.feeds)[0], run(out.model_path, {**built.feeds, **adapter})[0]
    mixed = run(out.model_path, {**built.feeds, **adapter, "adapter_mask": mask})[0]
    np.testing.assert_allclose(mixed[0], base[0], atol=1e-4)
    np.testing.assert_allclose(mixed[1:], whole[1:], atol=1e-3)
    assert np.abs(whole[0] - base[0]).max() > 0.1


# -- Forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "tensors", "inputs"),
    [
        *((form[0], form[1], "float[n,t,32] x") for name, form in LINEARS.items() if name != "dynamic_fused"),
        *((form[0], form[1], ROWS) for form in GEMMS.values()),
    ],
)
def test_every_form_of_a_linear_layer_takes_an_adapter(body, tensors, inputs):
    model = proto(body, tensors, inputs=inputs, outputs=inputs.replace("32", "24").replace(" x", " y"),
                  names={"w": "model.fc.weight"})  # fmt: skip
    x = floats(3, 5, D_IN) if ",t," in inputs else floats(3, D_IN)
    change = LowRank(a=floats(2, D_IN), b=floats(2, D_OUT))
    graph, folder = injected(model, [Adapter({"model.fc": change})])
    assert folder is None
    base = run(model, {"x": x})
    assert_equal(run(graph, {"x": x}), base)
    fed = {"model.fc.lora_A.weight": change.a, "model.fc.lora_B.weight": change.b}
    # What the operation multiplies its product with was the model's around the layer, adapter included.
    factor = 0.5 if "alpha" in body else 1.0
    np.testing.assert_allclose(
        run(graph, {"x": x, **fed})[0], base[0] + factor * (x @ change.a.T) @ change.b, atol=2e-3
    )


@pytest.mark.parametrize("form", CONVOLUTIONS.values())
def test_every_form_of_a_convolution_takes_an_adapter(form):
    body, tensors, _ = form
    model = proto(body, tensors, inputs=PICTURES, outputs="float[n,24,h,w] y", names={"w": "conv.weight"})
    change = LowRank(a=floats(2, 6, 3, 3), b=floats(2, D_OUT))
    graph, _ = injected(model, [Adapter({"conv": change})])
    x = floats(2, 6, 8, 8)
    base = run(model, {"x": x})
    assert_equal(run(graph, {"x": x}), base)
    both = proto("l = Conv(x, a)\ny = Conv(l, b)", {"a": change.a, "b": change.b.T[:, :, None, None]}, inputs=PICTURES)
    delta = run(both, {"x": x})[0]
    fed = {"conv.lora_A.weight": change.a, "conv.lora_B.weight": change.b}
    np.testing.assert_allclose(run(graph, {"x": x, **fed})[0], base[0] + delta, atol=2e-3)


@pytest.mark.parametrize("activation", ["Relu", "Tanh", "LeakyRelu"])
def test_an_activation_that_was_fused_into_the_operation_comes_after_the_adapter(activation):
    extra = ", activation_alpha=0.3" if activation == "LeakyRelu" else ""
    body = f'y = com.microsoft.FusedGemm<activation="{activation}"{extra}>(x, w, c)\nz = MatMul(y, v)'
    names = {"w": "fc1.weight", "v": "fc2.weight"}
    model = proto(body, {"w": W, "c": C, "v": floats(D_OUT, 5)}, inputs=ROWS, outputs="float[n,5] z", names=names)
    change = {"fc1": LowRank(a=floats(2, D_IN), b=floats(2, D_OUT)), "fc2": LowRank(a=floats(3, D_OUT), b=floats(3, 5))}
    graph, _ = injected(model, [Adapter(change)])
    x = floats(4, D_IN)
    assert_equal(run(graph, {"x": x}), run(model, {"x": x}))
    total = x @ W + C + (x @ change["fc1"].a.T) @ change["fc1"].b
    y = {"Relu": np.maximum(total, 0), "Tanh": np.tanh(total), "LeakyRelu": np.where(total < 0, 0.3 * total, total)}
    y = y[activation]
    want = y @ floats(D_OUT, 5) + (y @ change["fc2"].a.T) @ change["fc2"].b
    fed = {f"{n}.lora_{s.upper()}.weight": getattr(one, s) for n, one in change.items() for s in "ab"}
    np.testing.assert_allclose(run(graph, {"x": x, **fed})[0], want, atol=1e-3)


def test_a_module_that_is_called_twice_has_one_port_for_both_calls():
    body = "a = MatMul(x, w)\nb = Relu(a)\ny = MatMul(b, w)"
    paths = {"a": "/block/MatMul", "y": "/block_1/MatMul"}
    weight = floats(D_IN, D_IN)
    model = proto(body, {"w": weight}, outputs="float[n,t,32] y", names=paths)
    change = LowRank(a=floats(2, D_IN), b=0.1 * floats(2, D_IN))
    graph, _ = injected(model, [Adapter({"block": change})])
    onnx.checker.check_model(graph)
    x, adapted = floats(2, 3, D_IN), weight + change.a.T @ change.b
    assert_equal(run(graph, {"x": x}), run(model, {"x": x}))
    fed = {"block.lora_A.weight": change.a, "block.lora_B.weight": change.b}
    want = np.maximum(x @ adapted, 0) @ adapted
    np.testing.assert_allclose(run(graph, {"x": x, **fed})[0], want, rtol=1e-4, atol=1e-2)


def test_layers_that_follow_each_other_directly_read_what_the_adapter_before_them_made():
    model = proto("h = MatMul(x, w)\ny = MatMul(h, v)", {"w": W, "v": floats(D_OUT, 7)}, outputs="float[n,t,7] y",
                  names={"w": "fc1.weight", "v": "fc2.weight"})  # fmt: skip
    change = {"fc1": LowRank(a=floats(2, D_IN), b=floats(2, D_OUT)), "fc2": LowRank(a=floats(3, D_OUT), b=floats(3, 7))}
    graph, _ = injected(model, [Adapter(change)])
    x = floats(2, 3, D_IN)
    fed = {f"{n}.lora_{s.upper()}.weight": getattr(one, s) for n, one in change.items() for s in "ab"}
    adapted = [w + change[n].a.T @ change[n].b for n, w in (("fc1", W), ("fc2", floats(D_OUT, 7)))]
    np.testing.assert_allclose(run(graph, {"x": x, **fed})[0], x @ adapted[0] @ adapted[1], rtol=1e-4, atol=1e-2)


def test_rows_that_lie_flattened_only_are_folded_back_for_the_adapter():
    """Optimizers merge ``[n, heads, t, d] -> [n, t, d] -> [n * t, d]`` into one Reshape."""
    body = "s = Transpose<perm=[0,2,1,3]>(x)\nr = Reshape(s, flat)\nm = Gemm(r, w, c)\ny = Reshape(m, whole)"
    tensors = {"w": W, "c": C, "flat": np.array([-1, D_IN]), "whole": np.array([-1, 5, D_OUT])}
    model = proto(body, tensors, inputs="float[n,4,5,8] x", outputs="float[n,5,24] y", names={"w": "fc.weight"})
    change = LowRank(a=floats(2, D_IN), b=floats(2, D_OUT))
    graph, _ = injected(model, [Adapter({"fc": change})])
    x = floats(3, 4, 5, 8)
    base = run(model, {"x": x})
    assert_equal(run(graph, {"x": x}), base)
    mask = np.array([[0, 0], [1, 1], [2, 2]], np.float32)
    fed = {"fc.lora_A.weight": change.a, "fc.lora_B.weight": change.b, "adapter_mask": mask}
    delta = (x.transpose(0, 2, 1, 3).reshape(3, 5, D_IN) @ change.a.T) @ change.b
    np.testing.assert_allclose(run(graph, {"x": x, **fed})[0], base[0] + np.arange(3)[:, None, None] * delta, atol=1e-3)


def test_rows_that_were_flattened_are_scaled_before_that():
    """(IA)3 on the feed-forward layers of GPT-2."""
    body = "r = Reshape(x, rows)\ng = Gemm(r, w, c)\ny = Reshape(g, whole)"
    tensors = {"w": W, "c": C, "rows": np.array([-1, D_IN]), "whole": np.array([2, -1, D_OUT])}
    model = proto(body, tensors, inputs="float[2,t,32] x", outputs="float[2,t,24] y", names={"w": "fc.weight"})
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("y", 1, [2, "t", D_OUT]))
    gain = floats(1, D_IN)
    change = LowRank(a=np.zeros((0, D_IN), np.float32), b=np.zeros((0, D_OUT), np.float32), parts={"input_gain": gain})
    graph, _ = injected(model, [Adapter({"fc": change})])
    x = floats(2, 3, D_IN)
    np.testing.assert_allclose(
        run(graph, {"x": x, "fc.input_gain.weight": gain})[0], (x * (1 + gain)) @ W + C, rtol=1e-4, atol=1e-4
    )


def test_a_half_precision_base_is_fed_half_precision_adapters(tmp_path):
    inputs, outputs = "float16[n,t,32] x", "float16[n,t,24] y"
    model = proto("y = MatMul(x, w)", {"w": W.astype(np.float16)}, inputs=inputs, outputs=outputs,
                  names={"w": "fc.weight"})  # fmt: skip
    out = inject_adapters(model, tmp_path, targets="fc")
    assert [site.dtype for site in out.sites] == ["float16"]
    x = floats(2, 3, D_IN).astype(np.float16)
    assert_equal(run(out.model_path, {"x": x}), run(model, {"x": x}))
    change = LowRank(a=floats(2, D_IN), b=floats(2, D_OUT))
    session = AdapterSession(out.model_path, adapters={"it": Adapter({"fc": change})})
    want = x.astype(np.float32) @ (W + change.a.T @ change.b)
    np.testing.assert_allclose(session.run(None, {"x": x}, adapter="it")[0], want, rtol=2e-2, atol=0.5)


# -- Options ----------------------------------------------------------------------------------------------------------


def test_what_is_injected_is_found_again_as_sites(tmp_path):
    out = inject_adapters(two_layers(), tmp_path, targets=["fc1", re.compile(".*fc2")])
    assert [(s.name, s.d_in, s.d_out) for s in find_sites(out.model_path)] == [
        ("model.fc1", D_IN, D_OUT),
        ("model.fc2", D_OUT, 7),
    ]


@pytest.mark.parametrize(
    ("kinds", "first", "second"),
    [
        (["lora"], ("lora_A", "lora_B"), ("lora_A", "lora_B")),
        (["loha"], ("lora_A", "lora_B"), ("lora_A", "lora_B")),
        # Only a bias can be shifted by what is multiplied into it.
        (["dora"], ("lora_A", "lora_B", "gain", "shift"), ("lora_A", "lora_B", "gain")),
        (["ia3"], ("gain", "input_gain"), ("gain", "input_gain")),
        (["bias"], ("shift",), ("shift",)),
        (["lora", "ia3"], ("lora_A", "lora_B", "gain", "input_gain"), ("lora_A", "lora_B", "gain", "input_gain")),
    ],
)
def test_ports_are_those_of_the_kinds_that_shall_fit(kinds, first, second, tmp_path):
    out = inject_adapters(two_layers(), tmp_path, targets="all-linear", kinds=kinds)
    assert [site.ports for site in out.sites] == [first, second]
    x = floats(2, 3, D_IN)
    assert_equal(run(out.model_path, {"x": x}), run(two_layers(), {"x": x}))
    bases = manifest_of({e.key: e.value for e in onnx.load(out.model_path).metadata_props}, where="it").bases
    assert ("model.fc1" in bases) == (kinds != ["lora"] and kinds != ["loha"])


def test_several_adapters_get_the_ports_that_they_need_together():
    parts = {"gain": np.zeros((1, D_OUT), np.float32)}
    low, vector = LowRank(a=floats(2, D_IN), b=floats(2, D_OUT)), LowRank.of_parts(parts)
    other = LowRank(a=floats(2, D_OUT), b=floats(2, 7))
    graph, _ = injected(two_layers(), [Adapter({"model.fc1": low}), Adapter({"fc1": vector, "fc2": other})])
    manifest = manifest_of({e.key: e.value for e in graph.metadata_props}, where="it")
    assert [(site.name, site.ports) for site in manifest.sites] == [
        ("model.fc1", ("lora_A", "lora_B", "gain")),
        ("model.fc2", ("lora_A", "lora_B")),
    ]


def test_a_rank_is_asked_for_where_ports_have_a_fixed_one(tmp_path):
    for options in ({"make_inputs": False}, {"dynamic_rank": False}):
        with pytest.raises(OptionError, match="give rank="):
            inject_adapters(two_layers(), tmp_path / "out", targets="fc1", **options)
        assert not (tmp_path / "out").exists()
    out = inject_adapters(two_layers(), tmp_path / "out", targets="fc1", dynamic_rank=False, rank=3)
    ports = onnx.load(out.model_path).graph.input[1:3]
    dims = [[dim.dim_value for dim in port.type.tensor_type.shape.dim] for port in ports]
    assert dims == [[3, D_IN], [3, D_OUT]]


def test_sites_have_the_adapters_names_where_a_prefix_makes_the_difference(tmp_path):
    change = LowRank(a=floats(2, D_IN), b=floats(2, D_OUT))
    for name in ("net.model.fc1", "fc1"):
        out = inject_adapters(two_layers(), tmp_path / name, adapter=Adapter({name: change}))
        assert out.sites.names == [name]


def test_the_argument_is_never_changed(tmp_path):
    model = two_layers()
    before = model.SerializeToString()
    inject_adapters(model, tmp_path, targets="all-linear")
    injected(model, [Adapter({"fc1": LowRank(a=floats(2, D_IN), b=floats(2, D_OUT))})])
    assert model.SerializeToString() == before


def test_external_data_stays_on_the_disk(tmp_path):
    source = tmp_path / "source" / "model.onnx"
    source.parent.mkdir()
    onnx.save(two_layers(), source, save_as_external_data=True, location="weights.bin", size_threshold=0)
    change = LowRank(a=floats(2, D_IN), b=floats(2, D_OUT))
    graph, folder = injected(source, [Adapter({"fc1": change})])
    assert folder == source.parent
    assert {e.value for t in graph.graph.initializer for e in t.external_data if e.key == "location"} == {"weights.bin"}
    out = inject_adapters(source, tmp_path / "out", targets="fc1")
    assert (tmp_path / "out" / "weights.bin").read_bytes() == (source.parent / "weights.bin").read_bytes()
    x = floats(2, 3, D_IN)
    assert_equal(run(out.model_path, {"x": x}), run(source, {"x": x}))
    session = AdapterSession(source, adapters={"it": Adapter({"fc1": change})}, kernels="off")
    fed = run(out.model_path, {"x": x, "model.fc1.lora_A.weight": change.a, "model.fc1.lora_B.weight": change.b})
    assert_near(session.run(None, {"x": x}, adapter="it"), fed, 1e-5, "in memory")
