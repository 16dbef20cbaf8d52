"""What stays of the node where base and delta met, and what goes with the branch."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from adapterx.errors import ModelError
from adapterx.graph.extract import extract_adapters
from tests.graph.test_joins import FUSED_NORM, OUT, WEIGHTS, D, assert_swaps, model, run

LOW = "l = MatMul(x, A)\n z = MatMul(l, B)\n d = Mul(z, s)\n"
BRANCH = f"b = MatMul(x, W)\n {LOW}"
GEMMS = "l = Gemm(x, A)\n z = Gemm<alpha=2.0>(l, B)\n "


def rows():
    return np.random.default_rng(1).standard_normal((3, D)).astype(np.float32)


def without_adapter(proto, folder, x):
    return run(str(extract_adapters(proto, folder, make_inputs=True).model_path), {"x": x})


def test_the_join_hands_its_name_and_metadata_on(tmp_path):
    proto = model(f"{BRANCH} y = Add(b, d)")
    proto.graph.node[-1].name = "the join"
    proto.graph.node[-1].metadata_props.add(key="scope", value="fc")
    written = onnx.load(extract_adapters(proto, tmp_path, make_inputs=True).model_path).graph.node[-1]
    assert (written.op_type, written.name) == ("LowRankAdd", "the join")
    assert [(entry.key, entry.value) for entry in written.metadata_props] == [("scope", "fc")]


def test_alpha_and_transposition_of_the_base_gemm_stay(tmp_path, monkeypatch):
    monkeypatch.setitem(WEIGHTS, "turned", WEIGHTS["W"].T)
    got = without_adapter(model(f"{GEMMS} y = Gemm<alpha=0.5, transB=1>(x, turned, z)"), tmp_path, rows())
    np.testing.assert_allclose(got, 0.5 * rows() @ WEIGHTS["W"], atol=1e-4)


ACTIVATIONS = {
    "Relu": ("", lambda v: np.maximum(v, 0)),
    "LeakyRelu": (", activation_alpha=0.3", lambda v: np.where(v < 0, 0.3 * v, v)),
    "HardSigmoid": (", activation_alpha=0.1, activation_beta=0.4", lambda v: np.clip(0.1 * v + 0.4, 0, 1)),
    "Tanh": (", activation_alpha=0.3", np.tanh),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_fused_activation_keeps_its_own_parameters(tmp_path, name):
    parameters, wrap = ACTIVATIONS[name]
    body = f'{GEMMS} y = com.microsoft.FusedGemm<activation="{name}"{parameters}>(x, W, z)'
    got = without_adapter(model(body), tmp_path, rows())
    np.testing.assert_allclose(got, wrap(rows() @ WEIGHTS["W"]), atol=1e-4)


@pytest.mark.parametrize("activation", ['"Softplus"', '"Relu", activation_gamma=1.0'])
def test_an_activation_that_cannot_be_taken_apart_is_refused(tmp_path, activation):
    proto = model(f"{GEMMS} y = com.microsoft.FusedGemm<activation={activation}>(x, W, z)")
    with pytest.raises(ModelError, match="cannot be taken apart"):
        extract_adapters(proto, tmp_path / "out", make_inputs=True)
    assert not (tmp_path / "out").exists()


def test_the_epsilon_of_a_fused_norm_stays(tmp_path):
    def norm(value):
        centred = value - value.mean(-1, keepdims=True)
        return centred / np.sqrt(value.var(-1, keepdims=True) + 0.5) * WEIGHTS["gamma"] + WEIGHTS["beta"]

    body = f"{BRANCH}{FUSED_NORM.replace('1e-5', '0.5')}(b, d, gamma, beta)"
    assert_swaps(model(body, x="N, T, 6", y="N, T, 4"), tmp_path, (2, 3, D), norm)


def test_the_bias_of_a_simplified_norm_stays(tmp_path):
    def norm(value):
        value = value + WEIGHTS["bias"]
        return value / np.sqrt((value**2).mean(-1, keepdims=True) + 1e-5) * WEIGHTS["gamma"]

    fused = "y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=1e-5>(b, d, gamma, bias)"
    assert_swaps(model(BRANCH + fused, x="N, T, 6", y="N, T, 4"), tmp_path, (2, 3, D), norm)


def test_the_sum_that_a_fused_norm_hands_on_has_its_bias_and_the_adapter(tmp_path):
    fused = FUSED_NORM.replace("y =", "n, m, v, t =")
    proto = model(f"{BRANCH}{fused}(b, d, gamma, beta, bias)\n y = Identity(t)", x="N, T, 6", y="N, T, 4")
    assert_swaps(proto, tmp_path, (2, 3, D), lambda value: value + WEIGHTS["bias"])


def test_a_fused_norm_whose_statistics_are_used_is_refused(tmp_path):
    fused = FUSED_NORM.replace("y =", "n, m, v, t =")
    proto = model(f"{BRANCH}{fused}(b, d, gamma, beta)\n y = Add(n, m)", x="N, T, 6", y="N, T, 4")
    with pytest.raises(ModelError, match="statistics are used"):
        extract_adapters(proto, tmp_path / "out", make_inputs=True)


def test_what_the_branch_computed_and_others_read_stays(tmp_path):
    proto = model(f"{BRANCH} y = Add(b, d)")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("l", 1, ["N", 2]))
    written = onnx.load(extract_adapters(proto, tmp_path, make_inputs=True).model_path)
    assert [value.name for value in written.graph.output] == ["y", "l"]
    assert "l" in {name for node in written.graph.node for name in node.output}


def test_weights_that_were_inputs_too_are_inputs_no_more(tmp_path):
    proto = model(f"{BRANCH} y = Add(b, d)")
    for tensor in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, 1, tensor.dims))
    written = onnx.load(extract_adapters(proto, tmp_path, make_inputs=True).model_path)
    ports = ["fc.lora_A.weight", "fc.lora_B.weight", "adapter_mask"]
    assert [value.name for value in written.graph.input] == ["x", "W", *ports]


def test_nothing_of_the_branch_is_left(tmp_path):
    body = f"b = MatMul(x, W)\n t = Transpose(A)\n u = Transpose(t)\n {LOW.replace('A', 'u')} y = Add(b, d)"
    written = onnx.load(extract_adapters(model(body), tmp_path, make_inputs=True).model_path)
    assert [node.op_type for node in written.graph.node] == ["MatMul", "LowRankAdd"]
    assert [t.name for t in written.graph.initializer if t.name in {"s", *WEIGHTS}] == ["W"]


def test_a_module_that_is_called_twice_gets_one_pair_of_ports_and_reads_it_twice(tmp_path):
    twice = (
        "b = MatMul(x, W)\n l = MatMul(x, A)\n z = MatMul(l, B)\n p = Add(b, z)\n"
        " n = Neg(x)\n c = MatMul(n, W)\n m = MatMul(n, A)\n w = MatMul(m, B)\n q = Add(c, w)\n y = Sub(p, q)"
    )
    out = extract_adapters(model(twice), tmp_path, make_inputs=True)
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal((3, d)).astype(np.float32) for d in (D, OUT))
    got = run(str(out.model_path), {"x": rows(), "fc.lora_A.weight": a, "fc.lora_B.weight": b})
    np.testing.assert_allclose(got, 2 * (rows() @ WEIGHTS["W"] + rows() @ a.T @ b), atol=1e-3)
    assert numpy_helper.to_array(onnx.load(out.model_path).graph.initializer[0]).shape == (D, OUT)


def test_every_call_of_a_module_whose_adapter_has_a_bias_has_nodes_of_its_own(tmp_path):
    twice = (
        "b = MatMul(x, W)\n l = MatMul(x, A)\n z = MatMul(l, B)\n e = Add(z, bias)\n p = Add(b, e)\n n = Neg(x)\n"
        " c = MatMul(n, W)\n m = MatMul(n, A)\n w = MatMul(m, B)\n f = Add(w, bias)\n q = Add(c, f)\n y = Add(p, q)"
    )
    out = extract_adapters(model(twice), tmp_path, make_inputs=True)
    onnx.checker.check_model(onnx.load(out.model_path))
    shift = np.arange(OUT, dtype=np.float32)[None]
    got = run(str(out.model_path), {"x": rows(), "fc.shift.weight": shift})
    np.testing.assert_allclose(got, np.broadcast_to(2 * shift, got.shape), atol=1e-4)
