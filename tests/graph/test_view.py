"""What a value or a node is behind the nodes that exporters and optimizers put around it."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from adapterx.graph.view import all_nodes, constant, linear, scalar, scaled, source, times

W = np.arange(12, dtype=np.float32).reshape(4, 3)
ARRAYS = {
    "W": W,
    "cube": np.zeros((2, 4, 3), np.float32),
    "two": np.array(2, np.float32),
    "three": np.array([3], np.float32),
    "none": np.array(0, np.float32),
    "row": np.ones(3, np.float32),
    "zeros": np.zeros(3, np.float32),
    "ratio": np.array(0.5, np.float32),
    "zero_point": np.array(0, np.uint8),
    "shape": np.array([-1, 4], np.int64),
}


def graph(body, x="float[N, 4] x"):
    """A model of ONNX text over ``x`` and ARRAYS, and its values by name."""
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1, "other" : 1]>\n'
        f"g ({x}) => (float[N, 3] y) {{\n{body}\n}}"
    )
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in ARRAYS.items())
    model = ir.from_proto(proto)
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    return model, values | {value.name: value for node in model.graph for value in node.outputs}


def value(body, name="v"):
    return graph(body)[1][name]


def only(body):
    """The last node of ``body`` as a Linear."""
    return linear(list(graph(body)[0].graph)[-1])


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("v = Identity(W)", (4, 3)),
        ("v = Transpose(W)", (3, 4)),
        ("v = Transpose<perm=[1, 0]>(W)", (3, 4)),
        ("t = Transpose(W)\n v = Transpose(t)", (4, 3)),
        ("c = Cast<to=10>(W)\n v = Transpose(c)", (3, 4)),
        ("v = CastLike(W, x)", (4, 3)),
    ],
)
def test_a_constant_is_seen_as_its_consumer_sees_it(body, shape):
    found = constant(value(body))
    assert found.shape == shape
    np.testing.assert_array_equal(found.numpy(), W if shape == W.shape else W.T)


@pytest.mark.parametrize("body", ["v = Transpose<perm=[0, 1]>(W)", "v = Neg(W)", "v = Add(W, x)", "v = Identity(x)"])
def test_what_changes_a_weight_or_depends_on_the_run_is_no_constant(body):
    assert constant(value(body)) is None


def test_the_dtype_of_a_constant_is_that_of_the_cast_nearest_to_its_consumer():
    assert constant(value("v = Cast<to=10>(W)")).dtype == ir.DataType.FLOAT16
    assert constant(value("h = Cast<to=10>(W)\n v = Cast<to=1>(h)")).dtype == ir.DataType.FLOAT


def test_a_number_may_lie_in_one_element_of_any_rank_and_in_no_more():
    assert scalar(value("v = Identity(two)")) == 2.0
    assert scalar(value("v = Identity(three)")) == 3.0
    assert scalar(value("v = Identity(row)")) is None


@pytest.mark.parametrize(
    "body",
    [
        "v = Identity(x)",
        "h = Cast<to=10>(x)\n v = Cast<to=1>(h)",
        "v = Dropout(x, ratio)",
        "v = CastLike(x, two)",
        "f = Reshape(x, shape)\n v = Flatten(f)",
        "q, s, z = DynamicQuantizeLinear(x)\n v = DequantizeLinear(q, s, z)",
        "q = com.microsoft.QuantizeLinear(x, two, zero_point)\n v = com.microsoft.DequantizeLinear(q, two, zero_point)",
    ],
)
def test_a_value_comes_from_where_its_rows_do(body):
    _, values = graph(body)
    assert source(values["v"]) is values["x"]


def test_second_outputs_and_other_operators_are_not_looked_through():
    _, values = graph("v, mask = Dropout(x, ratio)\n s = Neg(x)\n n = Cast<to=1>(mask)")
    assert source(values["n"]) is values["mask"]
    assert scaled(values["n"]) == (values["mask"], 1.0)
    assert source(values["s"]) is values["s"]


@pytest.mark.parametrize(
    ("body", "factor"),
    [
        ("v = Identity(x)", 1.0),
        ("v = Mul(x, two)", 2.0),
        ("v = Mul(three, x)", 3.0),
        ("v = Div(x, two)", 0.5),
        ("a = Mul(x, two)\n b = Cast<to=1>(a)\n c = Mul(three, b)\n v = Div(c, two)", 3.0),
        ("v = Div(x, none)", float("inf")),
    ],
)
def test_factors_on_the_way_are_multiplied(body, factor):
    _, values = graph(body)
    assert scaled(values["v"]) == (values["x"], factor)


@pytest.mark.parametrize("body", ["v = Div(two, x)", "v = Mul(x, row)", "v = Add(x, two)", "v = other.Mul(x, two)"])
def test_what_is_no_product_with_a_number_is_no_factor(body):
    assert times(value(body).producer()) is None


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("y = MatMul(x, W)", (4, 3)),
        ("y = Gemm(x, W)", (4, 3)),
        ("y = Gemm<transB=1>(x, W)", (3, 4)),
        ("y = com.microsoft.FusedMatMul(x, W)", (4, 3)),
        ("y = com.microsoft.TransposeMatMul<transB=1>(x, W)", (3, 4)),
        ('y = com.microsoft.FusedGemm<transB=1, activation="Relu">(x, W, row)', (3, 4)),
    ],
)
def test_a_product_with_a_constant_matrix_is_linear_whatever_operator_says_it(body, shape):
    found = only(body)
    assert (found.d_in, found.d_out) == found.matrix().shape == shape
    assert (found.factor, found.addend_factor) == (1.0, 1.0)


@pytest.mark.parametrize(
    "body",
    [
        "y = MatMul(x, x)",
        "y = MatMul(W, W)",
        "y = MatMul(x, cube)",
        "y = Gemm<transA=1>(x, W)",
        "y = com.microsoft.FusedMatMul<transBatchA=1>(x, W)",
        "y = com.microsoft.FusedMatMul<transBatchB=1>(x, W)",
        "y = other.MatMul(x, W)",
        "y = other.FusedMatMul(x, W)",
        "y = Add(x, two)",
    ],
)
def test_a_product_of_another_kind_is_not(body):
    assert only(body) is None


def test_alpha_beta_and_an_addend_that_is_not_zero_are_part_of_it():
    found = only("y = Gemm<alpha=2.0, beta=0.5>(x, W, row)")
    assert (found.factor, found.addend_factor, found.addend.name) == (2.0, 0.5, "row")
    assert only("y = Gemm(x, W, zeros)").addend is None


def test_nodes_inside_subgraphs_are_nodes_of_the_model():
    body = "y = If (c) <then_branch = g1 () => (float[N, 3] p) { p = MatMul(x, W) }, "
    body += "else_branch = g2 () => (float[N, 3] q) { q = Gemm(x, W) }>"
    model, _ = graph(body, x="float[N, 4] x, bool c")
    assert sorted(node.op_type for node in all_nodes(model)) == ["Gemm", "If", "MatMul"]
