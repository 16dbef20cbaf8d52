"""Which branches are low-rank branches beside a base, and which only look so."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx.reference
import onnx_ir as ir
import pytest

from adapterx.graph.branches import find_branches
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.runtime.session import AdapterSession
from tests.graph.test_joins import FUSED_NORM, WEIGHTS, model

LOW = "b = MatMul(x, W)\n l = MatMul(x, A)\n z = MatMul(l, B)\n"
TWO_INPUTS = "N, 6] other, float[N, 6"


def branches(body, **options):
    return find_branches(ir.from_proto(model(body, **options)))


@pytest.mark.parametrize(
    ("body", "scale"),
    [
        ("l = Gemm<alpha=2.0>(x, A)\n z = Gemm<alpha=3.0>(l, B)\n y = Add(b, z)", 6.0),
        ("l = MatMul(x, A)\n m = Mul(l, s)\n n = Mul(m, s)\n z = MatMul(n, B)\n y = Add(b, z)", 4.0),
        ("l = MatMul(x, A)\n z = MatMul(l, B)\n d = Mul(z, s)\n e = Mul(s, d)\n y = Add(b, e)", 4.0),
        ("l = MatMul(x, A)\n m = Mul(l, s)\n z = MatMul(m, B)\n d = Mul(z, s)\n y = Gemm<beta=0.5>(x, W, d)", 2.0),
    ],
)
def test_the_scale_is_the_product_of_all_factors_from_a_to_the_join(body, scale):
    (branch,) = branches(f"b = MatMul(x, W)\n {body}")
    assert branch.scale == scale


@pytest.mark.parametrize(
    "body",
    [
        f"{LOW} u = Neg(z)\n t = Add(b, z)\n y = Mul(t, u)",
        f"{LOW} t = Add(b, z)\n u = Neg(z)\n y = Mul(t, u)",
        f"{LOW} t = CastLike(b, z)\n y = Add(b, t)",
        f"{LOW} t = Neg(z)\n y = Add(b, t)",
        "b = Gemm(x, W)\n l = Gemm(x, A)\n y = Gemm<beta=0.5>(l, B, b)",
        f"{LOW}{FUSED_NORM}(b, b, z, beta)",
        "b = MatMul(x, W)\n l = Gemm(x, A, low_bias)\n z = Gemm(l, B)\n y = Add(b, z)",
        "b = MatMul(x, W)\n l = MatMul(x, A)\n r = Relu(l)\n z = MatMul(r, B)\n y = Add(b, z)",
    ],
    ids=["used before", "used again", "only its dtype", "through another operator", "a scaled base", "a norm's gamma",
         "a biased a", "not linear"],
)  # fmt: skip
def test_what_cannot_be_swapped_as_one_low_rank_sum_is_no_branch(body, monkeypatch):
    monkeypatch.setitem(WEIGHTS, "low_bias", WEIGHTS["gamma"][:2])
    assert branches(body) == []


def test_a_delta_that_is_an_output_of_the_model_is_no_branch():
    proto = model(f"{LOW} y = Add(b, z)")
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, ["N", 4]))
    assert find_branches(ir.from_proto(proto)) == []


def test_factors_whose_ranks_disagree_are_no_branch(monkeypatch):
    monkeypatch.setitem(WEIGHTS, "B", WEIGHTS["W"][:3])
    assert branches(f"{LOW} y = Add(b, z)") == []


@pytest.mark.parametrize(
    ("body", "factor"),
    [
        ("b = MatMul(x, W)\n l = Gemm(x, A)\n z = Gemm<alpha=2.0>(l, B, bias)\n y = Add(b, z)", 1),
        ("b = MatMul(x, W)\n l = Gemm(x, A)\n z = Gemm<alpha=2.0, beta=3.0>(l, B, bias)\n y = Add(b, z)", 3),
        (f"{LOW} q = Add(z, bias)\n d = Mul(q, s)\n y = Add(b, d)", 2),
        (f"{LOW} e = Mul(z, s)\n q = Add(bias, e)\n d = Mul(q, s)\n y = Add(b, d)", 2),
        (f"{LOW} q = Add(bias, z)\n y = Add(b, q)", 1),
    ],
)
def test_a_bias_behind_b_becomes_a_shift_times_the_factors_below_it(body, factor, tmp_path):
    assert branches(body)[0].bias.name == "bias"
    out = extract_adapters(model(body), tmp_path, make_inputs=True)
    assert out.sites[0].ports == ("lora_A", "lora_B", "shift")
    np.testing.assert_allclose(out.adapter.sites["fc"].parts["shift"][0], WEIGHTS["bias"] * factor)
    session = AdapterSession(out.model_path, adapters={"a": out.adapter})
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x}, adapter="a")[0], run_model(body, x), atol=1e-5)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ WEIGHTS["W"], atol=1e-5)


def run_model(body, x):
    return onnx.reference.ReferenceEvaluator(plain(model(body))).run(None, {"x": x})[0]


def plain(proto):
    """``proto`` without the domain that a reference evaluator does not know."""
    del proto.opset_import[1:]
    return proto


@pytest.mark.parametrize(
    ("body", "op"),
    [
        ("b = MatMul(x, W)\n c = Add(b, bias)\n i = Identity(c)\n j = Identity(i)\n y = Add(j, z)", "MatMul"),
        ("i = Identity(x)\n b = Gemm(i, W)\n y = Add(b, z)", "Gemm"),
        ("y = Gemm(x, W, z)", "Gemm"),
        ("y = Gemm(other, W, z)", "?"),
        ("b = MatMul(other, W)\n y = Add(b, z)", "?"),
        ("m = Mul(x, s)\n b = MatMul(m, W)\n y = Add(b, z)", "?"),
    ],
)
def test_the_base_operation_is_the_nearest_that_reads_what_the_branch_reads(body, op):
    proto = model(f"l = MatMul(x, A)\n z = MatMul(l, B)\n {body}", x=TWO_INPUTS)
    assert [site.op for site in find_sites(proto)] == [op]


def test_the_first_factor_of_another_adapter_at_the_same_place_is_not_the_base_operation(monkeypatch):
    monkeypatch.setitem(WEIGHTS, "A2", WEIGHTS["A"] + 1)
    monkeypatch.setitem(WEIGHTS, "B2", WEIGHTS["B"] + 1)
    body = (
        f"{LOW} c = Add(b, bias)\n j = Identity(c)\n one = Add(z, j)\n"
        " l2 = Gemm(x, A2)\n z2 = Gemm(l2, B2)\n y = Add(one, z2)"
    )
    first, second = branches(body)
    assert first.base_op is second.base_op
    assert second.base_op.outputs[0].name == "b"


def test_the_branch_is_fed_from_above_a_dropout_and_from_below_a_flattening_that_stays():
    body = "f = Reshape(x, rows)\n b = Gemm(f, W)\n d = Dropout(f)\n l = Gemm(d, A)\n z = Gemm(l, B)\n y = Add(b, z)"
    (branch,) = branches(body)
    assert branch.x.name == "f"
