"""Take the adapters out of a model of 4.3 GB: adapterx, against tools that load the model whole.

Each run is a fresh process that imports what it needs and works on files in the page cache. The peers do less than
adapterx: they read the model and write it again, and look for nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from llama_export import Llama, write_export
from measure import Result, in_fresh_process, interleaved, megabytes, options, peak_rss, report, rows

FULL = Llama(layers=24, d=2048, kv=512, ff=5632)
QUICK = Llama(layers=2, d=256, kv=64, ff=512, rank=4)


def with_adapterx(model: Path, out: Path, **how: bool) -> dict[str, int]:
    import adapterx as ax

    done = ax.extract_adapters(model, out, **how)
    return {"sites": len(done.sites)}


def with_onnx(model: Path, out: Path) -> dict[str, int]:
    import onnx

    whole = onnx.load(model)
    onnx.save(whole, out / model.name, save_as_external_data=True, location=f"{model.name}.data")
    return {}


def with_onnx_ir(model: Path, out: Path) -> dict[str, int]:
    import onnx_ir

    onnx_ir.save(onnx_ir.load(model), out / model.name, external_data=f"{model.name}.data")
    return {}


WAYS = {
    "adapterx, make_inputs=True": lambda m, o: with_adapterx(m, o, make_inputs=True),
    "adapterx, make_inputs=False": lambda m, o: with_adapterx(m, o, make_inputs=False),
    "adapterx, pack_inputs=True": lambda m, o: with_adapterx(m, o, make_inputs=True, pack_inputs=True),
    "onnx.load + onnx.save": with_onnx,
    "onnx_ir.load + onnx_ir.save": with_onnx_ir,
}


def alone(way: str, model: Path) -> None:
    """One way in this process, then a line of JSON: seconds with imports and without, peak memory, sites."""
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
    sizes = QUICK if chosen.quick else FULL
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
    title = f"extract from {megabytes(size)}, {sizes.layers} layers x 7 sites; whole process, imports included"
    report([Result(title, "onnx.load + onnx.save", rows(times, facts))], as_json=chosen.json)


if __name__ == "__main__":
    main()
