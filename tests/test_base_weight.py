"""Every form in which a base operation stores its weight, checked against what ONNX Runtime computes with it."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
from onnxruntime.quantization.quant_utils import quantize_data

from adapterx.base_weight import SCALE, WEIGHT, ZERO, BaseWeight, read_weight, written
from adapterx.graph.stored import base_weight_of, tensor_reader, weight_values
from adapterx.packed_codes import repacked, unpacked
from tests.stored_weights import (
    D_IN,
    D_OUT,
    INTEGER,
    LINEAR,
    as_bytes,
    bnb4,
    ids,
    integer,
    n_bits,
    one_node,
    rng,
    run,
    stored,
    weight,
    with_tensors,
    x,
)

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
    other = np.random.default_rng(3).normal(size=(D_IN, D_OUT)).astype(np.float32)
    if form == "QDQ uint4 without zero points":
        other = np.abs(other)
    changed = with_tensors(model, written(ref, other, tensor))
    again, new_tensor = stored(changed)
    assert again == ref
    read = read_weight(again, new_tensor)
    levels = {0: 1e6, 2: 3, 4: 15, 8: 127 if "reduced" in form else 255}[ref.bits]
    # A step of a group is at most the range of the whole weight by the number of steps. The error of rounding is a
    # third of it; what ONNX Runtime's grids clip, and symmetric ones waste, adds to that.
    assert np.sqrt(np.square(read - other).mean()) <= 0.5 * (other.max() - other.min()) / levels
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


def test_a_base_weight_goes_through_json():
    ref, _ = stored(n_bits(4, False))
    assert BaseWeight.from_dict(json.loads(json.dumps(ref.as_dict()))) == ref
    assert ref.tensors[ZERO] == "W_zero_points"
    with pytest.raises(ValueError, match="sideways"):
        BaseWeight.from_dict({**ref.as_dict(), "form": "sideways"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        ref.bits = 2
