"""What it costs to change the adapter: one that is resident, and one that is on the disk.

Peers: a new InferenceSession of a model with the adapter inside, onnxruntime.LoraAdapter, and memcpy of as many bytes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
from extracted import Extracted, activations, one_thread, prepare, random_adapter
from llama_export import Llama
from measure import Result, Row, Way, clock_option, interleaved, megabytes, options, report, rows

import adapterx as ax

FULL = Llama(layers=16, d=1024, kv=256, ff=2816, rank=16)
QUICK = Llama(layers=2, d=64, kv=32, ff=96, rank=4)
LOADED_BEFORE = "onnxruntime, LoraAdapters loaded before, same one"
NEW_SESSION = "onnxruntime, new InferenceSession, adapter baked in"
MEMCPY = "memcpy of the tensors into memory in use"


class Turns:
    """The names in turn, so that every call changes the adapter."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        return "ab"[self.count % 2]


def lora_run_options(file: Path) -> tuple[ort.LoraAdapter, ort.RunOptions]:
    lora, active = ort.LoraAdapter(), ort.RunOptions()
    lora.Load(str(file))
    active.add_active_adapter(lora)
    return lora, active


def resident(made: Extracted, session: ax.AdapterSession, file: Path) -> dict[str, Way]:
    """Change to the other adapter; nothing is run."""
    turn, bound = Turns(), session.bind("a")
    plain = ort.InferenceSession(made.model, one_thread())
    values = {key: ort.OrtValue.ortvalue_from_numpy(array) for key, array in made.adapter.tensors()}
    binding = plain.io_binding()

    def rebind_by_hand() -> None:
        for key, value in values.items():
            binding.bind_ortvalue_input(key, value)

    return {
        "adapterx, rebind": lambda: bound.rebind(turn()),
        "adapterx, bind (first time in this thread)": lambda: session.bind(turn()),
        "onnxruntime, IOBinding.bind_ortvalue_input each": rebind_by_hand,
        "onnxruntime, LoraAdapter.Load + add_active_adapter": lambda: lora_run_options(file),
        NEW_SESSION: lambda: ort.InferenceSession(made.export, one_thread()),
    }


def swapped_runs(made: Extracted, session: ax.AdapterSession, files: dict[str, Path]) -> dict[str, Way]:
    """One run, with the adapter of the run before and with the other one."""
    feeds = activations(made.sizes, rows=1, tokens=1)
    turn, bound, swapping = Turns(), session.bind("a"), session.bind("a")
    plain = ort.InferenceSession(made.model, one_thread())
    loras = {name: lora_run_options(file) for name, file in files.items()}

    def swap_and_run() -> None:
        swapping.rebind(turn())
        swapping.run(None, feeds)

    return {
        "adapterx, bound run, same adapter": lambda: bound.run(None, feeds),
        "adapterx, rebind and run": swap_and_run,
        "adapterx, run(adapter=), same adapter": lambda: session.run(None, feeds, adapter="a"),
        "adapterx, run(adapter=), the other one": lambda: session.run(None, feeds, adapter=turn()),
        LOADED_BEFORE: lambda: plain.run(None, feeds, loras["a"][1]),
        "onnxruntime, LoraAdapters loaded before, the other one": lambda: plain.run(None, feeds, loras[turn()][1]),
    }


def first_use(session: ax.AdapterSession, adapter: ax.Adapter, folder: Path) -> dict[str, Way]:
    """From a file in the page cache to an adapter that is checked, loaded and bound."""
    tensors = np.concatenate([array.reshape(-1) for _, array in adapter.tensors()])
    used = np.zeros_like(tensors)
    found: dict[str, Way] = {MEMCPY: lambda: np.copyto(used, tensors), "memcpy into fresh memory": tensors.copy}

    def load_and_bind(given: Path | ax.Adapter) -> object:
        session.load_adapter("fresh", given)
        return session.bind("fresh")

    for suffix in ("safetensors", "onnx_adapter", "npz"):
        file = folder / f"fresh.{suffix}"
        ax.save_adapter(adapter, file)
        found[f"adapterx, load_adapter + bind, .{suffix}"] = lambda file=file: load_and_bind(file)
    plain = folder / "fresh.safetensors"
    found["adapterx, the same, load_adapter(mmap=True)"] = lambda: load_and_bind(ax.load_adapter(plain, mmap=True))
    found["read the bytes (Path.read_bytes)"] = plain.read_bytes
    found["onnxruntime, LoraAdapter.Load (maps, reads nothing)"] = lambda: lora_run_options(
        folder / "fresh.onnx_adapter"
    )
    return found


def with_speed(measured: list[Row], count: int) -> list[Row]:
    """The rows with gigabytes per second."""
    return [
        Row(r.way, r.milliseconds, r.low, r.high, {"GB/s": f"{count / r.milliseconds / 1e6:.2f}"}) for r in measured
    ]


def main() -> None:
    parser = options(__doc__)
    clock_option(parser)
    parser.add_argument("--rounds", type=int, help="turns of each way (20, or 3 with --quick)")
    chosen = parser.parse_args()
    sizes, rounds = (QUICK, 3) if chosen.quick else (FULL, 20)
    rounds = chosen.rounds or rounds
    count = 2 * len(sizes.sites())
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = prepare(folder, sizes)
        files = {}
        for letter, seed in (("a", 1), ("b", 2)):
            files[letter] = folder / f"{letter}.onnx_adapter"
            ax.save_adapter(random_adapter(made.adapter, rank=sizes.rank, seed=seed), files[letter])
        session = ax.AdapterSession(made.model, adapters=dict(files), session_options=one_thread())
        times = interleaved(resident(made, session, files["a"]), rounds=rounds, clock=chosen.clock)
        results.append(Result(f"swap a resident adapter, {count} tensors", NEW_SESSION, rows(times)))
        times = interleaved(swapped_runs(made, session, files), rounds=rounds, clock=chosen.clock)
        results.append(Result("a run of one token, swapped or not", LOADED_BEFORE, rows(times)))
        for rank in (sizes.rank, 4 * sizes.rank):
            adapter = random_adapter(made.adapter, rank=rank, seed=3)
            times = interleaved(first_use(session, adapter, folder), rounds=rounds, clock=chosen.clock)
            title = f"first use of an adapter from disk, {count} tensors, rank {rank}, {megabytes(adapter.nbytes)}"
            results.append(Result(title, MEMCPY, with_speed(rows(times), adapter.nbytes)))
    report(results, as_json=chosen.json)


if __name__ == "__main__":
    main()
