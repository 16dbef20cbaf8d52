"""The plot of bench/mixed.py: what each batch costs over the base, beside the roofline and the goals.

    python bench/mixed.py --json > mixed.json && python bench/plot_mixed.py mixed.json docs/mixed.svg

Needs matplotlib (the extra ``[report]``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WAYS = {
    "kernel, float32 adapters": "#1f77b4",
    "kernel, float16 adapters": "#6baed6",
    "kernel, int8 adapters": "#c6dbef",
    "standard operators, float32 adapters": "#bbbbbb",
}


def main(source: str, target: str) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "adapterx"
    from matplotlib import pyplot as plt

    tables = [each for each in json.loads(Path(source).read_text())["results"] if "one mixed batch" not in each["peer"]]
    groups = sorted({each["title"].split(":")[0] for each in tables})
    figure, axes = plt.subplots(len(groups), 1, figsize=(9, 2.6 * len(groups)), sharex=True, squeeze=False)
    for axis, group in zip(axes[:, 0], groups, strict=True):
        own = [each for each in tables if each["title"].startswith(f"{group}:")]
        for place, each in enumerate(own):
            rows = {row["way"]: row for row in each["rows"]}
            peer = rows[each["peer"]]["milliseconds"]
            for shift, (way, colour) in enumerate(WAYS.items()):
                at = place + (shift - 1.5) * 0.2
                axis.bar(at, rows[way]["milliseconds"] / peer, 0.18, color=colour, label=way if not place else None)
                axis.plot(
                    [at - 0.09, at + 0.09], [float(rows[way]["facts"]["x limit"])] * 2, color="black", linewidth=1.5
                )
        axis.axhline(1, color="black", linewidth=0.6)
        axis.set_ylim(0.9, 1.9)
        axis.set_ylabel("x base")
        axis.set_title(group, loc="left", fontsize=10)
        names = [each["title"].split(": ")[1].split(";")[0].replace(", ", "\n") for each in own]
        axis.set_xticks(range(len(own)), names, fontsize=8)
    axes[0, 0].legend(fontsize=7, title="black line: roofline of memory", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:3])
