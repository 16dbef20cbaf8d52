"""One session, one copy of the base, three adapters: choose one for each run.

    python samples/02_swap.py [output folder]

The base weights are in memory once. What is swapped are two small matrices at each of 21 places.
"""

import sys
from pathlib import Path

import numpy as np

import adapterx as ax

models = Path(__file__).resolve().parent / "models"
out_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "out/02_swap")
out = ax.extract_adapters(models / "demo.onnx", out_dir, make_inputs=True)

# Adapters come as files or PEFT folders, and may have any rank. One that does not belong to this model is refused
# here, with every fault in one message, and not at the first request.
session = ax.AdapterSession(
    out.model_path,
    adapters={"python": out.adapter_path, "licence": models / "adapters" / "licence"},
)

# `run` is that of onnxruntime.InferenceSession (output names, feeds), with the adapter's name behind it.
# The model reads bytes and gives a score for each of the 256 that may come next.
seen = b"\n# Return the "
feeds = {"input_ids": np.frombuffer(seen, np.uint8).astype(np.int64)[None, :]}
for name in (None, "python", "licence"):
    (logits,) = session.run(["logits"], feeds, adapter=name)
    likely = bytes(np.argsort(logits[0, -1])[::-1][:5].astype(np.uint8)).decode(errors="replace")
    print(f"{name or 'base':8} after {seen.strip().decode()!r} expects one of {' '.join(likely)}")

# Adapters come and go while the session runs.
session.load_adapter("header", models / "adapters" / "header")
print()
for name, adapter in session.adapters.items():
    print(f"{name:8} {adapter}")
print()

# For many runs with one adapter, as in writing a text, bind it once. `rebind` swaps in microseconds.
bound = session.bind("python")
for name in session.adapters:
    bound.rebind(name)
    text = list(b"\nThe ")
    for _ in range(60):
        (logits,) = bound.run(["logits"], {"input_ids": np.array([text])})
        text.append(int(logits[0, -1].argmax()))
    print(f"{name:8} writes {bytes(text).decode(errors='replace').strip()!r}")

session.unload_adapter("header")
