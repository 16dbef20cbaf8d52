"""A base model that never had an adapter, and adapters made for it: run them, merge one in, make two into one.

    python samples/04_any_base.py [output folder]

Nobody has to export the base again: the adapters' own module names say where they act.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

import adapterx as ax

models = Path(__file__).resolve().parent / "models"
out_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "out/04_any_base")
out_dir.mkdir(parents=True, exist_ok=True)

# The demo model was exported with an adapter inside. Its plain base: nothing of the adapter, and no ports.
out = ax.extract_adapters(models / "demo.onnx", out_dir / "extracted", make_inputs=True)
base = ax.merge_adapter(out.model_path, out.adapter, out_dir / "base.onnx", weight=0.0).path

# Sites are found from the adapters' own module names, and put in in memory. `ax.inject_adapters` writes a file instead.
adapters = {name: models / "adapters" / name for name in ("licence", "header")}
session = ax.AdapterSession(base, adapters=adapters)
print(f"{len(session.sites)} sites were put into {base.name}")

feeds = {"input_ids": np.frombuffer(b"\nThe ", np.uint8).astype(np.int64)[None, :]}


def expected(logits):
    """The five bytes that may come next."""
    return bytes(np.argsort(logits[0, -1])[::-1][:5].astype(np.uint8)).decode(errors="replace")


for name in (None, *adapters):
    (logits,) = session.run(["logits"], feeds, adapter=name)
    print(f"{name or 'base':8} expects one of {expected(logits)!r}")

# Folded into the weights, an adapter costs nothing, and any runtime will do.
merged = ax.merge_adapter(base, adapters["licence"], out_dir / "licence.onnx")
(plain,) = ort.InferenceSession(str(merged.path)).run(["logits"], feeds)
(fed,) = session.run(["logits"], feeds, adapter="licence")
print(f"merged   expects one of {expected(plain)!r}, {np.abs(plain - fed).max():.0e} from the adapter that is fed")

# Two adapters in one, exactly: ranks one after another. `rank=` makes it smaller, by SVD.
both = ax.combine([(ax.load_adapter(path), 0.5) for path in adapters.values()])
session.load_adapter("both", both)
(logits,) = session.run(["logits"], feeds, adapter="both")
print(f"both     expects one of {expected(logits)!r}, {both}")
