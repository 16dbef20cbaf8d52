"""torch.onnx.ops.symbolic, run at once: each operator as an ONNX model of one node in ONNX Runtime.

What a lowering emits is seen by the kernels in milliseconds, without an export.
"""

import contextlib

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

NUMPY = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e5m2: ml_dtypes.float8_e5m2}
NUMPY |= {torch.float8_e4m3fnuz: ml_dtypes.float8_e4m3fnuz, torch.float8_e5m2fnuz: ml_dtypes.float8_e5m2fnuz}
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.int32: TensorProto.INT32,
}


@contextlib.contextmanager
def eager_symbolic():
    """Within it, symbolic operators compute."""
    ops = torch.onnx.ops
    before = ops.symbolic, ops.symbolic_multi_out
    ops.symbolic = lambda name, inputs, attrs=None, *, dtype, **_: run(name, inputs, attrs, [dtype])[0]
    ops.symbolic_multi_out = lambda name, inputs, attrs=None, *, dtypes, **_: run(name, inputs, attrs, dtypes)
    try:
        yield
    finally:
        ops.symbolic, ops.symbolic_multi_out = before


def run(name, inputs, attributes, dtypes):
    domain, _, operator = name.rpartition("::")
    names = ["" if tensor is None else f"i{place}" for place, tensor in enumerate(inputs)]
    outputs = [f"o{place}" for place in range(len(dtypes))]
    node = helper.make_node(operator, names, outputs, domain=domain, **(attributes or {}))
    held = [constant(name, tensor) for name, tensor in zip(names, inputs, strict=True) if tensor is not None]
    types = [helper.make_tensor_value_info(o, TYPES[dtype], None) for o, dtype in zip(outputs, dtypes, strict=True)]
    graph = helper.make_graph([node], "one", [], types, held)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(np.array(value)) for value in session.run(None, {})]


def constant(name, tensor):
    tensor = tensor.detach().contiguous()
    array = tensor.view(torch.uint8).numpy().view(NUMPY[tensor.dtype]) if tensor.dtype in NUMPY else tensor.numpy()
    return onnx.numpy_helper.from_array(array, name)
