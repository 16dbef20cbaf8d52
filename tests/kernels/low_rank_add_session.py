"""Models of LowRankAdd nodes, and sessions that run them on arrays which end where memory ends."""

import itertools

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from adapterx.ops import DOMAIN, low_rank_add_function
from adapterx.runtime.kernels import register_kernels
from tests.kernels.cuda_host import close_to_traps

CPU = ["CPUExecutionProvider"]
TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "float64": onnx.TensorProto.DOUBLE,
    "int8": onnx.TensorProto.INT8,
}


def model_of(pair, *, nodes=1, dims=None):
    """`nodes` of them, each the next one's base; `dims` by input, unknown where none are given."""
    activations, ports = pair
    codes = ports == "int8"
    kinds = {name: TYPES[ports if name in "ab" else activations] for name in ("base", "x", "a", "b", "mask")}
    kinds |= {"scale": TYPES["float32"]} if codes else {}
    inputs = [onnx.helper.make_tensor_value_info(name, kind, (dims or {}).get(name)) for name, kind in kinds.items()]
    names = ["base", *(f"y{i}" for i in range(nodes - 1)), "y"]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("LowRankAdd", [before, *list(kinds)[1:]], [after], domain=DOMAIN)
            for before, after in itertools.pairwise(names)
        ],
        "g",
        inputs,
        [onnx.helper.make_tensor_value_info("y", TYPES[activations], None)],
    )
    target = ir.DataType(TYPES[activations]) if ports != activations else None
    function = low_rank_add_function(18, activations=target, codes=codes)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(DOMAIN, 1)]
    return onnx.helper.make_model(graph, functions=[ir.to_proto(function)], opset_imports=opsets, ir_version=10)


def session_of(model, *, kernels=True, threads=1):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if kernels:
        register_kernels(options, providers=CPU, mode="require")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=CPU)


def value(array):
    """An OrtValue over the array itself."""
    if array.dtype == ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), TYPES["bfloat16"])
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def run(session, feeds, *, shape=None, trap=True):
    """y, written where memory ends, as every input lies."""
    place = close_to_traps if trap else np.ascontiguousarray
    placed = {name: place(array) for name, array in feeds.items()}
    y = place(np.full(feeds["base"].shape if shape is None else shape, 77, feeds["base"].dtype))
    binding = session.io_binding()
    for name, array in placed.items():
        binding.bind_ortvalue_input(name, value(array))
    binding.bind_ortvalue_output("y", value(y))
    session.run_with_iobinding(binding)
    return y


def low_rank_add(feeds, *, threads=1, shape=None, trap=True):
    """One node, run by the kernel."""
    pair = feeds["x"].dtype.name, feeds["a"].dtype.name
    return run(session_of(model_of(pair), threads=threads), feeds, shape=shape, trap=trap)
