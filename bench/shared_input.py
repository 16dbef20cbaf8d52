"""Would it pay to compute the first factors of layers that share their input (q, k, v) as one product?

Three products ``x @ a.T`` of ``[R, 2048]`` each, against one of ``[3 * R, 2048]``, on standard operators; the matrices
are other ones in each turn, so that they come from memory.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnxruntime as ort
from measure import Result, Way, clock_option, interleaved, options, report, rows
from onnx import TensorProto, helper

WIDTH = 2048


def products(count: int) -> ort.InferenceSession:
    """``count`` products of one ``x``."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, WIDTH])]
    nodes, outputs = [], []
    for i in range(count):
        inputs.append(helper.make_tensor_value_info(f"a{i}", TensorProto.FLOAT, ["r", WIDTH]))
        nodes.append(helper.make_node("Transpose", [f"a{i}"], [f"t{i}"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", f"t{i}"], [f"y{i}"]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None))
    graph = helper.make_graph(nodes, "products", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    made = ort.SessionOptions()
    made.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), made)


def ways(n: int, rank: int, turns: int) -> dict[str, Way]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 1, WIDTH), np.float32)
    whole = [rng.standard_normal((3 * rank, WIDTH), np.float32) for _ in range(turns)]
    apart = [dict(zip(("a0", "a1", "a2"), np.split(each, 3), strict=True)) for each in whole]
    three, one = products(3), products(1)
    threes, ones = itertools.cycle(apart), itertools.cycle(whole)
    return {
        "three products": lambda: three.run(None, {"x": x, **next(threes)}),
        "one product of three": lambda: one.run(None, {"x": x, "a0": next(ones)}),
    }


def main() -> None:
    parser = options(__doc__)
    clock_option(parser)
    chosen = parser.parse_args()
    results = []
    for rank, n in ((16, 1), (16, 8), (128, 8), (512, 32)):
        made = ways(n, rank, turns=2 if chosen.quick else 20)
        times = interleaved(made, rounds=3 if chosen.quick else 200, clock=chosen.clock)
        results.append(Result(f"{n} row(s), {rank} ranks in the bank", "three products", rows(times)))
    report(results, as_json=chosen.json)


if __name__ == "__main__":
    main()
