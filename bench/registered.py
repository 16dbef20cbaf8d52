"""Throughput and memory while more and more adapters are registered: decode of 8 rows, adapters by Zipf's law.

Each of the 8 places of the batch holds a request for one adapter and decodes 64 tokens; then the next request comes,
its adapter drawn with probability 1 / place ** 1.5 of all that are registered. int4 base of two Llama-3.2-1B layers,
float16 adapters of rank 16 (2.8 MB each). A gigabyte of adapters may lie in memory, those beyond it in mapped files.
Peer: the same with one registered adapter. Memory is that of a process of its own: what it holds besides the pages of
files, and besides what it held before the first adapter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
from measure import Result, Row, in_fresh_process, megabytes, options, report
from mixed_model import LLAMA_1B, QUICK, random_adapter, site_shapes, write_models

import adapterx as ax

ROWS, TOKENS, RANK, ZIPF = 8, 64, 16, 1.5
COUNTS = (1, 10, 100, 1000, 2000)
IN_MEMORY = 1 << 30


class Service:
    """A session with ``count`` adapters and a batch of requests that never ends."""

    def __init__(self, model: Path, count: int, *, threads: int, d: int) -> None:
        made = ort.SessionOptions()
        made.intra_op_num_threads = threads
        made.log_severity_level = 3
        made.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = ax.AdapterSession(model, session_options=made, max_cpu_bytes=IN_MEMORY)
        shapes = site_shapes(model)
        self.session.run(None, {"x": np.zeros((ROWS, 1, d), np.float32)})
        self.before = anonymous()
        for i in range(count):
            self.session.load_adapter(f"a{i}", random_adapter(shapes, rank=RANK, seed=i))
        rng = np.random.default_rng(count)
        self.x = rng.standard_normal((ROWS, 1, d), np.float32)
        self.requests = requests(rng, count)
        self.places = [next(self.requests) for _ in range(ROWS)]
        # Requests end one after another, not all in one step.
        self.left = [TOKENS * (i + 1) // ROWS for i in range(ROWS)]

    def step(self) -> None:
        self.session.run(None, {"x": self.x}, adapters=self.places)
        for i in range(ROWS):
            self.left[i] -= 1
            if not self.left[i]:
                self.places[i], self.left[i] = next(self.requests), TOKENS


def requests(rng: np.random.Generator, count: int) -> Iterator[str]:
    """Names of adapters, for ever; which of them are popular differs from count to count."""
    odds = 1 / np.arange(1, count + 1) ** ZIPF
    names = rng.permutation(count)
    while True:
        yield from (f"a{names[i]}" for i in rng.choice(count, size=256, p=odds / odds.sum()))


def anonymous() -> int:
    """Bytes of this process that belong to no file."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def measured(model: Path, counts: tuple[int, ...], chosen: argparse.Namespace, d: int) -> Result:
    services = {count: Service(model, count, threads=chosen.threads, d=d) for count in counts}
    steps = 8 if chosen.quick else TOKENS
    times: dict[int, list[float]] = {count: [] for count in counts}
    for service in services.values():
        for _ in range(steps):
            service.step()
    for _ in range(chosen.rounds or (2 if chosen.quick else 20)):
        for count, service in services.items():
            start = time.perf_counter()
            for _ in range(steps):
                service.step()
            times[count].append((time.perf_counter() - start) * 1e3 / steps)
    found = []
    for count, ms in times.items():
        alone = in_fresh_process(__file__, "--memory", str(count), "--model", str(model), "--d", str(d))
        median = statistics.median(ms)
        facts = {"tokens/s": f"{ROWS * 1e3 / median:,.0f}", "memory": megabytes(alone["loaded"])}
        facts |= {"bytes of adapters": megabytes(alone["adapters"])}
        found.append(Row(f"{count} registered", median, min(ms), max(ms), facts))
    return Result(f"one step of {ROWS} rows, {chosen.threads} thread(s)", found[0].way, found)


def memory(model: Path, count: int, d: int) -> None:
    service = Service(model, count, threads=1, d=d)
    for _ in range(2 * TOKENS):
        service.step()
    total = sum(adapter.nbytes for adapter in service.session.adapters.values())
    print(json.dumps({"loaded": anonymous() - service.before, "adapters": total}))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, help="turns of 64 steps of each (20, or 2 with --quick)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--d", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.memory:
        memory(chosen.model, chosen.memory, chosen.d)
        return
    sizes, counts = (QUICK, (1, 10)) if chosen.quick else (LLAMA_1B, COUNTS)
    with tempfile.TemporaryDirectory() as folder:
        model = write_models(Path(folder) / "4", sizes, bits=4, dtypes=("float16",)).ported["float16"]
        report([measured(model, counts, chosen, sizes.d)], as_json=chosen.json)


if __name__ == "__main__":
    main()
