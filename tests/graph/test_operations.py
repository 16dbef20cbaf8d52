"""What an operation multiplies with besides its weight is none of the module's: adapters are multiplied, too."""

import numpy as np
import onnxruntime as ort
import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import MismatchError
from adapterx.graph.extract import extract_adapters
from adapterx.graph.inject import inject_adapters
from adapterx.graph.merge import merge_adapter
from adapterx.graph.sites import find_sites
from adapterx.runtime.session import AdapterSession
from tests.graph.base_models import D_IN, D_OUT, W, floats, proto

FACTOR = 0.25
# ONNX Runtime's extended optimizations make the first of x * 0.25 before a layer and of y * 0.25 behind it.
SCALED = {
    "FusedMatMul": ("y = com.microsoft.FusedMatMul<alpha=0.25>(x, w)", W, "float[n,t,32] x"),
    "Gemm": ("y = Gemm<alpha=0.25, transB=1>(x, w)", np.ascontiguousarray(W.T), "float[n,32] x"),
}
NAMES = {"w": "fc.weight"}
CHANGES = {
    "lora": LowRank(a=floats(2, D_IN), b=floats(2, D_OUT)),
    "dora": LowRank(a=floats(2, D_IN), b=floats(2, D_OUT), parts={"magnitude": 1 + floats(1, D_OUT) ** 2}),
    "saved": LowRank(a=np.zeros((0, D_IN), np.float32), b=np.zeros((0, D_OUT), np.float32),
                     parts={"whole_weight": floats(D_OUT, D_IN)}),
}  # fmt: skip


def run(path, x):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def weight_with(kind):
    """As PEFT has it, ``[d_out, d_in]``: what the layer's own weight becomes."""
    change = CHANGES[kind]
    if kind == "saved":
        return change.parts["whole_weight"]
    whole = W.T + change.b.T @ change.a
    if kind == "lora":
        return whole
    return change.parts["magnitude"].T * whole / np.linalg.norm(whole, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("form", SCALED)
def test_an_adapter_beside_a_scaled_product_is_scaled_too(form, kind, tmp_path):
    body, weight, inputs = SCALED[form]
    outputs = inputs.replace("32", "24").replace(" x", " y")
    model = proto(body, {"w": weight}, inputs=inputs, outputs=outputs, names=NAMES)
    x = floats(2, 3, D_IN) if ",t," in inputs else floats(3, D_IN)
    want = FACTOR * x @ weight_with(kind).T
    adapter = Adapter({"fc": CHANGES[kind]})
    session = AdapterSession(inject_adapters(model, tmp_path, adapter=adapter).model_path, adapters={"one": adapter})
    np.testing.assert_allclose(session.run(None, {"x": x}, adapter="one")[0], want, atol=1e-4)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], session.run(None, {"x": x}, adapter=None)[0])
    np.testing.assert_allclose(session.run(None, {"x": x})[0], FACTOR * x @ W, atol=1e-4)
    merge_adapter(model, adapter, tmp_path / "merged.onnx")
    np.testing.assert_allclose(run(tmp_path / "merged.onnx", x), want, atol=1e-4)


def test_the_scale_of_an_adapter_beside_a_scaled_product_is_its_own(tmp_path):
    """x * 0.25 was fused into the base and into A: an adapter from its file must be told from what it reads."""
    tensors = {"w": W, "a": floats(D_IN, 2), "b": floats(2, D_OUT)}
    names = {**NAMES, "a": "fc.lora_A.default.weight", "b": "fc.lora_B.default.weight"}
    body = (
        "p = com.microsoft.FusedMatMul<alpha=0.25>(x, w)\nl = com.microsoft.FusedMatMul<alpha=0.25>(x, a)\n"
        "d = com.microsoft.FusedMatMul<alpha=3.0>(l, b)\ny = Add(p, d)"
    )
    model = proto(body, tensors, outputs="float[n,t,24] y", names=names)
    assert [site.scale for site in find_sites(model)] == [3.0]
    out = extract_adapters(model, tmp_path, make_inputs=True)
    np.testing.assert_allclose(out.adapter.sites["fc"].b, 3 * tensors["b"], rtol=1e-6)
    session, x = AdapterSession(out.model_path), floats(2, 3, D_IN)
    session.load_adapter("other", Adapter({"fc": CHANGES["lora"]}))
    want = FACTOR * x @ weight_with("lora").T
    np.testing.assert_allclose(session.run(None, {"x": x}, adapter="other")[0], want, atol=1e-4)


def test_a_shift_of_a_product_that_an_optimizer_scales_is_refused(tmp_path):
    """Whether the model scales before a bias or after it, nothing tells."""
    model = proto(SCALED["FusedMatMul"][0], {"w": W}, outputs="float[n,t,24] y", names=NAMES)
    change = LowRank(a=floats(2, D_IN), b=floats(2, D_OUT), parts={"shift": floats(1, D_OUT)})
    with pytest.raises(MismatchError, match="fc: an optimizer multiplies its result"):
        inject_adapters(model, tmp_path / "out", adapter=Adapter({"fc": change}))
    with pytest.raises(MismatchError, match="fc: it shifts the output, and an optimizer multiplies that"):
        merge_adapter(model, Adapter({"fc": change}), tmp_path / "out" / "merged.onnx")
    assert not (tmp_path / "out").exists()
