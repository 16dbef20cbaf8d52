"""Take the adapter out of an exported model.

    python samples/01_extract.py [output folder]

`samples/models/demo.onnx` is a small language model with one LoRA adapter in it, as `torch.onnx.export` wrote it: in
its graph the adapter is some nameless matrices next to others.
"""

import sys
from pathlib import Path

import adapterx as ax

models = Path(__file__).resolve().parent / "models"
out_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "out/01_extract")

# Where do adapters act in this model? One row a place, named as in the checkpoint that was exported. The last column
# says what told the name: exporters lose most of them. Finding nothing is an error, never an empty list.
print(ax.find_sites(models / "demo.onnx"))

# Out they come. With `make_inputs`, the places become graph inputs: any adapter of any rank can be fed there, and a
# model that is fed none is exactly the base. Without it they become external weights, for runtimes that want those.
out = ax.extract_adapters(models / "demo.onnx", out_dir, make_inputs=True)

print()
print(f"model    {out.model_path}  {out.model_path.stat().st_size:,} bytes, no adapter in it")
print(f"adapter  {out.adapter_path}  {out.adapter_path.stat().st_size:,} bytes")

# An adapter is tensors by site. The scale (alpha / r) is folded into B, so that these two matrices are all there is:
# y = base + (x @ A.T) @ B
name, low_rank = next(iter(out.adapter.sites.items()))
print(f"\n{name}: A {low_rank.a.shape}, B {low_rank.b.shape}, {low_rank.dtype}")

# The PEFT folder that went into the export holds the same adapter: here are both, and the largest difference.
peft = ax.load_adapter(models / "adapters" / "python")
worst = max(abs(peft.sites[site].b - low_rank.b).max() for site, low_rank in out.adapter.sites.items())
print(f"extracted {out.adapter}\nPEFT      {peft}\nB differs by {worst:.1e}")
