"""Models of one operation, in every form in which ONNX Runtime's tools store its weight."""

import logging

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from adapterx.graph.stored import base_weight_of, tensor_reader, weight_values

D_IN, D_OUT = 70, 24
FLOAT = TensorProto.FLOAT
logging.getLogger("onnxruntime").setLevel(logging.ERROR)
rng = np.random.default_rng(7)
weight = rng.normal(size=(D_IN, D_OUT)).astype(np.float32)
x = rng.normal(size=(5, D_IN)).astype(np.float32)
ids = np.array([3, 0, D_IN - 1])


def one_node(op, inputs, initializers, *, x_type=FLOAT, x_shape=("n", D_IN), before=(), domain="", **attributes):
    """A model of ``before`` and one node that makes y; ``initializers`` are arrays or TensorProtos by name."""
    tensors = [t if isinstance(t, onnx.TensorProto) else numpy_helper.from_array(t, n) for n, t in initializers.items()]
    node = helper.make_node(op, inputs, ["y"], domain=domain, **attributes)
    y_type = FLOAT if x_type == TensorProto.INT64 else x_type
    graph = helper.make_graph(
        [*before, node],
        "one",
        [helper.make_tensor_value_info("x", x_type, x_shape)],
        [helper.make_tensor_value_info("y", y_type, "nmhw"[: max(2, len(x_shape))])],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def matmul():
    return one_node("MatMul", ["x", "W"], {"W": weight})


def run(model, feed=x, dtype=np.float32):
    # Optimizations would quantize activations too (QDQ to MatMulNBits at accuracy level 4).
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    feed = feed if feed.dtype.kind == "i" else feed.astype(dtype)
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": feed})[0].astype(np.float32)


def stored(model):
    """The weight of the one operation that has any, and the reader of its tensors."""
    graph = ir.from_proto(model)
    found = [ref for node in graph.graph if (ref := base_weight_of(node)) is not None]
    assert len(found) == 1
    return found[0], tensor_reader(weight_values(graph))


def with_tensors(model, tensors):
    """``model`` with other content in some initializers."""
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in changed.graph.initializer:
        if tensor.name in tensors:
            array = tensors[tensor.name]
            four_bit = tensor.data_type in {TensorProto.INT4, TensorProto.UINT4}
            tensor.CopyFrom(
                helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, packed(array), raw=True)
                if four_bit
                else numpy_helper.from_array(array, tensor.name)
            )
    return changed


def packed(codes):
    flat = np.append(codes.astype(np.int8).reshape(-1), np.int8(0)).view(np.uint8) & 0xF
    return (flat[0:-1:2] | (flat[1::2] << 4)[: len(flat[0:-1:2])]).astype(np.uint8).tobytes()


def as_bytes(array):
    return array.astype(np.int8).tobytes() if array.dtype.name in {"int4", "uint4"} else array.tobytes()


# -- The forms ------------------------------------------------------------------------------------------------------


def n_bits(bits, symmetric, dtype=np.float32, quant_format=QuantFormat.QOperator, block_size=32, weight=weight):
    config = DefaultWeightOnlyQuantConfig(
        block_size=block_size, is_symmetric=symmetric, quant_format=quant_format, bits=bits
    )
    x_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    made = MatMulNBitsQuantizer(
        one_node("MatMul", ["x", "W"], {"W": weight.astype(dtype)}, x_type=x_type), algo_config=config
    )
    made.process()
    return made.model.model


def n_bits_float_zero():
    model = n_bits(4, symmetric=False)
    scale = next(t for t in model.graph.initializer if t.name == "W_scales")
    zero = rng.uniform(5, 9, numpy_helper.to_array(scale).shape).astype(np.float32)
    return with_tensors(model, {"W_zero_points": zero})


def bnb4(quant_type):
    made = MatMulBnb4Quantizer(matmul(), quant_type, 32)
    made.process()
    return made.model.model


def integer(tmp_path, **options):
    onnx.save(matmul(), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx", **options)
    return onnx.load(tmp_path / "int8.onnx")


def dequantized(dtype, axis, block_size=0, zero=True):
    """DequantizeLinear -> MatMul with random codes on random grids."""
    low, high = {"int8": (-128, 128), "uint8": (0, 256), "int4": (-8, 8), "uint4": (0, 16)}[dtype]
    codes = rng.integers(low, high, (D_IN, D_OUT))
    shape = () if axis is None else ((D_IN, D_OUT)[axis],)
    if block_size:
        shape = (-(-D_IN // block_size), D_OUT) if axis == 0 else (D_IN, -(-D_OUT // block_size))
    element = getattr(TensorProto, dtype.upper())
    tensors = {
        "W": helper.make_tensor("W", element, (D_IN, D_OUT), codes.reshape(-1)),
        "s": rng.uniform(0.01, 0.02, shape).astype(np.float32),
    }
    if zero:
        zeros = rng.integers(low, high, shape)
        tensors["z"] = helper.make_tensor("z", element, shape, np.reshape(zeros, -1))
    attributes = {} if axis is None else {"axis": axis}
    if block_size:
        attributes["block_size"] = block_size
    node = helper.make_node("DequantizeLinear", list(tensors), ["w"], **attributes)
    return one_node("MatMul", ["x", "w"], tensors, before=[node])


def transposed():
    node = helper.make_node("Transpose", ["W"], ["w"], perm=[1, 0])
    return one_node("MatMul", ["x", "w"], {"W": weight.T.copy()}, before=[node])


LINEAR = {
    "MatMul": lambda _: matmul(),
    "Transpose": lambda _: transposed(),
    "Gemm": lambda _: one_node("Gemm", ["x", "W"], {"W": weight.T.copy()}, transB=1),
    "FusedMatMul": lambda _: one_node("FusedMatMul", ["x", "W"], {"W": weight}, domain="com.microsoft"),
    "MatMulNBits 4 symmetric": lambda _: n_bits(4, True),
    "MatMulNBits 4": lambda _: n_bits(4, False),
    "MatMulNBits 8 symmetric": lambda _: n_bits(8, True),
    "MatMulNBits 8": lambda _: n_bits(8, False),
    "MatMulNBits 2": lambda _: n_bits(2, False),
    "MatMulNBits 4, blocks of 16": lambda _: n_bits(4, False, block_size=16),
    "MatMulNBits float zero point": lambda _: n_bits_float_zero(),
    "QDQ int4 blocked by the quantizer": lambda _: n_bits(4, True, quant_format=QuantFormat.QDQ),
    "QDQ uint4 blocked by the quantizer": lambda _: n_bits(4, False, quant_format=QuantFormat.QDQ),
    "QDQ int8": lambda _: dequantized("int8", None),
    "QDQ uint8 per column": lambda _: dequantized("uint8", 1),
    "QDQ int8 per row": lambda _: dequantized("int8", 0),
    "QDQ int4 per column": lambda _: dequantized("int4", 1),
    "QDQ uint4 in blocks along rows": lambda _: dequantized("uint4", 1, 16),
    "QDQ int8 in blocks": lambda _: dequantized("int8", 0, 32),
    "QDQ uint4 without zero points": lambda _: dequantized("uint4", 1, zero=False),
}
INTEGER = {
    "MatMulInteger int8": lambda path: integer(path, weight_type=QuantType.QInt8),
    "MatMulInteger uint8": lambda path: integer(path, weight_type=QuantType.QUInt8),
    "MatMulInteger per column": lambda path: integer(path, weight_type=QuantType.QInt8, per_channel=True),
    "MatMulInteger reduced": lambda path: integer(
        path, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True
    ),
    "MatMulInteger asymmetric": lambda path: integer(
        path, weight_type=QuantType.QInt8, extra_options={"WeightSymmetric": False}
    ),
    "MatMulInteger uint8 reduced": lambda path: integer(path, weight_type=QuantType.QUInt8, reduce_range=True),
}
