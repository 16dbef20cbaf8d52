"""How exact each kind of adapter and each quantized base is, on the models of the test zoo.

    python bench/kinds.py

Every model is exported with adapter a inside. It is extracted; then a, another adapter b, an adapter c of another rank
and none are run and compared with PyTorch, and on quantized bases with ONNX Runtime on the same quantized base with
that adapter exported in float. Outputs are of the order of one. The models are built on first use, which takes minutes,
and needs the extra [dev].
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from adapterx.errors import FeedError
from adapterx.graph.extract import extract_adapters
from adapterx.runtime.session import AdapterSession
from tests.zoo import CASES, build
from tests.zoo.case import Case

LABELS = ("a", "b", "c", "base")


def errors(name: str) -> dict[str, float]:
    """Largest absolute error of a case's outputs, by adapter; no entry where there is nothing to compare with."""
    built, case, found = build(name), CASES[name], {}
    given = built.adapters["a"] if case.needs_adapter or case.file or case.kind in {"bias", "saved"} else None
    static: Literal["allow", "refuse"] = "allow" if "static" in case.quantized else "refuse"
    with tempfile.TemporaryDirectory() as folder:
        out = extract_adapters(built.model, folder, make_inputs=True, adapter=given, static_qdq=static)
        session = AdapterSession(out.model_path)
        for label in LABELS:
            if label not in built.expected or (label != "base" and label not in built.adapters):
                continue
            if label != "base":
                session.load_adapter(label, built.adapters[label])
            try:
                got = session.run(None, built.feeds, adapter=None if label == "base" else label)
            except FeedError:
                # Trained in full: the graph has no base.
                continue
            gaps = (np.abs(np.asarray(x, np.float32) - y) for x, y in zip(got, built.expected[label], strict=True))
            found[label] = max(float(gap.max(initial=0)) for gap in gaps)
    return found


def group(case: Case) -> str:
    """What a case stands for in the table."""
    if case.quantized:
        return f"LoRA on {case.quantized.replace('_', ' ')}"
    return f"{case.kind}, {'float16' if case.atol > 1e-3 else 'float32'}"


def measured(*, quick: bool) -> dict[str, dict[str, float]]:
    """The worst of every group, by adapter, and how many models it stands for."""
    worst: dict[str, dict[str, float]] = defaultdict(lambda: {"models": 0})
    for name, case in CASES.items():
        skipped = case.negative or case.unsupported or not case.runs_on_ort
        if skipped or (case.lora and case.lora.also) or (quick and group(case) in worst):
            continue
        row = worst[group(case)]
        row["models"] += 1
        for label, error in errors(name).items():
            row[label] = max(row.get(label, 0.0), error)
    return dict(worst)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model a row")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args()
    rows = measured(quick=options.quick)
    if options.json:
        print(json.dumps(rows))
        return
    table = Table("kind", "models", "exported (a)", "another (b)", "another rank (c)", "none", box=None)
    for kind, row in sorted(rows.items()):
        table.add_row(kind, str(int(row["models"])), *(f"{row[k]:.1e}" if k in row else "" for k in LABELS))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
