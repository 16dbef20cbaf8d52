"""What it costs to feed 224 tensors in every run, against the same weights baked into the model.

Every way computes the same output, which is checked first. Peer: the export as it was, adapter inside, on plain
ONNX Runtime.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
from extracted import Extracted, activations, one_thread, prepare
from llama_export import Llama
from measure import Result, Way, clock_option, interleaved, options, report, rows

import adapterx as ax

FULL = Llama(layers=16, d=512, kv=128, ff=1408, rank=16)
QUICK = Llama(layers=2, d=64, kv=32, ff=96, rank=4)
BAKED = "onnxruntime, adapter baked in"


def ways(made: Extracted, feeds: dict[str, np.ndarray]) -> dict[str, Way]:
    """Every way to run the exported adapter, and three to run without any."""
    baked = ort.InferenceSession(made.export, one_thread())
    base = ort.InferenceSession(made.base, one_thread())
    plain = ort.InferenceSession(made.model, one_thread())
    session = ax.AdapterSession(made.model, adapters={"a": made.adapter}, session_options=one_thread())
    external = ax.AdapterSession(made.external, adapters={"a": made.adapter}, session_options=one_thread())
    bound, bound_base = session.bind("a"), session.bind(None)
    weights = dict(made.adapter.tensors())
    file = made.model.parent / "baked.onnx_adapter"
    ax.save_adapter(made.adapter, file)
    lora, active = ort.LoraAdapter(), ort.RunOptions()
    lora.Load(str(file))
    active.add_active_adapter(lora)
    return {
        BAKED: lambda: baked.run(None, feeds),
        "adapterx, bind('a').run": lambda: bound.run(None, feeds),
        "adapterx, run(adapter='a')": lambda: session.run(None, feeds, adapter="a"),
        "adapterx, external mode, run(adapter='a')": lambda: external.run(None, feeds, adapter="a"),
        "onnxruntime, numpy feeds": lambda: plain.run(None, {**feeds, **weights}),
        # The default argument keeps the adapter alive; RunOptions does not.
        "onnxruntime, add_active_adapter": lambda _alive=lora: plain.run(None, feeds, active),
        "no adapter: adapterx, bind(None).run": lambda: bound_base.run(None, feeds),
        "no adapter: adapterx, run()": lambda: session.run(None, feeds),
        "no adapter: onnxruntime, model without branches": lambda: base.run(None, feeds),
    }


def check(all_ways: dict[str, Way]) -> None:
    """All ways with the adapter give what the export gives."""
    expected = all_ways[BAKED]()[0]
    for name, way in all_ways.items():
        if not name.startswith("no adapter"):
            np.testing.assert_allclose(way()[0], expected, rtol=1e-3, atol=1e-3, err_msg=name)


def main() -> None:
    parser = options(__doc__)
    clock_option(parser)
    parser.add_argument("--rounds", type=int, help="turns of each way (60, or 3 with --quick)")
    chosen = parser.parse_args()
    sizes, rounds = (QUICK, 3) if chosen.quick else (FULL, 60)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        made = prepare(Path(folder), sizes)
        for tokens in (1, 64):
            all_ways = ways(made, activations(sizes, rows=1, tokens=tokens))
            check(all_ways)
            times = interleaved(all_ways, rounds=chosen.rounds or rounds, repeat=3, clock=chosen.clock)
            count = 2 * len(sizes.sites())
            title = f"one run, batch 1, {tokens} token(s), {count} adapter tensors of rank {sizes.rank}, d {sizes.d}"
            results.append(Result(title, BAKED, rows(times)))
    report(results, as_json=chosen.json)


if __name__ == "__main__":
    main()
