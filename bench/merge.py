"""Fold an adapter into 4 GB of weights: an ONNX model in float32, a checkpoint in bfloat16, against copying the files.

Each run is a fresh process that imports what it needs; it ends when the bytes are on the disk (fsync), for the copy
too. The adapter has rank 16 at every Linear, so that no large tensor may be copied as it is. The files are read from
the page cache, where they fit.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from llama_export import Llama, write_export
from measure import Result, in_fresh_process, interleaved, megabytes, options, peak_rss, report, rows

FULL = Llama(layers=24, d=2048, kv=512, ff=5632, rank=0)
QUICK = Llama(layers=2, d=256, kv=64, ff=512, rank=0)
RANK = 16
ADAPTER = "adapter.safetensors"


def merged_model(source: Path, out: Path) -> None:
    import adapterx as ax

    ax.merge_adapter(source / "model.onnx", source / ADAPTER, out / "merged.onnx")


def merged_checkpoint(source: Path, out: Path) -> None:
    import adapterx as ax

    ax.merge_peft(source / "checkpoint", source / ADAPTER, out / "merged")


def copied(*files: str) -> Callable[[Path, Path], None]:
    def copy(source: Path, out: Path) -> None:
        for pattern in files:
            for file in source.glob(pattern):
                target = out / file.name
                shutil.copyfile(file, target)
                with target.open("rb") as written:
                    os.fsync(written.fileno())

    return copy


WAYS = {
    "onnx": {"adapterx merge_adapter": merged_model, "copy": copied("model.onnx*")},
    "checkpoint": {"adapterx merge_peft": merged_checkpoint, "copy": copied("checkpoint/*")},
}


def write_adapter(path: Path, sizes: Llama) -> None:
    import adapterx as ax

    rng = np.random.default_rng(1)
    sites = {}
    for name, widths in sizes.sites().items():
        a, b = ((0.02 * rng.standard_normal((RANK, width))).astype(ml_dtypes.bfloat16) for width in widths)
        sites[name] = ax.LowRank(a=a, b=b)
    ax.save_adapter(ax.Adapter(sites), path)


def write_checkpoint(folder: Path, sizes: Llama) -> None:
    """Two files of bfloat16 with an index, names and shapes as transformers writes them."""
    from adapterx.formats.safetensors import pieces

    folder.mkdir()
    rng = np.random.default_rng(2)
    tensors = {f"{name}.weight": (d_out, d_in) for name, (d_in, d_out) in sizes.sites().items()}
    largest = max(d_in * d_out for d_in, d_out in tensors.values())
    block = (0.02 * rng.standard_normal(largest + 7919, np.float32)).astype(ml_dtypes.bfloat16)
    names, weight_map = list(tensors), {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        weight_map |= dict.fromkeys(part, file)
        cut = {name: block[k % 7919 :][: np.prod(tensors[name])].reshape(tensors[name]) for k, name in enumerate(part)}
        with (folder / file).open("wb") as out:
            out.writelines(pieces(cut.items(), {"format": "pt"}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": false}')


def alone(kind: str, way: str, source: Path) -> None:
    """One way in this process, then a line of JSON: seconds without imports of the bench, and peak memory."""
    with tempfile.TemporaryDirectory(dir=source) as out:
        start = time.perf_counter()
        WAYS[kind][way](source, Path(out))
        print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_rss()}))


def measured(kind: str, source: Path, rounds: int, *, warm_up: bool) -> Result:
    inner: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS[kind]}

    def run(way: str) -> None:
        inner[way].append(in_fresh_process(sys.argv[0], "--alone", kind, way, str(source)))

    times = interleaved({way: lambda w=way: run(w) for way in WAYS[kind]}, rounds=rounds, warm_up=warm_up)
    inner = {way: done[-rounds:] for way, done in inner.items()}
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file() and file.name != ADAPTER)
    facts = {}
    for way, done in inner.items():
        seconds = sorted(one["seconds"] for one in done)[len(done) // 2]
        rate = f"{size / seconds / 1e9:.2f} GB/s"
        facts[way] = {
            "call alone": f"{seconds:.2f} s",
            "rate": rate,
            "peak RSS": megabytes(max(d["peak"] for d in done)),
        }
    return Result(f"merge rank {RANK} into {megabytes(size)}, {kind}; whole process", "copy", rows(times, facts))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, help="runs of each way (3, or 1 with --quick)")
    parser.add_argument("--folder", type=Path, help="where to work; a disk of its own, else that of temporary files")
    parser.add_argument("--alone", nargs=3, metavar=("KIND", "WAY", "SOURCE"), help="for the bench's own use")
    chosen = parser.parse_args()
    if chosen.alone:
        alone(*chosen.alone[:2], Path(chosen.alone[2]))
        return
    sizes = QUICK if chosen.quick else FULL
    rounds = chosen.rounds or (1 if chosen.quick else 3)
    results = []
    for kind in WAYS:
        # One after the other, so that the disk holds two copies of one of them, never four.
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            source = Path(folder)
            write_adapter(source / ADAPTER, sizes)
            if kind == "onnx":
                write_export(source / "model.onnx", sizes)
            else:
                write_checkpoint(source / "checkpoint", sizes)
            results.append(measured(kind, source, rounds, warm_up=not chosen.quick))
    report(results, as_json=chosen.json)


if __name__ == "__main__":
    main()
