"""LowRankAdd in every pair of element types: the function against numpy, on ONNX Runtime and onnx's evaluator."""

import itertools

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from adapterx.formats.quantized import int8_codes
from adapterx.ops import LOW_RANK_ADD, low_rank_add, low_rank_add_function

DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float64": np.float64,
    "int8": np.int8,
}
# Relative to the largest output. The function rounds after every product, the reference once.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
# ONNX Runtime's CPU provider multiplies no bfloat16; onnx's own evaluator does.
ACTIVATIONS = ("float32", "float16", "float64")
PAIRS = [(x, p) for x, p in itertools.product(ACTIVATIONS, DTYPES) if x != p and p != "float64"]


def feeds_of(activations, ports, *, rank=3):
    rng = np.random.default_rng(rank)
    shapes = {"base": (2, 5, 4), "x": (2, 5, 6), "a": (rank, 6), "b": (rank, 4), "mask": (2, 1, rank)}
    drawn = {name: rng.standard_normal(shape).astype(DTYPES[activations]) for name, shape in shapes.items()}
    if ports == "int8":
        (a, a_scale), (b, b_scale) = int8_codes(drawn["a"]), int8_codes(drawn["b"])
        return {**drawn, "a": a, "b": b, "scale": np.stack([a_scale, b_scale], axis=1)}
    return {name: array.astype(DTYPES[ports]) if name in {"a", "b"} else array for name, array in drawn.items()}


def model_of(function, feeds, opset):
    values = {
        name: onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    }
    node = onnx.helper.make_node(LOW_RANK_ADD, list(feeds), ["y"], domain="ai.adapterx")
    y = onnx.helper.make_tensor_value_info("y", values["x"].type.tensor_type.elem_type, feeds["base"].shape)
    graph = onnx.helper.make_graph([node], "g", list(values.values()), [y])
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("ai.adapterx", 1)]
    model = onnx.helper.make_model(graph, functions=[ir.to_proto(function)], opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def on_onnx_runtime(model, feeds):
    values = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), onnx.TensorProto.BFLOAT16)
        if array.dtype == ml_dtypes.bfloat16
        else array
        for name, array in feeds.items()
    }
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options).run(None, values)[0]


def on_the_evaluator(model, feeds):
    return ReferenceEvaluator(model).run(None, feeds)[0]


def variant(activations, ports, opset):
    return low_rank_add_function(
        opset, activations=ir.DataType.from_numpy(np.dtype(DTYPES[activations])), codes=ports == "int8"
    )


def assert_close(got, want, activations, ports):
    assert got.dtype == want.dtype == DTYPES[activations]
    error = np.abs(got.astype(np.float64) - want.astype(np.float64)).max()
    # The function multiplies codes with their float32 scales in float32, whatever it sums in.
    tolerance = max(TOLERANCE[activations], 1e-6 if ports == "int8" else 0.0)
    assert error <= tolerance * np.abs(want.astype(np.float64)).max()


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize(("activations", "ports"), PAIRS)
def test_ports_of_another_type_give_what_numpy_gives(activations, ports, opset):
    feeds = feeds_of(activations, ports)
    got = on_onnx_runtime(model_of(variant(activations, ports, opset), feeds, opset), feeds)
    assert_close(got, low_rank_add(*feeds.values()), activations, ports)


@pytest.mark.parametrize("ports", ["float32", "float16", "int8"])
def test_so_they_do_beside_bfloat16(ports):
    feeds = feeds_of("bfloat16", ports)
    got = on_the_evaluator(model_of(variant("bfloat16", ports, 18), feeds, 18), feeds)
    assert_close(got, low_rank_add(*feeds.values()), "bfloat16", ports)


@pytest.mark.parametrize(("activations", "ports"), PAIRS)
def test_of_no_rank_they_give_the_base_to_the_bit(activations, ports):
    feeds = feeds_of(activations, ports, rank=0)
    got = on_onnx_runtime(model_of(variant(activations, ports, 18), feeds, 18), feeds)
    np.testing.assert_array_equal(got, feeds["base"])


@pytest.mark.parametrize("ports", ["float16", "int8"])
@pytest.mark.parametrize("opset", [15, 21])
def test_one_function_serves_activations_of_two_types(ports, opset):
    function = low_rank_add_function(opset, activations=ir.DataType.UNDEFINED, codes=ports == "int8")
    for activations in ("float32", "float16"):
        feeds = feeds_of(activations, ports)
        assert_close(
            on_onnx_runtime(model_of(function, feeds, opset), feeds), low_rank_add(*feeds.values()), activations, ports
        )


def test_where_all_types_are_one_the_function_has_its_five_nodes():
    function = ir.to_proto(low_rank_add_function(18))
    assert list(function.input) == ["base", "x", "a", "b", "mask"]
    assert [(node.op_type, list(node.input), list(node.output)) for node in function.node] == [
        ("Transpose", ["a"], ["a_turned"]),
        ("MatMul", ["x", "a_turned"], ["low"]),
        ("Mul", ["low", "mask"], ["masked"]),
        ("MatMul", ["masked", "b"], ["delta"]),
        ("Add", ["base", "delta"], ["y"]),
    ]


def test_the_reference_sums_half_types_in_float32_and_rounds_once():
    # In float16, 2048 + 1 is 2048.
    x, a, b = np.ones((1, 2), np.float16), np.array([[2048, 1]], np.float16), np.ones((1, 1), np.float16)
    got = low_rank_add(np.array([[-2048]], np.float16), x, a, b)
    assert got.dtype == np.float16
    assert float(got[0, 0]) == 1
