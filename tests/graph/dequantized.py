"""The numbers of a quantized weight by the operators' specification, with nothing of adapterx in it."""

import numpy as np
from onnx import numpy_helper

# com.microsoft.MatMulBnb4: the tables of bitsandbytes, codes in the order of the quantization kernels.
NF4 = [-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1]  # fmt: skip
FP4 = [0, 0.0052083333, 0.6666667, 1, 0.3333333, 0.5, 0.1666667, 0.25]


def weights(model):
    """``[K, N]`` in float32 by the name of the node that multiplies with it, for every quantized product."""
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    made = {output: node for node in model.graph.node for output in node.output}
    found = {}
    for node in model.graph.node:
        given = {a.name: a.i for a in node.attribute}
        source = made.get(node.input[1]) if node.op_type == "MatMul" else None
        if node.op_type == "MatMulNBits":
            found[node.name] = n_bits([held[name] for name in node.input[1:4] if name], given)
        elif node.op_type == "MatMulBnb4":
            found[node.name] = bnb4(*(held[name] for name in node.input[1:3]), given)
        elif source is not None and source.op_type == "DequantizeLinear":
            found[node.name] = linear([held[name] for name in source.input], source)
    return found


def unpacked(packed, bits):
    fields = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(fields, axis=-1).reshape(*packed.shape[:-1], -1)


def n_bits(tensors, given):
    packed, scales, *zeros = tensors
    k, n, bits, block = given["K"], given["N"], given["bits"], given["block_size"]
    codes = unpacked(packed.reshape(n, -1), bits)[:, :k].astype(np.float32)
    zero = np.full(scales.shape, 1 << (bits - 1), np.float32)
    if zeros:
        zero = zeros[0] if zeros[0].dtype != np.uint8 else unpacked(zeros[0], bits)[:, : scales.shape[1]]
    wide = [np.repeat(part.astype(np.float32), block, axis=1)[:, :k] for part in (zero, scales)]
    return ((codes - wide[0]) * wide[1]).T


def bnb4(packed, absmax, given):
    k, n, block = given["K"], given["N"], given["block_size"]
    table = np.array(NF4 if given["quant_type"] else [*FP4, *(-value for value in FP4)], np.float32)
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: n * k]
    return (table[codes] * np.repeat(absmax.astype(np.float32), block)[: n * k]).reshape(n, k).T


def linear(tensors, node):
    codes, scales, *zeros = (tensor.astype(np.float32) for tensor in tensors)
    given = {a.name: a.i for a in node.attribute}
    zero = zeros[0] if zeros else np.zeros_like(scales)
    if "block_size" in given:
        scales, zero = (np.repeat(part, given["block_size"], axis=0)[: len(codes)] for part in (scales, zero))
    return (codes - zero) * scales
