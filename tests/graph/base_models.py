"""Small graphs with one base operation each, in ONNX text: every operator that a linear layer is written with."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  (numpy knows "int4" only after this import)
import numpy as np
import onnx
import onnx_ir as ir

from adapterx.graph.load import load_model

D_IN, D_OUT, VOCABULARY = 32, 24, 10

_HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>\n'
FLOATS = "float[n,t,32] x"


def model(body, tensors, *, inputs=FLOATS, outputs="float y", names=None, scopes=None):
    """A checked, loaded model.

    Args:
        body: the nodes, one a line
        tensors: initializers by name
        inputs: of the graph
        outputs: of the graph
        names: name in the text -> real name, for tensors and, under the name of their output, for nodes
        scopes: output of a node -> its name_scopes
    """
    return load_model(proto(body, tensors, inputs=inputs, outputs=outputs, names=names, scopes=scopes))


def proto(body, tensors, *, inputs=FLOATS, outputs="float y", names=None, scopes=None):
    """The same as a ``ModelProto``."""
    made = onnx.parser.parse_model(f"{_HEAD}g ({inputs}) => ({outputs}) {{\n{body}\n}}")
    names = names or {}
    for name, array in tensors.items():
        tensor = ir.to_proto(ir.tensor(np.asarray(array), name=names.get(name, name)))
        made.graph.initializer.append(tensor)
    for node in made.graph.node:
        node.input[:] = [names.get(name, name) if name in tensors else name for name in node.input]
        node.name = names.get(node.output[0], "")
        if scopes and node.output[0] in scopes:
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=str(scopes[node.output[0]]))
    return made


def floats(*shape, dtype=np.float32):
    """Random numbers, always the same for a shape."""
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def codes(*shape, dtype=np.uint8):
    """Random bytes."""
    return np.random.default_rng(sum(shape)).integers(0, 100, shape).astype(dtype)


W, W_T, C = floats(D_IN, D_OUT), floats(D_OUT, D_IN), floats(D_OUT)
_BLOCKS = {"w": codes(D_OUT, 2, 8), "s": floats(D_OUT, 2)}
_N_BITS = "com.microsoft.MatMulNBits<K=32, N=24, bits=4, block_size=16>"
_DYNAMIC = "q, qs, qz = DynamicQuantizeLinear(x)"
_INT8 = {"w": codes(D_IN, D_OUT, dtype=np.int8), "s": np.float32(0.1), "z": np.int8(3)}
_SCALED = "sc = Mul(qs, s)\nf = Cast<to=1>(i)"

# name: (nodes, tensors, operator, name of the bias)
LINEARS = {
    "matmul": ("y = MatMul(x, w)", {"w": W}, "MatMul", None),
    "matmul_bias": ("m = MatMul(x, w)\ny = Add(c, m)", {"w": W, "c": C}, "MatMul", "c"),
    "bias_behind_identity": (
        "m = MatMul(x, w)\nd = Identity(c)\ny = Add(m, d)", {"w": W, "c": C}, "MatMul", "c"),
    "transposed": ("v = Transpose<perm=[1,0]>(w)\ny = MatMul(x, v)", {"w": W_T}, "MatMul", None),
    "turned_twice": (
        "u = Transpose<perm=[1,0]>(w)\nv = Transpose(u)\ny = MatMul(x, v)", {"w": W}, "MatMul", None),
    "cast": (
        "v = Cast<to=1>(w)\ny = MatMul(x, v)", {"w": floats(D_IN, D_OUT, dtype=np.float16)}, "MatMul", None),
    "fused_matmul": (
        "y = com.microsoft.FusedMatMul<transB=1, alpha=0.5>(x, w)", {"w": W_T}, "FusedMatMul", None),
    "n_bits": (f"y = {_N_BITS}(x, w, s)", _BLOCKS, "MatMulNBits", None),
    "n_bits_bias": (f"y = {_N_BITS}(x, w, s, , , c)", {**_BLOCKS, "c": C}, "MatMulNBits", "c"),
    "n_bits_add": (f"m = {_N_BITS}(x, w, s)\ny = Add(m, c)", {**_BLOCKS, "c": C}, "MatMulNBits", "c"),
    "blocked_int4": (
        "v = DequantizeLinear<axis=0, block_size=16>(w, s)\ny = MatMul(x, v)",
        {"w": codes(D_IN, D_OUT).astype("int4"), "s": floats(2, D_OUT)}, "MatMul", None),
    "dequantized_int8": (
        "v = DequantizeLinear<axis=1>(w, s)\nu = Transpose<perm=[1,0]>(v)\ny = MatMul(x, u)",
        {"w": codes(D_OUT, D_IN, dtype=np.int8), "s": floats(D_IN)}, "MatMul", None),
    "static_qdq": (
        "q = QuantizeLinear(x, xs)\nd = DequantizeLinear(q, xs)\nv = DequantizeLinear(w, s)\nm = MatMul(d, v)\n"
        "b = DequantizeLinear(c, s)\ny = Add(m, b)",
        {"w": _INT8["w"], "s": np.float32(0.1), "xs": np.float32(0.2), "c": codes(D_OUT, dtype=np.int32)},
        "MatMul", "c"),
    "dynamic_int8": (
        f"{_DYNAMIC}\ni = MatMulInteger(q, w, qz, z)\n{_SCALED}\ny = Mul(f, sc)", _INT8, "MatMulInteger", None),
    "dynamic_int8_bias": (
        f"{_DYNAMIC}\ni = MatMulInteger(q, w, qz, z)\n{_SCALED}\nm = Mul(f, sc)\ny = Add(m, c)",
        {**_INT8, "c": C}, "MatMulInteger", "c"),
    "to_float": (
        f"{_DYNAMIC}\ny = com.microsoft.MatMulIntegerToFloat(q, w, qs, s, qz, z, c)",
        {**_INT8, "c": C}, "MatMulIntegerToFloat", "c"),
    "dynamic_fused": (
        "y = com.microsoft.DynamicQuantizeMatMul(x, w, s, z, c)", {**_INT8, "c": C}, "DynamicQuantizeMatMul", "c"),
}  # fmt: skip

ROWS = "float[n,32] x"
GEMMS = {
    "gemm": ("y = Gemm(x, w, c)", {"w": W, "c": C}, "Gemm", "c"),
    "gemm_turned": ("y = Gemm<transB=1>(x, w, c)", {"w": W_T, "c": C}, "Gemm", "c"),
    "gemm_alone": ("y = Gemm(x, w)", {"w": W}, "Gemm", None),
}

_PICTURES = "float[n,6,8,8] x"
_KERNEL, _SPATIAL = floats(D_OUT, 6, 3, 3), floats(1, D_OUT, 1, 1)
CONVOLUTIONS = {
    "conv": ("y = Conv(x, w, c)", {"w": _KERNEL, "c": C}, "c"),
    "conv_add": ("m = Conv(x, w)\ny = Add(m, c)", {"w": _KERNEL, "c": _SPATIAL}, "c"),
    "conv_integer": (
        f"{_DYNAMIC}\ni = ConvInteger(q, w, qz, z)\n{_SCALED}\nm = Mul(f, sc)\nd = Reshape(c, k)\ny = Add(m, d)",
        {"w": codes(D_OUT, 6, 3, 3, dtype=np.int8), "s": np.float32(0.1), "z": np.int8(0), "c": C,
         "k": np.array([1, -1, 1, 1])}, "c"),
}  # fmt: skip
PICTURES = _PICTURES

IDS = "int64[n,t] x"
_TABLE = floats(VOCABULARY, D_OUT)
EMBEDDINGS = {
    "gather": ("y = Gather(w, x)", {"w": _TABLE}, "Gather"),
    "dequantized_after": (
        "g = Gather(w, x)\ny = DequantizeLinear(g, s, z)",
        {"w": codes(VOCABULARY, D_OUT), "s": np.float32(0.1), "z": np.uint8(3)}, "Gather"),
    "dequantized_before": (
        "v = DequantizeLinear<axis=0>(w, s)\ny = Gather(v, x)",
        {"w": codes(VOCABULARY, D_OUT, dtype=np.int8), "s": floats(VOCABULARY)}, "Gather"),
    "by_blocks": (
        "y = com.microsoft.GatherBlockQuantized<block_size=16, quantize_axis=1, bits=4>(w, x, s)",
        {"w": codes(VOCABULARY, D_OUT // 2), "s": floats(VOCABULARY, 2)}, "GatherBlockQuantized"),
}  # fmt: skip


def two_layers():
    """``model.fc1`` with a bias, then ``model.fc2`` without."""
    body = "h = MatMul(x, w)\nb = Add(h, c)\ny = MatMul(b, v)"
    tensors = {"w": W, "c": C, "v": floats(D_OUT, 7)}
    names = {"w": "model.fc1.weight", "v": "model.fc2.weight", "c": "model.fc1.bias"}
    return proto(body, tensors, outputs="float[n,t,7] y", names=names)
