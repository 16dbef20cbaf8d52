"""Put ports into a model of 4.2 GB that never had an adapter: adapterx, against tools that load the model whole.

Each run is a fresh process that imports what it needs and works on files in the page cache. The peers do less than
adapterx: they read the model and write it again, and look for nothing.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

from extract import FULL, QUICK, with_onnx, with_onnx_ir
from llama_export import write_export
from measure import Result, in_fresh_process, interleaved, megabytes, options, peak_rss, report, rows


def with_adapterx(model: Path, out: Path, **how: object) -> dict[str, int]:
    import adapterx as ax

    done = ax.inject_adapters(model, out, **how)
    return {"sites": len(done.sites)}


WAYS = {
    "adapterx, all-linear": lambda m, o: with_adapterx(m, o, targets="all-linear"),
    "adapterx, q_proj and v_proj": lambda m, o: with_adapterx(m, o, targets=["q_proj", "v_proj"]),
    "adapterx, pack_inputs=True": lambda m, o: with_adapterx(m, o, targets="all-linear", pack_inputs=True),
    "adapterx, external, rank 16": lambda m, o: with_adapterx(m, o, targets="all-linear", make_inputs=False, rank=16),
    "onnx.load + onnx.save": with_onnx,
    "onnx_ir.load + onnx_ir.save": with_onnx_ir,
}


def alone(way: str, model: Path) -> None:
    """One way in this process, then a line of JSON: seconds without what Python itself needs to start, peak memory."""
    with tempfile.TemporaryDirectory(dir=model.parent) as out:
        start = time.perf_counter()
        found = WAYS[way](model, Path(out))
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak": peak_rss(), **found}))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, help="runs of each way (5, or 1 with --quick)")
    parser.add_argument("--alone", nargs=2, metavar=("WAY", "MODEL"), help="for the bench's own use")
    chosen = parser.parse_args()
    if chosen.alone:
        alone(chosen.alone[0], Path(chosen.alone[1]))
        return
    sizes = dataclasses.replace(QUICK if chosen.quick else FULL, rank=0)
    with tempfile.TemporaryDirectory() as folder:
        model = write_export(Path(folder) / "model.onnx", sizes)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        inner: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}

        def run(way: str) -> None:
            inner[way].append(in_fresh_process(sys.argv[0], "--alone", way, str(model)))

        rounds = chosen.rounds or (1 if chosen.quick else 5)
        times = interleaved({way: lambda w=way: run(w) for way in WAYS}, rounds=rounds, warm_up=not chosen.quick)
    facts = {
        way: {
            "call alone": f"{sorted(d['seconds'] for d in done)[len(done) // 2]:.2f} s",
            "peak RSS": megabytes(max(d["peak"] for d in done)),
            "sites": done[0].get("sites", "-"),
        }
        for way, done in inner.items()
    }
    title = f"inject into {megabytes(size)}, {sizes.layers} layers x 7 linears; whole process, imports included"
    report([Result(title, "onnx.load + onnx.save", rows(times, facts))], as_json=chosen.json)


if __name__ == "__main__":
    main()
