"""How the benches measure: ways of doing one thing, interleaved, medians, ratios against a peer of the same run."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Way = Callable[[], object]
PACKAGES = ("adapterx", "numpy", "onnx", "onnx-ir", "onnxruntime")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One way of doing a thing.

    Args:
        way: what was done
        milliseconds: median over the rounds
        low: fastest round
        high: slowest round
        facts: further columns, already printable
    """

    way: str
    milliseconds: float
    low: float
    high: float
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """One table: rows that did the same work, and the one that the others are compared with."""

    title: str
    peer: str
    rows: list[Row]

    def table(self) -> Table:
        peer = next(row.milliseconds for row in self.rows if row.way == self.peer)
        facts = list(dict.fromkeys(name for row in self.rows for name in row.facts))
        table = Table(title=self.title, title_justify="left", box=None, header_style="bold", pad_edge=False)
        table.add_column("way")
        for column in ("median ms", "min", "max", "x peer", *facts):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.rows:
            times = [f"{value:,.4g}" for value in (row.milliseconds, row.low, row.high)]
            ratio = "peer" if row.way == self.peer else f"{row.milliseconds / peer:.3g}"
            table.add_row(row.way, *times, ratio, *(str(row.facts.get(name, "")) for name in facts))
        return table


def interleaved(
    ways: Mapping[str, Way],
    *,
    rounds: int,
    repeat: int = 1,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each way in each round. The ways take turns, so a noisy neighbour hits all of them alike.

    Args:
        ways: name -> what to time
        rounds: how often each way gets its turn
        repeat: calls per turn, for what is too short to time once; the figure is per call
        warm_up: call each way once before, unmeasured
        clock: seconds; ``time.thread_time`` counts the work of this thread, however busy the machine is with others'
    """
    for way in ways.values() if warm_up else ():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            way = ways[name]
            start = clock()
            for _ in range(repeat):
                way()
            times[name].append((clock() - start) * 1e3 / repeat)
    return times


def rows(times: Mapping[str, list[float]], facts: Mapping[str, Mapping[str, Any]] | None = None) -> list[Row]:
    """Medians, with the facts that belong to each way."""
    known = facts or {}
    return [Row(way, statistics.median(ms), min(ms), max(ms), known.get(way, {})) for way, ms in times.items()]


def peak_rss() -> int:
    """Bytes of the largest resident set that this process has had since it was started."""
    try:
        # ru_maxrss also counts what the parent held when it forked; VmHWM is this program's own.
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
    except FileNotFoundError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_fresh_process(script: str, *arguments: str) -> dict[str, Any]:
    """The JSON that ``script`` prints last when it runs alone with ``arguments``."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return {
        "cpu": f"{model or platform.processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": packages,
    }


def options(doc: str | None) -> argparse.ArgumentParser:
    """The options that every bench has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: does it run at all?")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    return parser


def clock_option(parser: argparse.ArgumentParser) -> None:
    """For benches whose ways all run in the calling thread."""
    parser.add_argument(
        "--cpu",
        dest="clock",
        action="store_const",
        const=time.thread_time,
        default=time.perf_counter,
        help="count the CPU time of the thread instead of the clock on the wall: for a machine that others use too",
    )


def report(results: Iterable[Result], *, as_json: bool) -> None:
    """Print tables, or the same as one line of JSON."""
    results = list(results)
    if as_json:
        print(json.dumps({"machine": machine(), "results": [dataclasses.asdict(each) for each in results]}))
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    for key, value in machine().items():
        console.print(f"[dim]{key}: {value}[/dim]", highlight=False)
    for each in results:
        console.print()
        console.print(each.table())


def megabytes(count: float) -> str:
    """``count`` bytes for a table."""
    return f"{count / 1e6:,.0f} MB"
