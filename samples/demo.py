"""What `make demo` runs: one model as PyTorch exported it, the adapter inside taken out, two more swapped in.

Everything it reads is in `samples/models`: a causal language model over bytes, three adapters, and text that neither
has seen in training (`samples/models/README.md` says where all of it comes from). Needs `adapterx[cpu]` and 20 seconds.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import adapterx as ax

MODELS = Path(__file__).resolve().parent / "models"
OUT = Path("out/demo")
KINDS = {"python": "Python code", "licence": "licences", "header": "C headers"}
NAMES = (None, *KINDS)  # None is the base
CONTEXT = 256  # bytes that the model looks back
console = Console(highlight=False)


def main(*, windows: int = 64, length: int = 240) -> None:
    """The whole demo; over fewer ``windows`` of text and with a shorter sample where it must be quick."""
    started = time.monotonic()
    heading("1  One exported model, one adapter inside: take it out")
    out = extract()
    heading("2  One session, three adapters: each must be best on its own kind of text")
    paths = adapter_paths(out)
    session = ax.AdapterSession(out.model_path, adapters=paths)
    table = {name: {kind: perplexity(session, name, kind=kind, windows=windows) for kind in KINDS} for name in NAMES}
    print_perplexities(table)
    heading("3  The same prompt and the same seed; only the adapter differs")
    for name in NAMES:
        print_sample(name, sample(session, name, prompt=b"\n", length=length))
    heading("4  What a swap costs")
    print_costs(session, paths)
    faults = losers(table)
    if faults:
        sys.exit("\nThe demo failed:\n  " + "\n  ".join(faults))
    print_next(time.monotonic() - started)


def heading(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]\n")


def extract() -> ax.Extraction:
    """The model with graph inputs where the adapter's weights were, and the adapter as a file of its own."""
    started = time.perf_counter()
    out = ax.extract_adapters(MODELS / "demo.onnx", OUT, make_inputs=True)
    took = time.perf_counter() - started
    console.print(f"  {len(out.sites)} sites found in samples/models/demo.onnx and extracted in {took:.2f} s:")
    rank = out.adapter.ranks[0]
    for path, what in (
        (out.model_path, "the base, with places for adapters"),
        (out.adapter_path, f"the adapter, rank {rank}"),
    ):
        console.print(f"    {path!s:28} {megabytes(path.stat().st_size):>8}   {what}")
    return out


def adapter_paths(out: ax.Extraction) -> dict[str, Path]:
    """The adapter that was in the export, and two PEFT folders that never were near ONNX."""
    return {"python": out.adapter_path} | {name: MODELS / "adapters" / name for name in ("licence", "header")}


def perplexity(session: ax.AdapterSession, name: str | None, *, kind: str, windows: int) -> float:
    """exp of the mean loss per byte over at most ``windows`` windows of held-out text; 256 would be blind guessing."""
    text = np.frombuffer((MODELS / "held_out" / f"{kind}.txt").read_bytes(), np.uint8)
    rows = text[: len(text) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)[:windows].astype(np.int64)
    bound = session.bind(name)
    losses = []
    for batch in np.array_split(rows, -(-len(rows) // 16)):
        (logits,) = bound.run(["logits"], {"input_ids": batch})
        seen, follows = logits[:, :-1].astype(np.float64), batch[:, 1:, None]
        top = seen.max(axis=-1, keepdims=True)
        total = top + np.log(np.exp(seen - top).sum(axis=-1, keepdims=True))
        losses.append((total - np.take_along_axis(seen, follows, axis=-1)).reshape(-1))
    return float(np.exp(np.concatenate(losses).mean()))


def losers(table: dict[str | None, dict[str, float]]) -> list[str]:
    """One sentence for every adapter that another one, or the base, beats on its own kind of text."""
    faults = []
    for kind in KINDS:
        best = min(NAMES, key=lambda name: table[name][kind])
        if best != kind:
            faults.append(
                f"adapter {kind!r} has perplexity {table[kind][kind]:.3f} on its own kind of text, "
                f"{best or 'the base'} has {table[best][kind]:.3f}"
            )
    return faults


def sample(session: ax.AdapterSession, name: str | None, *, prompt: bytes, length: int, seed: int = 4) -> str:
    """``length`` bytes drawn one by one at temperature 0.8."""
    bound, random = session.bind(name), np.random.default_rng(seed)
    text = list(prompt)
    for _ in range(length):
        (logits,) = bound.run(["logits"], {"input_ids": np.array([text[-CONTEXT:]], np.int64)})
        scaled = logits[0, -1].astype(np.float64) / 0.8
        chances = np.exp(scaled - scaled.max())
        text.append(int(random.choice(256, p=chances / chances.sum())))
    return bytes(text[len(prompt) :]).decode(errors="replace")


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def swap_seconds(session: ax.AdapterSession, *, times: int = 300) -> dict[str, float]:
    """Median seconds to change a bound session over to each adapter."""
    bound = session.bind(None)
    took: dict[str, list[float]] = {name: [] for name in KINDS}
    for i in range(times * len(KINDS)):
        name = list(KINDS)[i % len(KINDS)]
        took[name].append(seconds(lambda name=name: bound.rebind(name)))
    return {name: statistics.median(each) for name, each in took.items()}


def print_perplexities(table: dict[str | None, dict[str, float]]) -> None:
    grid = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    grid.add_column("perplexity per byte")
    for kind in KINDS.values():
        grid.add_column(f"on {kind}", justify="right")
    for name, row in table.items():
        cells = []
        for kind, value in row.items():
            best = value == min(each[kind] for each in table.values())
            cells.append(f"[bold green]{value:.2f} *[/]" if best else f"{value:.2f}  ")
        grid.add_row(label(name), *cells)
    console.print(Padding(grid, (0, 2), expand=False))
    console.print("\n  [dim]Lower is better, * is the best of its column. No text here was trained on.[/dim]")


def print_sample(name: str | None, text: str) -> None:
    readable = "".join(c if c.isprintable() or c == "\n" else "·" for c in text.expandtabs(4))
    console.print(f"  [bold cyan]{label(name)}[/]")
    console.print(Padding(Text(textwrap.dedent(readable.strip("\n"))), (0, 0, 0, 4), expand=False))
    console.print()


def print_costs(session: ax.AdapterSession, paths: dict[str, Path]) -> None:
    loads = {name: seconds(lambda name=name: session.load_adapter(name, paths[name])) for name in KINDS}
    swaps = swap_seconds(session)
    exported = MODELS / "demo.onnx"
    anew = seconds(lambda: ort.InferenceSession(exported, providers=["CPUExecutionProvider"]))
    grid = Table(box=None, header_style="bold", padding=(0, 3, 0, 0))
    for column in ("", "rank", "memory", "load from disk", "swap"):
        grid.add_column(column, justify="right" if column else "left")
    grid.add_row(label(None), "", megabytes((OUT / "demo.onnx").stat().st_size), "", "")
    for name, adapter in session.adapters.items():
        ranks = ", ".join(map(str, adapter.ranks))
        times = f"{loads[name] * 1e3:.1f} ms", f"{swaps[name] * 1e6:.1f} µs"
        grid.add_row(label(name), ranks, f"+ {megabytes(adapter.nbytes)}", *times)
    console.print(Padding(grid, (0, 2), expand=False))
    whole = megabytes(exported.stat().st_size)
    console.print(
        f"\n  [dim]Else each adapter is a model of its own: {whole} again, and {anew * 1e3:.0f} ms to open.[/dim]"
    )


def print_next(seconds: float) -> None:
    heading(f"Done in {seconds:.0f} s. See the places that were found:")
    console.print(f"  {command()} sites samples/models/demo.onnx\n", soft_wrap=True)


def command() -> str:
    """How to call the `adapterx` of this Python from here: by name if that finds it, else by path."""
    beside = Path(sys.executable).with_name("adapterx")
    found = shutil.which("adapterx")
    return "adapterx" if found and Path(found) == beside else os.path.relpath(beside)


def label(name: str | None) -> str:
    return "base" if name is None else f"base + {name}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
    os.chdir(MODELS.parent.parent)
    main()
