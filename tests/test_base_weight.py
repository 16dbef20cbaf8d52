"""Every form in which a base operation stores its weight, checked against what ONNX Runtime computes with it."""

import dataclasses
import json
import logging

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from onnxruntime.quantization.quant_utils import quantize_data

from adapterx.base_weight import SCALE, WEIGHT, ZERO, BaseWeight, read_weight, row_span, row_step, written
from adapterx.graph.stored import base_weight_of, tensor_reader, weight_values
from adapterx.packed_codes import repacked, unpacked

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
        [helper.make_tensor_value_info("y", y_type, None)],
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


def n_bits(bits, symmetric, dtype=np.float32, quant_format=QuantFormat.QOperator, block_size=32):
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
    "Gemm": lambda _: one_node("Gemm", ["x", "W"], {"W": weight.T.copy()}, transB=1, alpha=0.5),
    "FusedMatMul": lambda _: one_node("FusedMatMul", ["x", "W"], {"W": weight}, domain="com.microsoft", alpha=2.0),
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
READ_ONLY = {"MatMulBnb4 nf4": lambda _: bnb4(1), "MatMulBnb4 fp4": lambda _: bnb4(0)}


@pytest.mark.parametrize("form", [*LINEAR, *READ_ONLY])
def test_the_weight_read_reproduces_the_operations_own_output(form, tmp_path):
    model = {**LINEAR, **READ_ONLY}[form](tmp_path)
    ref, tensor = stored(model)
    assert (ref.d_in, ref.d_out) == (D_IN, D_OUT)
    np.testing.assert_allclose(x @ read_weight(ref, tensor), run(model), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("form", INTEGER)
def test_the_weight_read_reproduces_a_product_of_integers(form, tmp_path):
    model = INTEGER[form](tmp_path)
    ref, tensor = stored(model)
    # Activations that lie on the grid that DynamicQuantizeLinear gives them lose nothing in it.
    exact = rng.integers(-128, 128, (5, D_IN)).astype(np.float32)
    exact[:, :2] = -128, 127
    np.testing.assert_allclose(exact @ read_weight(ref, tensor), run(model, exact), rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float16, 2e-2), (ml_dtypes.bfloat16, None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_half_precision_are_read_as_they_are(dtype, bound, symmetric):
    model = n_bits(4, symmetric, dtype)
    ref, tensor = stored(model)
    assert tensor(ref.tensors[SCALE]).dtype == dtype
    read = read_weight(ref, tensor)
    np.testing.assert_allclose(read, weight, atol=0.35)
    if bound is not None:  # The CPU has no bfloat16 MatMulNBits.
        np.testing.assert_allclose(x @ read, run(model, dtype=dtype), atol=bound, rtol=1e-2)


@pytest.mark.parametrize("form", [*LINEAR, *INTEGER])
def test_the_weight_as_it_was_comes_back_as_the_same_bytes(form, tmp_path):
    model = {**LINEAR, **INTEGER}[form](tmp_path)
    ref, tensor = stored(model)
    again = written(ref, read_weight(ref, tensor), tensor)
    assert set(again) == set(ref.tensors.values())
    for name, array in again.items():
        assert (array.dtype, array.shape) == (tensor(name).dtype, tensor(name).shape)
        assert as_bytes(array) == as_bytes(tensor(name))


@pytest.mark.parametrize("form", [*LINEAR, *INTEGER])
def test_another_weight_is_written_as_near_as_the_grid_allows(form, tmp_path):
    model = {**LINEAR, **INTEGER}[form](tmp_path)
    ref, tensor = stored(model)
    other = rng.normal(size=(D_IN, D_OUT)).astype(np.float32)
    if form == "QDQ uint4 without zero points":
        other = np.abs(other)
    changed = with_tensors(model, written(ref, other, tensor))
    again, new_tensor = stored(changed)
    assert again == ref
    read = read_weight(again, new_tensor)
    levels = {0: 1e6, 2: 3, 4: 15, 8: 127 if "reduced" in form else 255}[ref.bits]
    # Half a step of a group's range, which is at most that of the whole weight; symmetric grids waste part of it, and
    # ONNX Runtime's clips up to one step.
    assert np.abs(read - other).max() <= 1.01 * (other.max() - other.min()) / levels * (1.2 if ref.bits else 1)
    if form in LINEAR:
        np.testing.assert_allclose(x @ read, run(changed), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_new_weight_on_a_useless_grid_gets_the_bytes_of_onnxruntimes_quantizer(bits, symmetric, tmp_path):
    model = n_bits(bits, symmetric)
    scales = next(t.name for t in model.graph.initializer if "scales" in t.name)
    ref, tensor = stored(model)
    useless = with_tensors(model, {scales: np.full_like(tensor(scales), 1e-9)})
    ref, tensor = stored(useless)
    for name, array in written(ref, weight, tensor).items():
        expected = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))
        if "scales" in name:
            np.testing.assert_allclose(array, expected, rtol=2e-7)
        else:
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("reduced", [True, False])
def test_int8_keeps_the_range_that_its_quantizer_allowed_itself(reduced, tmp_path):
    model = integer(tmp_path, weight_type=QuantType.QInt8, reduce_range=reduced)
    ref, tensor = stored(model)
    # Three times as wide a weight needs a new scale.
    codes = written(ref, 3 * weight[::-1], tensor)[ref.tensors[WEIGHT]]
    expected = quantize_data(3 * weight[::-1], TensorProto.INT8, symmetric=True, reduce_range=reduced)[2]
    np.testing.assert_array_equal(codes, expected)


def test_a_convolution_reads_as_channels_times_kernel():
    kernel = rng.normal(size=(6, 2, 3, 3)).astype(np.float32)
    images = rng.normal(size=(1, 4, 3, 3)).astype(np.float32)
    model = one_node("Conv", ["x", "W"], {"W": kernel}, x_shape=(1, 4, 3, 3), group=2)
    ref, tensor = stored(model)
    read = read_weight(ref, tensor)
    by_group = images.reshape(2, 18)
    expected = np.concatenate([by_group[0] @ read[:, :3], by_group[1] @ read[:, 3:]])
    np.testing.assert_allclose(run(model, images).reshape(-1), expected, atol=1e-5)
    np.testing.assert_array_equal(written(ref, read, tensor)["W"], kernel)


def embedding(**options):
    config = DefaultWeightOnlyQuantConfig(block_size=16, op_types_to_quantize=("Gather",), bits=4, **options)
    made = MatMulNBitsQuantizer(gather(weight), algo_config=config)
    made.process()
    return made.model.model


def gather(table):
    return one_node("Gather", ["W", "x"], {"W": table}, x_type=TensorProto.INT64, x_shape=("n",))


def gather_bytes(bits):
    """GatherBlockQuantized over uint8, as genai's builder writes it for a table shared with lm_head."""
    vocabulary, hidden = 9, 48
    tensors = {
        "W": rng.integers(0, 256, (vocabulary, hidden * bits // 8)).astype(np.uint8),
        "s": rng.uniform(0.1, 0.2, (vocabulary, 3)).astype(np.float32),
        "z": rng.integers(0, 256, (vocabulary, -(-3 * bits // 8))).astype(np.uint8),
    }
    attributes = {"bits": bits, "block_size": 16, "quantize_axis": 1, "gather_axis": 0, "domain": "com.microsoft"}
    return one_node(
        "GatherBlockQuantized", ["W", "x", "s", "z"], tensors, x_type=TensorProto.INT64, x_shape=("n",), **attributes
    )


EMBEDDINGS = {
    "Gather": lambda: (gather(weight), ids),
    "GatherBlockQuantized int4": lambda: (embedding(is_symmetric=True), ids),
    "GatherBlockQuantized uint4": lambda: (embedding(is_symmetric=False), ids),
    "GatherBlockQuantized uint8 of 4 bits": lambda: (gather_bytes(4), np.array([8, 0])),
    "GatherBlockQuantized uint8 of 8 bits": lambda: (gather_bytes(8), np.array([8, 0])),
}


@pytest.mark.parametrize("form", EMBEDDINGS)
def test_an_embedding_reads_as_its_rows(form):
    model, wanted = EMBEDDINGS[form]()
    ref, tensor = stored(model)
    read = read_weight(ref, tensor)
    np.testing.assert_allclose(read[wanted], run(model, wanted), rtol=1e-6, atol=1e-6)
    for name, array in written(ref, read, tensor).items():
        assert as_bytes(array) == as_bytes(tensor(name))


def test_an_embedding_of_codes_is_dequantized_after_the_lookup(tmp_path):
    onnx.save(gather(weight), tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "int8.onnx", op_types_to_quantize=["Gather"])
    model = onnx.load(tmp_path / "int8.onnx")
    ref, tensor = stored(model)
    np.testing.assert_allclose(read_weight(ref, tensor)[ids], run(model, ids), atol=1e-6)


@pytest.mark.parametrize("op", ["DynamicQuantizeMatMul", "MatMulIntegerToFloat"])
def test_fused_products_of_integers_are_read(op):
    codes, scale = rng.integers(-127, 128, (D_IN, D_OUT)).astype(np.int8), np.full(D_OUT, 0.25, np.float32)
    tensors = {"W": codes, "s": scale, "xs": np.float32(1), "z": np.zeros(D_OUT, np.int8)}
    if op == "DynamicQuantizeMatMul":
        model = one_node(op, ["x", "W", "s", "z"], tensors, domain="com.microsoft")
    else:
        # No activation scale but a constant; the codes of x are made from it.
        cast = helper.make_node("Cast", ["x"], ["q"], to=TensorProto.INT8)
        model = one_node(op, ["q", "W", "xs", "s", "", "z"], tensors, domain="com.microsoft", before=[cast])
    ref, tensor = stored(model)
    exact = rng.integers(-128, 128, (5, D_IN)).astype(np.float32)
    exact[:, :2] = -128, 127
    np.testing.assert_allclose(exact @ read_weight(ref, tensor), run(model, exact), rtol=1e-5, atol=1e-2)


def test_reordered_columns_and_weights_that_depend_on_the_run_are_not_read():
    model = n_bits(4, True)
    model.graph.node[0].input.extend(["", "order"])
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(D_IN, np.int32), "order"))
    fed = one_node("MatMul", ["W", "x"], {"W": weight.T.copy()})
    assert [base_weight_of(node) for m in (model, fed) for node in ir.from_proto(m).graph] == [None, None]


def test_four_bit_codes_are_taken_packed_and_one_by_one(tmp_path):
    model = n_bits(4, True, quant_format=QuantFormat.QDQ)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    ref, tensor = stored(onnx.load(tmp_path / "m.onnx"))
    on_disk = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    graph = ir.from_proto(on_disk)
    ir.external_data.set_base_dir(graph.graph, tmp_path)
    from_disk = tensor_reader(weight_values(graph))
    assert from_disk(ref.tensors[WEIGHT]).dtype == np.uint8
    read = read_weight(ref, from_disk)
    np.testing.assert_array_equal(read, read_weight(ref, tensor))
    again = written(ref, read, from_disk)[ref.tensors[WEIGHT]]
    np.testing.assert_array_equal(again, from_disk(ref.tensors[WEIGHT]))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_packed_beside_bits_that_stay(bits, signed):
    present = rng.integers(0, 256, (3, 4)).astype(np.uint8)
    codes = unpacked(present, bits, signed=signed, length=5 if bits < 8 else 3)
    np.testing.assert_array_equal(repacked(codes, present, bits), present)
    other = (codes.view(np.uint8) ^ 1).view(codes.dtype)
    back = unpacked(repacked(other, present, bits), bits, signed=False, length=codes.shape[-1])
    np.testing.assert_array_equal(back, other.view(np.uint8) & ((1 << bits) - 1))


CUT = {
    **{"MatMul": 1, "Transpose": 1, "Gemm": 1, "MatMulNBits 4": 1, "MatMulNBits 2": 1, "QDQ int8 in blocks": 32},
    **{"MatMulNBits float zero point": 1, "QDQ int8 per row": 1, "QDQ uint4 in blocks along rows": 1},
    **{"QDQ uint4 blocked by the quantizer": 32, "QDQ int8": 0, "QDQ uint8 per column": 0, "MatMulInteger int8": 0},
}


@pytest.mark.parametrize("form", CUT)
def test_rows_can_be_read_and_written_apart(form, tmp_path):
    ref, tensor = stored({**LINEAR, **INTEGER}[form](tmp_path))
    raw = {role: raw_bytes(tensor(name)) for role, name in ref.tensors.items()}
    step = row_step(ref, {role: len(data) for role, data in raw.items()})
    assert step == CUT[form]
    whole = read_weight(ref, tensor)
    other = rng.normal(size=whole.shape).astype(np.float32)
    expected = {role: raw_bytes(written(ref, other, tensor)[name]) for role, name in ref.tensors.items()}
    rows = ref.shape[0]
    for first, last in [(at, min(at + 32, rows)) for at in range(0, rows, 32)] if step else []:
        part = dataclasses.replace(ref, shape=(last - first, *ref.shape[1:]))
        spans = {role: row_span(ref, role, len(data), slice(first, last)) for role, data in raw.items()}

        def cut(name, spans=spans):
            role = next(role for role, other_name in ref.tensors.items() if other_name == name)
            dtype = tensor(name).dtype
            packed_dtype = np.uint8 if dtype.name in {"int4", "uint4"} else dtype
            return np.frombuffer(raw[role][spans[role]], packed_dtype)

        here = np.s_[first:last] if ref.rows_first else np.s_[:, first:last]
        np.testing.assert_array_equal(read_weight(part, cut), whole[here])
        for role, name in ref.tensors.items():
            assert raw_bytes(written(part, other[here], cut)[name]) == expected[role][spans[role]]


def raw_bytes(array):
    return packed(array) if array.dtype.name in {"int4", "uint4"} else array.tobytes()


def test_a_base_weight_goes_through_json():
    ref, _ = stored(n_bits(4, False))
    assert BaseWeight.from_dict(json.loads(json.dumps(ref.as_dict()))) == ref
    assert ref.tensors[ZERO] == "W_zero_points"
    with pytest.raises(ValueError, match="sideways"):
        BaseWeight.from_dict({**ref.as_dict(), "form": "sideways"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        ref.bits = 2
