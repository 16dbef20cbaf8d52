"""Perplexity by method and bits, on a small language model that is really trained, and on its twin with outliers.

    python bench/quant.py --plot docs/quant.svg

The model is that of bench/quant_lm.py; it is trained first where the cache does not hold it. Weights in asymmetric
groups of 32, the head and the embedding in float, 64 x 128 tokens of calibration, 64 x 256 tokens that were never seen.
Packages that quantize, too, take part where they are installed (bench/quant_peers.py). Seconds are those of one run,
calibration included.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from measure import machine, options
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import quant_peers
import torch
from torch import nn

from adapterx.quant import (
    AutoRoundConfig,
    AWQConfig,
    DynamicQuantConfig,
    FP8Config,
    GPTQConfig,
    HQQConfig,
    MXQuantConfig,
    RTNConfig,
    SmoothQuantConfig,
    StaticQuantConfig,
    TEQConfig,
    quantize,
)
from tests.quant.language import language, perplexity, text

GROUP = {"group_size": 32, "use_sym": False}
BITS = (4, 3, 2)
# Method -> its config at some bits, and the peers that it is held against.
METHODS: Mapping[str, tuple[Callable[[int], Any], tuple[str, ...]]] = {
    "RTN": (lambda bits: RTNConfig(bits=bits, **GROUP), ("Neural Compressor, RTN", "torchao, affine")),
    "RTN, searched": (lambda bits: RTNConfig(bits=bits, use_mse_search=True, **GROUP), ()),
    "HQQ": (lambda bits: HQQConfig(bits=bits, group_size=32, quant_zero=False), ("hqq",)),
    "TEQ": (lambda bits: TEQConfig(bits=bits, **GROUP), ()),
    "AWQ": (lambda bits: AWQConfig(bits=bits, **GROUP), ("Neural Compressor, AWQ",)),
    "GPTQ": (lambda bits: GPTQConfig(bits=bits, **GROUP), ("Neural Compressor, GPTQ",)),
    "AutoRound": (lambda bits: AutoRoundConfig(bits=bits, **GROUP), ("auto-round, 200 steps",)),
}
# By how much a method may be worse than its best peer: RTN and HQQ are the same arithmetic.
SLACK = {4: 0.01, 3: 0.01, 2: 0.02}
ROUNDED: Mapping[str, tuple[float, Any]] = {
    "nf4, groups of 64": (4, RTNConfig(dtype="nf4", group_size=64)),
    "FP8 e4m3, weights and inputs": (8, FP8Config(fp8_config="E4M3")),
    "MXFP8, weights": (8, MXQuantConfig(w_dtype="fp8_e4m3", act_dtype="fp8_e4m3", weight_only=True)),
    "MXFP8, weights and inputs": (8, MXQuantConfig(w_dtype="fp8_e4m3", act_dtype="fp8_e4m3")),
    "MXFP4, weights": (4, MXQuantConfig(w_dtype="fp4", act_dtype="fp4", weight_only=True)),
    "MXFP4, weights and inputs": (4, MXQuantConfig(w_dtype="fp4", act_dtype="fp4")),
    "int8, dynamic": (8, DynamicQuantConfig(w_granularity="per_channel")),
    "int8, static": (8, StaticQuantConfig()),
    "int8, static, SmoothQuant 0.5": (8, SmoothQuantConfig()),
    "int8, static, SmoothQuant auto": (8, SmoothQuantConfig(alpha="auto")),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One way of quantizing one model.

    Args:
        model: "plain" or "twin"
        way: method or peer
        bits: of a code
        stored: bits a weight, with a float16 scale and the zero point of each group
        perplexity: on text that was not seen
        seconds: of one run
    """

    model: str
    way: str
    bits: int
    stored: float
    perplexity: float
    seconds: float


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--plot", type=Path, help="draw perplexity against bits a weight into this file (.svg, .png)")
    parser.add_argument("--only", default=".*", help="ways whose names match this regular expression")
    parser.add_argument("--models", nargs="+", choices=("plain", "twin"), default=("plain", "twin"))
    parser.add_argument("--write", type=Path, help="keep the rows in this JSON file, and read those that it has")
    asked = parser.parse_args()
    if asked.plot:
        _pyplot()
    steps, calibration = (20, 8) if asked.quick else (800, 64)
    known = [Row(**row) for row in json.loads(asked.write.read_text())] if asked.write and asked.write.exists() else []
    console = Console(width=None if sys.stdout.isatty() else 140, stderr=asked.json)
    rows, floats = [], {}
    for name in asked.models:
        floats[name] = perplexity(language(steps, twin=name == "twin"), _tokens(quick=asked.quick))
        shown = list(text().calibration(calibration).split(8))
        have = {(row.way, row.bits): row for row in known if row.model == name}
        for way, bits, stored, quantized in _ways(asked.only, console, quick=asked.quick):
            if (way, bits) not in have:
                model = language(steps, twin=name == "twin")
                start = time.perf_counter()
                with quant_peers.quiet():
                    model = quantized(model, shown)
                seconds = time.perf_counter() - start
                found = perplexity(model, _tokens(quick=asked.quick))
                have[way, bits] = Row(name, way, bits, stored, found, seconds)
            rows.append(have[way, bits])
            if asked.write:
                others = [row for row in known if row.model != name]
                asked.write.write_text(json.dumps([dataclasses.asdict(row) for row in (*others, *have.values())]))
        known = [row for row in known if row.model != name] + list(have.values())
    if asked.json:
        print(json.dumps({"machine": machine(), "float": floats, "rows": [dataclasses.asdict(row) for row in rows]}))
    else:
        _print(rows, floats, console)
    if asked.plot:
        _draw(rows, floats, asked.plot)


def _tokens(*, quick: bool) -> torch.Tensor:
    return text().evaluation(8, 64) if quick else text().evaluation()


def _ways(only: str, console: Console, *, quick: bool) -> Iterator[tuple[str, int, float, Callable[..., nn.Module]]]:
    """Name, bits, bits stored, and the function of a model and calibration rows."""

    def by_config(config: Any) -> Callable[..., nn.Module]:
        return lambda model, rows: quantize(model, config, run_fn=_show, run_args=(rows,))

    wanted = re.compile(only)
    for name, (config, _) in METHODS.items():
        for bits in BITS[-1:] if quick else BITS:
            if wanted.search(way := f"adapterx, {name}"):
                made = config(bits)
                if quick and name == "AutoRound":
                    made = AutoRoundConfig(bits=bits, iters=5, **GROUP)
                zero = 16 if name == "HQQ" else bits
                yield way, bits, bits + (zero + 16) / 32, by_config(made)
    for name, (bits, config) in ROUNDED.items():
        if wanted.search(way := f"adapterx, {name}"):
            stored = bits + (8 / 32 if "MX" in name else 16 / 64 if "nf4" in name else 0)
            yield way, int(bits), stored, by_config(config)
    for name, (package, peer) in {} if quick else {**quant_peers.PEERS, **quant_peers.NF4_PEERS}.items():
        if not wanted.search(name):
            continue
        if why := quant_peers.missing(package):
            console.print(f"[dim]{name}: {package} {why}[/dim]", highlight=False)
            continue
        for bits in (4,) if name in quant_peers.NF4_PEERS else BITS:
            zero = 16 if "hqq" in name.lower() else bits
            stored = bits + (16 / 64 if name in quant_peers.NF4_PEERS else (zero + 16) / 32)
            yield name, bits, stored, lambda model, rows, peer=peer, bits=bits: peer(model, bits, rows)


def _show(model: nn.Module, rows: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for each in rows:
            model(input_ids=each)


def _print(rows: list[Row], floats: Mapping[str, float], console: Console) -> None:
    for key, value in machine().items():
        console.print(f"[dim]{key}: {value}[/dim]", highlight=False)
    for model, float_perplexity in floats.items():
        here = {(row.way, row.bits): row for row in rows if row.model == model}
        table = Table(title=f"{model}, float {float_perplexity:.3f}", title_justify="left", box=None, pad_edge=False)
        for column in ("way", "W8", "W4", "W3", "W2", "s", "goal"):
            table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
        for way in dict.fromkeys(name for name, _ in here):
            cells = [here.get((way, bits)) for bits in (8, *BITS)]
            seconds = max(row.seconds for row in cells if row)
            numbers = (f"{row.perplexity:.3f}" if row else "" for row in cells)
            table.add_row(way, *numbers, f"{seconds:.1f}", _goal(way, here))
        console.print()
        console.print(table)


def _goal(way: str, here: Mapping[tuple[str, int], Row]) -> str:
    """Whether a method is as good as the best of its peers, where one took part; else ""."""
    peers = METHODS.get(way.removeprefix("adapterx, "), (None, ()))[1]
    missed, compared = [], 0
    for bits in BITS:
        best = min((here[peer, bits].perplexity for peer in peers if (peer, bits) in here), default=None)
        if best is None or (way, bits) not in here:
            continue
        compared += 1
        same = way.endswith((", RTN", ", HQQ"))
        limit = best + 0.05 if same else best * (1 + SLACK[bits])
        if here[way, bits].perplexity > limit:
            missed.append(f"W{bits} {here[way, bits].perplexity / best - 1:+.1%}")
    return f"missed: {', '.join(missed)}" if missed else "met" if compared else ""


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    return pyplot


def _draw(rows: list[Row], floats: Mapping[str, float], path: Path) -> None:
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(floats), figsize=(6.2 * len(floats), 5.2), squeeze=False)
    colours = {way: f"C{index % 10}" for index, way in enumerate(dict.fromkeys(row.way for row in rows))}
    for axis, (model, float_perplexity) in zip(axes[0], floats.items(), strict=True):
        axis.axhline(float_perplexity, color="0.6", linewidth=1, label=f"float, {float_perplexity:.1f}")
        for way in dict.fromkeys(row.way for row in rows if row.model == model):
            line = sorted((row.stored, row.perplexity) for row in rows if (row.model, row.way) == (model, way))
            style = "o-" if way.startswith("adapterx") else "x--"
            axis.plot(*zip(*line, strict=True), style, color=colours[way], label=way, markersize=4, linewidth=1)
        axis.set(title=model, xlabel="bits a weight", ylabel="perplexity", yscale="log")
        axis.set_ylim(float_perplexity * 0.98, float_perplexity * 2.2)
    axes[0][-1].legend(fontsize=6.5, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
