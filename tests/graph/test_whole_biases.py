"""Biases that were trained in full: known from the exported adapter alone, wherever the graph adds them."""

import numpy as np
import pytest

from adapterx.adapter import SHIFT, WHOLE_BIAS, Adapter, LowRank
from adapterx.errors import FeedError, ModelError
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.runtime.session import AdapterSession
from tests.graph.base_models import proto
from tests.zoo.proof import run_ort

D = 6
X = np.random.default_rng(0).standard_normal((2, 3, D)).astype(np.float32)
LORA = "m = MatMul(x, w)\n b = Add(m, c)\n l = MatMul(x, a)\n z = MatMul(l, p)\n h = Add(b, z)\n"
BODY = f"{LORA}n = MatMul(h, v)\n y = Add(n, e)"
ROOT = "m.base_model.model"
NAMES = {
    "c": f"{ROOT}.fc.base_layer.bias", "a": f"{ROOT}.fc.lora_A.style.weight", "p": f"{ROOT}.fc.lora_B.style.weight",
    "e": f"{ROOT}.head.bias", "g": f"{ROOT}.norm.bias",
}  # fmt: skip


def weights(seed, rank=2):
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(9)
    made = {"w": fixed.standard_normal((D, D)), "v": fixed.standard_normal((D, D)), "k": fixed.standard_normal(D)}
    made |= {"a": rng.standard_normal((D, rank)), "p": rng.standard_normal((rank, D))}
    made |= {"c": rng.standard_normal(D), "e": rng.standard_normal(D), "g": rng.standard_normal(D)}
    return {name: array.astype(np.float32) for name, array in made.items()} | {"rows": np.array([-1, D])}


def model(tensors, body=BODY):
    used = {name: array for name, array in tensors.items() if f"{name})" in body or f"{name}," in body}
    return proto(body, used, inputs="float[n,t,6] x", outputs="float[n,t,6] y", names=NAMES)


def adapter_of(tensors, **biases):
    """The low-rank site, and biases by their site: the name of the tensor."""
    fc = LowRank(a=tensors["a"].T, b=tensors["p"])
    sites = {site: LowRank.of_parts({WHOLE_BIAS: tensors[name][None]}) for site, name in biases.items()}
    if "fc" in sites:
        sites["fc"] = LowRank(a=fc.a, b=fc.b, parts=sites["fc"].parts)
    return Adapter({"fc": fc, **sites})


def assert_extracted(tmp_path, body=BODY, **biases):
    """The extracted model is the graph that would have been exported with another adapter and its biases."""
    tensors = weights(1)
    out = extract_adapters(model(tensors, body), tmp_path, make_inputs=True, adapter=adapter_of(tensors, **biases))
    other = weights(1) | {name: weights(2, 4)[name] for name in ("a", "p", *biases.values())}
    session = AdapterSession(out.model_path, adapters={"own": out.adapter, "other": adapter_of(other, **biases)})
    for name, given in (("own", tensors), ("other", other)):
        want = run_ort(model(given, body).SerializeToString(), {"x": X})[0]
        np.testing.assert_allclose(session.run(None, {"x": X}, adapter=name)[0], want, rtol=1e-4, atol=1e-4)
    with pytest.raises(FeedError, match="no base to run"):
        session.run(None, {"x": X})
    return out


def test_the_bias_of_an_adapted_layer_becomes_its_shift(tmp_path):
    out = assert_extracted(tmp_path, fc="c")
    assert [(site.name, site.kind, site.ports) for site in out.sites] == [("fc", "bias", ("lora_A", "lora_B", SHIFT))]


def test_a_bias_inside_a_gemm_is_taken_out_of_it(tmp_path):
    flat = "f = Reshape(x, rows)\n b = Gemm(f, w, c)\n l = MatMul(f, a)\n z = MatMul(l, p)\n s = Add(b, z)\n"
    assert_extracted(tmp_path, f"{flat}u = Shape(x)\n h = Reshape(s, u)\n n = MatMul(h, v)\n y = Add(n, e)", fc="c")


def test_the_bias_of_a_layer_without_an_adapter_is_a_site_of_its_own(tmp_path):
    out = assert_extracted(tmp_path, fc="c", head="e")
    assert [(site.name, site.kind, site.ports) for site in out.sites][1:] == [("head", "bias", (SHIFT,))]


def test_a_bias_that_lost_its_name_is_told_by_its_values(monkeypatch, tmp_path):
    monkeypatch.setitem(NAMES, "e", "onnx::Add_7")
    assert assert_extracted(tmp_path, fc="c", head="e").sites.names == ["fc", "head"]


def test_a_bias_that_two_layers_share_is_taken_from_one_of_them(tmp_path):
    body = BODY.replace("Add(n, e)", "Add(n, c)")
    tensors = weights(1)
    out = extract_adapters(model(tensors, body), tmp_path, make_inputs=True, adapter=adapter_of(tensors, fc="c"))
    nothing = Adapter({"fc": LowRank.of_parts({SHIFT: np.zeros((1, D), np.float32)})})
    session = AdapterSession(out.model_path, adapters={"none": nothing})
    want = X @ tensors["w"] @ tensors["v"] + tensors["c"]
    np.testing.assert_allclose(session.run(None, {"x": X}, adapter="none")[0], want, rtol=1e-4, atol=1e-4)


def test_without_the_exported_adapter_biases_stay_in_the_base(tmp_path):
    tensors = weights(1)
    out = extract_adapters(model(tensors), tmp_path, make_inputs=True)
    assert [(site.kind, site.ports) for site in out.sites] == [("lora", ("lora_A", "lora_B"))]
    want = (X @ tensors["w"] + tensors["c"]) @ tensors["v"] + tensors["e"]
    np.testing.assert_allclose(AdapterSession(out.model_path).run(None, {"x": X})[0], want, rtol=1e-4, atol=1e-4)


def test_a_bias_of_what_is_no_layer_is_refused(tmp_path):
    body = f"{LORA}y = LayerNormalization(h, k, g)"
    tensors = weights(1)
    with pytest.raises(ModelError, match="biases of its own at norm, which are not added to a linear layer"):
        extract_adapters(model(tensors, body), tmp_path, make_inputs=True, adapter=adapter_of(tensors, norm="g"))


def test_a_bias_of_another_file_of_the_export_is_passed_over():
    tensors = weights(1)
    assert find_sites(model(tensors), adapter=adapter_of(tensors, **{"decoder.fc2": "g"})).names == ["fc"]
