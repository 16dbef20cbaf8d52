"""What is written for each operator and type, and that it is what ONNX Runtime's own quantizers make of it."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import (
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
)

from adapterx.errors import ModelError
from adapterx.graph.base_methods import HQQ, RTN, Bnb4, DynamicInt8, KQuant, StaticInt8
from adapterx.graph.quantize import quantize_base
from tests.graph.base_models import floats, proto
from tests.graph.dequantized import unpacked, weights
from tests.graph.merging import initializers, run
from tests.zoo import build

# -- As ONNX Runtime's quantizers do ----------------------------------------------------------------------------------


def peer(model, **options):
    quantizer = MatMulNBitsQuantizer(onnx.ModelProto.FromString(model.SerializeToString()), **options)
    quantizer.process()
    return quantizer.model.model


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rtn_writes_the_bytes_that_onnxruntimes_quantizer_writes(bits, symmetric, dtype, tmp_path):
    element = "float" if dtype == np.float32 else "float16"
    model = proto(
        "y = MatMul(x, w)", {"w": floats(70, 24, dtype=dtype)}, inputs=f"{element}[n,70] x", outputs=f"{element} y"
    )
    quantize_base(model, tmp_path / "q.onnx", method=RTN(bits=bits, symmetric=symmetric, accuracy_level=0))
    ours = initializers(tmp_path / "q.onnx")
    theirs = peer(model, bits=bits, block_size=32, is_symmetric=symmetric)
    theirs = {tensor.name: numpy_helper.to_array(tensor) for tensor in theirs.graph.initializer}
    assert ours.keys() == theirs.keys()
    for name in ours:
        mine, other = ours[name].reshape(24, -1), theirs[name].reshape(24, -1)
        if mine.dtype == np.uint8:
            # What fills the last block and byte is of no account.
            mine, other = (unpacked(array, bits)[:, : 70 if "_Q" in name else 3] for array in (mine, other))
        if dtype == np.float32:
            np.testing.assert_array_equal(mine, other)
        elif mine.dtype == np.uint8:
            # Ours are the nearest for the scale as it is stored; theirs, for the scale before it was rounded.
            assert np.abs(mine.astype(int) - other).max() <= 1
            assert (mine != other).mean() < 0.01
        else:
            np.testing.assert_allclose(mine, other.astype(np.float32), rtol=1e-3)


def test_a_whole_base_computes_what_onnxruntimes_quantizer_makes_of_it(tmp_path):
    built = build("ts_llama")
    quantize_base(built.base_model, tmp_path / "q.onnx", method=RTN(symmetric=False, accuracy_level=0))
    head = next(node.name for node in onnx.load(built.base_model).graph.node if "lm_head" in node.name)
    onnx.save(peer(onnx.load(built.base_model), block_size=32, nodes_to_exclude=[head]), tmp_path / "peer.onnx")
    for ours, theirs in zip(
        run(tmp_path / "q.onnx", built.feeds), run(tmp_path / "peer.onnx", built.feeds), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_k_quant_and_nf4_are_onnxruntimes(tmp_path):
    model = proto("y = MatMul(x, w)", {"w": floats(128, 24)}, inputs="float[n,128] x", names={"y": "n"})
    # ONNX Runtime's own fails at an odd number of blocks.
    x = {"x": floats(4, 128)}
    quantizer = MatMulNBitsQuantizer(onnx.ModelProto.FromString(model.SerializeToString()), block_size=32,
                                     algo_config=KQuantWeightOnlyQuantConfig())  # fmt: skip
    quantizer.process()
    onnx.save(quantizer.model.model, tmp_path / "kquant.onnx")
    quantizer = MatMulBnb4Quantizer(onnx.ModelProto.FromString(model.SerializeToString()), MatMulBnb4Quantizer.NF4, 64)
    quantizer.process()
    onnx.save(quantizer.model.model, tmp_path / "nf4.onnx")
    for name, method in (("kquant", KQuant(accuracy_level=0)), ("nf4", Bnb4())):
        quantize_base(model, tmp_path / "q.onnx", method=method)
        want = run(tmp_path / f"{name}.onnx", x)[0]
        np.testing.assert_allclose(run(tmp_path / "q.onnx", x)[0], want, rtol=0, atol=1e-5 * np.abs(want).max())


class Samples(quantization.CalibrationDataReader):
    def __init__(self, feeds):
        self.left = [feeds]

    def get_next(self):
        return self.left.pop() if self.left else None


def test_dynamic_and_static_int8_are_onnxruntimes(tmp_path):
    body = "a = MatMul(x, w)\nr = Relu(a)\ny = MatMul(r, v)"
    model, feeds = proto(body, {"w": floats(32, 24), "v": floats(24, 40)}), {"x": floats(2, 3, 32)}
    onnx.save(model, tmp_path / "float.onnx")
    common = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "weight_type": quantization.QuantType.QInt8}
    quantization.quantize_dynamic(tmp_path / "float.onnx", tmp_path / "dynamic.onnx", **common)
    only = {"OpTypesToExcludeOutputQuantization": ["MatMul"], "MatMulConstBOnly": True}
    types = {"activation_type": quantization.QuantType.QUInt8, "extra_options": only}
    samples = Samples(feeds)
    quantization.quantize_static(tmp_path / "float.onnx", tmp_path / "static.onnx", samples, **common, **types)
    for name, method in (("dynamic", DynamicInt8()), ("static", StaticInt8())):
        quantize_base(model, tmp_path / "q.onnx", method=method, calibration=[feeds])
        ours, theirs = (run(path, feeds)[0] for path in (tmp_path / "q.onnx", tmp_path / f"{name}.onnx"))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_hqq_is_nearer_to_the_weights_than_rtn_and_no_farther_than_onnxruntimes_where_that_runs(bits, tmp_path):
    heavy = np.random.default_rng(0).standard_t(4, size=(128, 40)).astype(np.float32)
    model = proto("y = MatMul(x, w)", {"w": heavy}, inputs="float[n,128] x", names={"y": "n"})
    distances = {}
    for name, method in (("hqq", HQQ(bits, 32)), ("rtn", RTN(bits, 32, symmetric=False))):
        quantize_base(model, tmp_path / "q.onnx", method=method)
        distances[name] = np.abs(weights(onnx.load(tmp_path / "q.onnx"))["n"] - heavy).mean()
        run(tmp_path / "q.onnx", {"x": floats(3, 128)})
    assert distances["hqq"] < distances["rtn"]
    quantizer = MatMulNBitsQuantizer(model, algo_config=HQQWeightOnlyQuantConfig(block_size=32, bits=bits))
    quantizer.process()
    made = quantizer.model.model
    made.graph.node[0].name = "n"
    zeros = next(tensor for tensor in made.graph.initializer if tensor.name.endswith("zero_points"))
    scales = next(tensor for tensor in made.graph.initializer if tensor.name.endswith("scales"))
    for tensor in (zeros, scales):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).reshape(40, -1), tensor.name))
    if bits < 8:
        assert distances["hqq"] < 1.01 * np.abs(weights(made)["n"] - heavy).mean()


# -- Every spelling ---------------------------------------------------------------------------------------------------

ROWS = "float[n,32] x"
SPELLINGS = {
    "matmul": ("y = MatMul(x, w)", {"w": floats(32, 24)}),
    "gemm": ("y = Gemm(x, w, c)", {"w": floats(32, 24), "c": floats(24)}),
    "gemm_turned": ("y = Gemm<transB=1>(x, w, c)", {"w": floats(24, 32), "c": floats(24)}),
    "transposed": ("v = Transpose<perm=[1,0]>(w)\ny = MatMul(x, v)", {"w": floats(24, 32)}),
    "cast": ("v = Cast<to=1>(w)\ny = MatMul(x, v)", {"w": floats(32, 24, dtype=np.float16)}),
    "fused": ("y = com.microsoft.FusedMatMul<transB=1>(x, w)", {"w": floats(24, 32)}),
    "activated": (
        'y = com.microsoft.FusedGemm<activation="Relu">(x, w, c)', {"w": floats(32, 24), "c": floats(24)}),
}  # fmt: skip


METHODS = {
    "nbits": RTN(bits=8, accuracy_level=0),
    "qdq": RTN(bits=8, format="qdq"),
    "dynamic": DynamicInt8(),
    "static": StaticInt8(),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_linear_layer_is_quantized(name, method, tmp_path):
    model = proto(*SPELLINGS[name], inputs=ROWS)
    x = {"x": floats(6, 32)}
    done = quantize_base(model, tmp_path / "q.onnx", method=method, calibration=[x])
    onnx.save(model, tmp_path / "float.onnx")
    want, got = run(tmp_path / "float.onnx", x)[0], run(tmp_path / "q.onnx", x)[0]
    assert len(done.rows) == 1
    assert 0 < np.abs(got - want).max() < 0.02 * np.abs(want).max()
    assert not {"w", "v"} & initializers(tmp_path / "q.onnx").keys()


@pytest.mark.parametrize("method", [RTN(bits=8), RTN(bits=2), Bnb4(), DynamicInt8(), StaticInt8(), HQQ()], ids=repr)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_models_of_sixteen_bits_stay_so(method, dtype, tmp_path):
    numbers = floats(32, 24).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16)
    body = "f = MatMul(x, w)\ny = Cast<to=1>(f)"
    model = proto(
        f"x = Cast<to={16 if dtype == 'bfloat16' else 10}>(i)\n{body}", {"w": numbers}, inputs="float[n,32] i"
    )
    x = {"i": floats(6, 32)}
    if dtype == "bfloat16" and method == StaticInt8():
        with pytest.raises(ModelError, match="cannot be run here to calibrate it"):
            quantize_base(model, tmp_path / "q.onnx", method=method, calibration=[x])
        return
    done = quantize_base(model, tmp_path / "q.onnx", method=method, calibration=[x])
    want = floats(6, 32) @ numbers.astype(np.float32)
    got = run(tmp_path / "q.onnx", x)[0]
    assert np.abs(got - want).max() < (0.8 if done.bits < 4 else 0.3 if done.bits < 8 else 0.05) * np.abs(want).max()


def test_what_layers_share_stays_shared_and_what_a_float_reads_too_stays(tmp_path):
    body = "a = MatMul(x, w)\nb = MatMul(a, w)\ny = Add(b, w)"
    done = quantize_base(proto(body, {"w": floats(32, 32)}, inputs="float[32,32] x"), tmp_path / "q.onnx")
    assert len(done.rows) == 1
    assert sorted(initializers(tmp_path / "q.onnx")) == ["w", "w_Q4", "w_scales"]
    assert done.notes == ("w is in the file twice: something that stays float reads it, too",)


def test_one_range_of_activations_serves_all_that_read_them(tmp_path):
    body = "a = MatMul(x, w)\nb = MatMul(x, v)\ny = Concat<axis=0>(a, b)"
    model = proto(body, {"w": floats(32, 24), "v": floats(32, 24) / 3})
    for method in (DynamicInt8(), StaticInt8()):
        quantize_base(model, tmp_path / "q.onnx", method=method, calibration=[{"x": floats(2, 3, 32)}])
        nodes = [node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node]
        assert nodes.count("DynamicQuantizeLinear") + nodes.count("QuantizeLinear") == 1
