"""How fast exported linear layers are, by the form of their weights, against the same in float32.

A chain of layers of 2048 x 2048, so that weights come from memory and not from the cache, as when a model decodes. One
token, and 128; one thread. The layers are exported as users' are, by adapterx.quant.export.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from measure import Result, clock_option, interleaved, options, report, rows
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapterx.quant.linear import QuantLinear
from adapterx.quant.onnx_export import export
from adapterx.quant.rtn import RTN, rtn
from adapterx.quant.scheme import Scheme
from adapterx.quant.weight import Activation

TOKENS = (1, 128)
PEER = "float32"
ASYMMETRIC = Scheme(bits=4, group_size=32, symmetric=False)
ROW = Scheme(bits=8, group_size=-1)
# name -> (scheme, activation, options of the export)
WAYS = {
    "adapterx, int4, group 32": (ASYMMETRIC, None, {}),
    "adapterx, int4, group 128": (Scheme(bits=4, group_size=128), None, {}),
    "adapterx, int4, group 32, exact": (ASYMMETRIC, None, {"exact": True}),
    "adapterx, int2, group 32": (Scheme(bits=2, group_size=32), None, {}),
    "adapterx, int8, group 32": (Scheme(bits=8, group_size=32), None, {}),
    "adapterx, mxfp4 as int8": (Scheme(format="mxfp4", group_size=32), None, {}),
    "adapterx, int8, dynamic inputs": (ROW, Activation("uint8", "tensor"), {}),
    "adapterx, int8, inputs by token": (ROW, Activation("int8", "token"), {}),
    "adapterx, nf4, block 64": (Scheme(format="nf4", group_size=64), None, {}),
    "adapterx, float8 e4m3, by column": (Scheme(format="float8_e4m3fn", group_size=-1), None, {}),
    "adapterx, float8, unpacked at opening": (Scheme(format="float8_e4m3fn", group_size=-1), None, {}),
}
# ONNX Runtime's option that leaves DequantizeLinear to constant folding.
UNPACK = "session.disable_quant_qdq"


def chain(weights: list[torch.Tensor], scheme: Scheme | None, activation: Activation | None) -> nn.Sequential:
    """The layers, float where there is no scheme."""
    layers: list[nn.Module] = []
    for weight in weights:
        if scheme is None:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight)
        else:
            layer = QuantLinear(dataclasses.replace(rtn(weight, RTN(scheme)), activation=activation))
        layers.append(layer)
    return nn.Sequential(*layers)


def session(
    model: nn.Module, folder: Path, width: int, *, unpack: bool, **how: object
) -> tuple[ort.InferenceSession, int]:
    """Of the exported model, on one thread, and the bytes of its file."""
    done = export(model, folder / "m.onnx", example_inputs=torch.randn(2, width), **how)  # type: ignore[arg-type]
    made = ort.SessionOptions()
    made.intra_op_num_threads = 1
    made.add_session_config_entry(UNPACK, str(int(unpack)))
    return ort.InferenceSession(done.path, made), done.path.stat().st_size


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=4, help="in the chain")
    clock_option(parser)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    width, count = (256, 1) if chosen.quick else (2048, chosen.layers)
    weights = [torch.randn(width, width) / width**0.5 for _ in range(count)]
    sessions, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        sessions[PEER], sizes[PEER] = session(chain(weights, None, None), Path(folder), width, unpack=False)
        for name, (scheme, activation, how) in WAYS.items():
            model, unpack = chain(weights, scheme, activation), "unpacked" in name
            sessions[name], sizes[name] = session(model, Path(folder), width, unpack=unpack, **how)
    results = []
    for tokens in TOKENS:
        feeds = {"input": np.random.default_rng(0).standard_normal((tokens, width), np.float32)}
        ways = {name: (lambda made=made, feeds=feeds: made.run(None, feeds)) for name, made in sessions.items()}
        few = chosen.quick or tokens > 1
        times = interleaved(ways, rounds=3 if chosen.quick else 25, repeat=1 if few else 5, clock=chosen.clock)
        times = {name: [each / count for each in ms] for name, ms in times.items()}
        facts = {name: {"bytes a weight": f"{size / count / width**2:.2f}"} for name, size in sizes.items()}
        results.append(Result(f"{tokens} token(s), one layer of {width} x {width}", PEER, rows(times, facts)))
    report(results, as_json=chosen.json)


if __name__ == "__main__":
    main()
