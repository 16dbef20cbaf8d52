"""Joins that optimizers fuse: where the base and the delta meet inside another operator."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import ModelError, NoAdaptersFound
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites

D, R, OUT = 6, 2, 4
rng = np.random.default_rng(3)
WEIGHTS = {
    "W": rng.standard_normal((D, OUT)),
    "A": rng.standard_normal((D, R)),
    "B": rng.standard_normal((R, OUT)),
    "gamma": rng.standard_normal(OUT),
    "beta": rng.standard_normal(OUT),
    "bias": rng.standard_normal(OUT),
    "s": np.array(2.0),
}
WEIGHTS = {name: array.astype(np.float32) for name, array in WEIGHTS.items()}
SHAPES = {"rows": np.array([-1, D], np.int64), "folded": np.array([2, 3, OUT], np.int64)}
NAMES = {"A": "base_model.model.fc.lora_A.default.weight", "B": "base_model.model.fc.lora_B.default.weight"}


def model(body, x="N, 6", y="N, 4", names=None):
    """A model with one layer ``fc``, whose body is ONNX text over W, A, B, gamma, beta, bias, s."""
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n'
        f"g (float[{x}] x) => (float[{y}] y) {{\n{body}\n}}"
    )
    names = NAMES if names is None else names
    used = {name for node in proto.graph.node for name in node.input}
    for name, array in (WEIGHTS | SHAPES).items():
        if name in used:
            proto.graph.initializer.append(numpy_helper.from_array(array, names.get(name, name)))
    for i, node in enumerate(proto.graph.node):
        node.name = node.name or f"n{i}"
        node.input[:] = [names.get(name, name) for name in node.input]
    return proto


def run(model, feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model, options).run(None, feeds)[0]


def other_adapter(rank=3):
    other = np.random.default_rng(5)
    return other.standard_normal((rank, D)).astype(np.float32), other.standard_normal((rank, OUT)).astype(np.float32)


def assert_swaps(proto, tmp_path, shape, wrap):
    """A different adapter, of another rank, gives ``wrap(base + delta)``; none gives ``wrap(base)``."""
    out = extract_adapters(proto, tmp_path, make_inputs=True)
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    base = x @ WEIGHTS["W"]
    exported = base + 2 * (x @ WEIGHTS["A"] @ WEIGHTS["B"])
    np.testing.assert_allclose(run(proto.SerializeToString(), {"x": x}), wrap(exported), atol=1e-4)
    np.testing.assert_allclose(run(str(out.model_path), {"x": x}), wrap(base), atol=1e-4)
    a, b = other_adapter()
    feeds = {"x": x, "fc.lora_A.weight": a, "fc.lora_B.weight": b}
    np.testing.assert_allclose(run(str(out.model_path), feeds), wrap(base + x @ a.T @ b), atol=1e-4)


def norm(value):
    centred = value - value.mean(-1, keepdims=True)
    return centred / np.sqrt(value.var(-1, keepdims=True) + 1e-5) * WEIGHTS["gamma"] + WEIGHTS["beta"]


def relu(value):
    return np.maximum(value, 0)


BRANCH = "b = MatMul(x, W)\n l = MatMul(x, A)\n z = MatMul(l, B)\n d = Mul(z, s)\n"
FUSED_NORM = "y = com.microsoft.SkipLayerNormalization<epsilon=1e-5>"


@pytest.mark.parametrize("operands", ["b, d", "d, b"])
def test_a_delta_that_meets_its_base_inside_a_fused_norm_can_be_swapped(tmp_path, operands):
    proto = model(f"{BRANCH}{FUSED_NORM}({operands}, gamma, beta)", x="N, T, 6", y="N, T, 4")
    assert_swaps(proto, tmp_path, (2, 3, D), norm)


def test_the_bias_of_a_fused_norm_stays(tmp_path):
    proto = model(f"{BRANCH}{FUSED_NORM}(b, d, gamma, beta, bias)", x="N, T, 6", y="N, T, 4")
    assert_swaps(proto, tmp_path, (2, 3, D), lambda v: norm(v + WEIGHTS["bias"]))


def test_a_delta_that_is_the_addend_of_the_base_gemm_can_be_swapped(tmp_path):
    proto = model("l = Gemm(x, A)\n z = Gemm<alpha=2.0>(l, B)\n y = Gemm(x, W, z)")
    assert_swaps(proto, tmp_path, (3, D), lambda v: v)


def test_beta_of_the_base_gemm_belongs_to_the_scale(tmp_path):
    proto = model("l = Gemm(x, A)\n z = Gemm(l, B)\n y = Gemm<beta=2.0>(x, W, z)")
    assert find_sites(proto)[0].scale == 2.0
    assert_swaps(proto, tmp_path, (3, D), lambda v: v)


def test_the_activation_of_a_fused_gemm_comes_after_the_sum(tmp_path):
    proto = model(
        'l = Gemm(x, A)\n z = Gemm<alpha=2.0>(l, B)\n y = com.microsoft.FusedGemm<activation="Relu">(x, W, z)'
    )
    assert_swaps(proto, tmp_path, (3, D), relu)


def test_a_base_that_is_the_addend_of_b_can_be_swapped(tmp_path):
    proto = model("b = Gemm(x, W)\n l = Gemm(x, A)\n y = Gemm<alpha=2.0>(l, B, b)")
    assert_swaps(proto, tmp_path, (3, D), lambda v: v)


def test_rows_that_are_flattened_for_the_branch_and_folded_back_can_be_swapped(tmp_path):
    body = (
        "b = MatMul(x, W)\n f = Reshape(x, rows)\n l = Gemm(f, A)\n z = Gemm<alpha=2.0>(l, B)\n"
        " d = Reshape(z, folded)\n y = Add(b, d)"
    )
    assert_swaps(model(body, x="2, 3, 6", y="2, 3, 4"), tmp_path, (2, 3, D), lambda v: v)


def test_rows_that_stay_flattened_up_to_the_join_can_be_swapped(tmp_path):
    body = (
        "f = Reshape(x, rows)\n b = Gemm(f, W)\n l = Gemm(f, A)\n z = Gemm<alpha=2.0>(l, B)\n"
        " t = Add(b, z)\n y = Reshape(t, folded)"
    )
    assert_swaps(model(body, x="2, 3, 6", y="2, 3, 4"), tmp_path, (2, 3, D), lambda v: v)


def test_a_row_without_a_batch_axis_keeps_its_shape(tmp_path):
    proto = model(BRANCH + "y = Add(b, d)", x="6", y="4")
    assert_swaps(proto, tmp_path, (D,), lambda v: v)


def test_an_adapter_in_double_precision_is_refused_before_anything_is_written(tmp_path):
    proto = model(BRANCH + "y = Add(b, d)")
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    with pytest.raises(ModelError, match="export in float32"):
        extract_adapters(proto, tmp_path / "out", make_inputs=True)
    assert not (tmp_path / "out").exists()


def test_a_branch_scaled_by_a_vector_that_is_not_veras_is_refused(tmp_path):
    """Whose vector it is, the base's or the adapter's, nothing tells: another adapter of LoRA would come without."""
    proto = model("b = MatMul(x, W)\n l = MatMul(x, A)\n z = MatMul(l, B)\n d = Mul(z, gamma)\n y = Add(b, d)")
    with pytest.raises(NoAdaptersFound, match=r"lora_A\.default"):
        extract_adapters(proto, tmp_path / "out", make_inputs=True)


def test_a_low_rank_base_is_not_an_adapter_unless_asked_for():
    proto = model(BRANCH + "y = Add(b, d)", names={})
    with pytest.raises(NoAdaptersFound, match="1 low-rank branches have the structure"):
        find_sites(proto)
    assert find_sites(proto, structural=True).names == ["structural.0"]


def test_names_that_contradict_each_other_are_an_error():
    names = {"A": "base_model.model.fc.lora_A.default.weight", "B": "base_model.model.head.lora_B.default.weight"}
    proto = model(BRANCH + "y = Add(b, d)", names=names)
    with pytest.raises(ModelError, match=r"'fc' by its initializer but 'head'"):
        find_sites(proto)
    exported = Adapter({"head": LowRank(a=WEIGHTS["A"].T.copy(), b=2 * WEIGHTS["B"])})
    assert find_sites(proto, adapter=exported).names == ["head"], "its values decide"


def test_a_constant_that_others_use_too_is_left_alone(tmp_path):
    proto = model(BRANCH + "t = Add(b, d)\n y = Pow(t, s)")
    out = extract_adapters(proto, tmp_path, make_inputs=True)
    x = np.random.default_rng(1).standard_normal((3, D)).astype(np.float32)
    np.testing.assert_allclose(run(str(out.model_path), {"x": x}), (x @ WEIGHTS["W"]) ** 2, atol=1e-4)
