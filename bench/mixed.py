"""Mixed batches: what rows with adapters of their own cost, against the same graph without any adapter.

Two decoder layers of Llama-3.2-1B shape, adapters of rank 16 at all seven Linears, float32 and int4 base
(MatMulNBits, blocks of 32, accuracy_level 4). Peers: the base graph on plain ONNX Runtime; for the last table eight
runs one adapter at a time, and PEFT's ``adapter_names`` in PyTorch.

``moved`` is the limit K * r * (d_in + d_out) * bytes of the adapters that a step must read; ``GB/s`` is that limit over
the time that the step takes longer than the base. ``x limit`` is the roofline: what the step would cost if these bytes
came as fast as this machine reads memory (measured at the start of each table), and the sums cost nothing.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from measure import Result, Row, Way, clock_option, interleaved, options, report
from mixed_model import LLAMA_1B, QUICK, Models, random_adapter, site_shapes, write_models

import adapterx as ax

RANK = 16
DTYPES = ("float32", "float16", "int8")
ITEM = {"float32": 4, "float16": 2, "int8": 1}
BASE = "base, no sites"
Clock = Callable[[], float]


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """``rows`` of ``tokens``, the first ``adapters`` adapters one after another."""

    rows: int
    tokens: int
    adapters: int

    def entries(self) -> list[str]:
        return [f"a{row % self.adapters}" for row in range(self.rows)]

    def __str__(self) -> str:
        each = f" x {self.tokens} tokens" if self.tokens > 1 else ""
        return f"{self.rows} row(s){each}, {self.adapters} adapter(s)"


BATCHES = (Batch(1, 1, 1), Batch(8, 1, 8), Batch(32, 1, 32), Batch(8, 64, 8))


class Subjects:
    """The sessions of one base at one number of threads."""

    def __init__(self, models: Models, *, threads: int, adapters: int, d: int) -> None:
        self.base = ort.InferenceSession(models.base, _options(threads))
        self.shapes = site_shapes(models.ported["float32"])
        held = {f"a{i}": random_adapter(self.shapes, rank=RANK, seed=i) for i in range(adapters)}
        self.sessions = {
            dtype: ax.AdapterSession(path, held, session_options=_options(threads), kernels="require")
            for dtype, path in models.ported.items()
        }
        plain = models.ported["float32"]
        self.plain = ax.AdapterSession(plain, held, session_options=_options(threads), kernels="off")
        self.d = d

    def feeds(self, batch: Batch) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(batch.rows)
        return {"x": rng.standard_normal((batch.rows, batch.tokens, self.d), np.float32)}

    def ways(self, batch: Batch) -> dict[str, Way]:
        feeds, entries = self.feeds(batch), batch.entries()

        def mixed(session: ax.AdapterSession) -> Way:
            return lambda: session.run(None, feeds, adapters=entries)

        ways: dict[str, Way] = {
            BASE: lambda: self.base.run(None, feeds),
            "sites, no adapter": lambda: self.sessions["float32"].run(None, feeds),
        }
        ways |= {f"kernel, {dtype} adapters": mixed(session) for dtype, session in self.sessions.items()}
        return ways | {
            "standard operators, no adapter": lambda: self.plain.run(None, feeds),
            "standard operators, float32 adapters": mixed(self.plain),
        }

    def moved(self, batch: Batch, way: str) -> float:
        """Bytes of adapters that one run of ``way`` must read, at least."""
        dtype = next((name for name in DTYPES if f"{name} adapters" in way), None)
        numbers = sum(sum(shape) for shape in self.shapes.values()) * RANK * batch.adapters
        return numbers * ITEM[dtype] if dtype else 0


def check(subjects: Subjects, batch: Batch) -> None:
    """Every way gives each row what it gives alone; narrow adapters within their rounding."""
    feeds, entries = subjects.feeds(batch), batch.entries()
    got = {name: way()[0] for name, way in subjects.ways(batch).items() if name.endswith(" adapters")}
    for row in (0, batch.rows - 1):
        alone = subjects.plain.run(None, {"x": feeds["x"][row : row + 1]}, adapter=entries[row])[0]
        for name, result in got.items():
            error = np.abs(result[row] - alone[0]).max() / np.abs(alone).max()
            # An int4 base multiplies with activations rounded to 8 bits: a last bit there is a step here.
            assert error < 2e-2, f"{name}: row {row} is {error:.1e} off"


def read_speed(threads: int) -> float:
    """GB/s at which ``threads`` threads read memory that no cache holds: a dot product of each its own piece."""
    pieces = [np.ones(1 << 25, np.float32) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = time.perf_counter()
            list(pool.map(lambda piece: np.dot(piece[: 1 << 24], piece[1 << 24 :]), pieces))
            best = min(best, time.perf_counter() - start)
    return sum(piece.nbytes for piece in pieces) / best / 1e9


def overheads(subjects: Subjects, title: str, *, rounds: int, clock: Clock, threads: int) -> Iterator[Result]:
    """One table a batch; ratios of medians, and of each round."""
    for batch in BATCHES:
        check(subjects, batch)
        speed = read_speed(threads)
        ways = subjects.ways(batch)
        times = interleaved(ways, rounds=max(3, rounds // (8 if batch.tokens > 1 else 1)), clock=clock)
        base = times[BASE]
        found = []
        for name, ms in times.items():
            extra = statistics.median(a - b for a, b in zip(ms, base, strict=True))
            moved = subjects.moved(batch, name)
            limit = 1 + moved / 1e6 / speed / statistics.median(base)
            facts = {"moved MB": "", "GB/s": "", "x limit": ""}
            if moved:
                facts |= {"moved MB": f"{moved / 1e6:.1f}", "x limit": f"{limit:.2f}"}
            if moved and extra > 0:
                facts["GB/s"] = f"{moved / extra / 1e6:.0f}"
            found.append(Row(name, statistics.median(ms), min(ms), max(ms), facts))
        yield Result(f"{title}: {batch}; memory {speed:.0f} GB/s", BASE, found)


def against(subjects: Subjects, title: str, *, rounds: int, clock: Clock, peft: Way) -> Result:
    """A mixed batch of eight against eight runs, and against PEFT."""
    batch = Batch(8, 1, 8)
    feeds, entries = subjects.feeds(batch), batch.entries()
    session, single = subjects.sessions["float32"], [{"x": row[None]} for row in feeds["x"]]

    def one_by_one() -> list[Any]:
        return [session.run(None, feed, adapter=name) for feed, name in zip(single, entries, strict=True)]

    def bound() -> list[Any]:
        return [each.run(None, feed) for each, feed in zip(pinned, single, strict=True)]

    pinned = [session.bind(name) for name in entries]
    ways: dict[str, Way] = {
        "one mixed batch of 8": lambda: session.run(None, feeds, adapters=entries),
        "eight runs, run(adapter=)": one_by_one,
        "eight runs, bind().run": bound,
        "PEFT adapter_names, PyTorch float32": peft,
    }
    times = interleaved(ways, rounds=rounds, clock=clock)
    found = [Row(name, statistics.median(ms), min(ms), max(ms)) for name, ms in times.items()]
    return Result(f"{title}: 8 rows, 8 adapters, decode", "one mixed batch of 8", found)


def _options(threads: int) -> ort.SessionOptions:
    made = ort.SessionOptions()
    made.intra_op_num_threads = threads
    made.log_severity_level = 3
    # Several sessions live in this process: their threads must not spin beside those of another's turn.
    made.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return made


def main() -> None:
    parser = options(__doc__)
    clock_option(parser)
    parser.add_argument("--rounds", type=int, help="turns of each way (40, or 3 with --quick)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 32], choices=[4, 32])
    chosen = parser.parse_args()
    sizes, rounds = (QUICK, 3) if chosen.quick else (LLAMA_1B, 40)
    rounds = chosen.rounds or rounds
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for bits in chosen.bits:
            models = write_models(Path(folder) / f"{bits}", sizes, bits=bits, dtypes=DTYPES)
            for threads in chosen.threads:
                from mixed_peft import peft_way

                subjects = Subjects(models, threads=threads, adapters=32, d=sizes.d)
                title = f"{'int4' if bits == 4 else 'float32'} base, {threads} thread(s)"
                results += overheads(subjects, title, rounds=rounds, clock=chosen.clock, threads=threads)
                batch = Batch(8, 1, 8)
                way = peft_way(sizes, subjects.feeds(batch)["x"], batch.entries(), rank=RANK, threads=threads)
                results.append(against(subjects, title, rounds=rounds, clock=chosen.clock, peft=way))
    report(results, as_json=chosen.json)


if __name__ == "__main__":
    main()
