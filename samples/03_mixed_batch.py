"""One batch, five writers: three adapters, the base, and a blend of two, row by row in the same runs.

    python samples/03_mixed_batch.py [output folder]

Every step is one run of the model for all rows. In a terminal they write side by side as they go.
"""

import sys
import textwrap
from pathlib import Path

import numpy as np
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

import adapterx as ax

models = Path(__file__).resolve().parent / "models"
out_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "out/03_mixed_batch")
length = 120  # bytes that each row writes
width = 34  # of a column
out = ax.extract_adapters(models / "demo.onnx", out_dir, make_inputs=True)

session = ax.AdapterSession(
    out.model_path,
    adapters={"python": out.adapter_path} | {name: models / "adapters" / name for name in ("licence", "header")},
)

# One entry a row: an adapter's name, None for the base, or how much of several. Ranks may differ (here 4, 8 and 16),
# and nothing is padded: the adapters lie side by side, and a mask says which of them count for which row.
rows = ["python", "licence", "header", None, {"licence": 0.5, "header": 0.5}]
titles = ["python", "licence", "header", "base", "half licence, half header"]

# All rows begin alike, and draw with the same random numbers: only the adapters differ.
batch = np.tile(np.frombuffer(b"\n", np.uint8).astype(np.int64), (len(rows), 1))
random = np.random.default_rng(4)


def following(batch):
    """The batch with one more byte in every row, drawn at temperature 0.8."""
    (logits,) = session.run(["logits"], {"input_ids": batch[:, -256:]}, adapters=rows)
    scaled = logits[:, -1].astype(np.float64) / 0.8
    chances = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    reached = np.cumsum(chances, axis=1) / chances.sum(axis=1, keepdims=True)
    drawn = (reached < random.random()).sum(axis=1)
    return np.hstack([batch, drawn[:, None]])


def written(row):
    """The text of one row, as wide as its column."""
    text = bytes(row.tolist()).decode(errors="replace").strip("\n").expandtabs(4)
    readable = "".join(c if c.isprintable() or c == "\n" else "·" for c in text)
    lines = [part for line in readable.splitlines() for part in textwrap.wrap(line, width) or [""]]
    return "\n".join(lines)


def side_by_side(batch):
    """One panel a row of the batch."""
    panels = (Panel(Text(written(row)), title=title, width=width + 4) for title, row in zip(titles, batch, strict=True))
    return Columns(panels)


console = Console()
if console.is_terminal:
    with Live(console=console, refresh_per_second=12) as live:
        for _ in range(length):
            batch = following(batch)
            live.update(side_by_side(batch))
else:
    for _ in range(length):
        batch = following(batch)
    for title, row in zip(titles, batch, strict=True):
        print(f"{title}:\n{textwrap.indent(written(row), '    ')}\n")

# What a row gets is what it gets alone, and what all rows get when they share its adapter.
(mixed,) = session.run(["logits"], {"input_ids": batch}, adapters=rows)
(whole,) = session.run(["logits"], {"input_ids": batch}, adapter="header")
print(f"the row of 'header' differs by {abs(mixed[2] - whole[2]).max():.0e} from a batch that is all 'header'")
# `adapterx verify --mixed` proves it for every row, with random adapters:
print(f"verify_mixed: {'passed' if ax.verify_mixed(out.model_path).passed else 'FAILED'}")
