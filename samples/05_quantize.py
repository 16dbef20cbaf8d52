"""From a torch model to a mixed batch on a 4-bit base: AWQ, LoRA on top, ONNX, and back out comes the adapter.

    pip install "adapterx[cpu,quant,train]" && python samples/05_quantize.py [output folder]

The base is the one of `make demo`. What is printed is perplexity a byte, on text that nothing was trained on.
"""

import math
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from make_demo_model import new_base
from peft import LoraConfig

import adapterx as ax
from adapterx import quant
from adapterx.quant.lora import attach_lora

models = Path(__file__).resolve().parent / "models"
out_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "out/05_quantize")
out_dir.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)


def windows(kind, length=128):
    """Held-out text as rows of bytes."""
    text = np.frombuffer((models / "held_out" / f"{kind}.txt").read_bytes(), np.uint8).astype(np.int64)
    return torch.from_numpy(text[: len(text) // length * length].reshape(-1, length))


def perplexity(logits_of, rows):
    with torch.no_grad():
        logits = torch.as_tensor(logits_of(rows))[:, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


# The weights of the demo's base, out of the ONNX file that they were exported to.
base, weights = new_base().eval(), {}
for name, value in ir.load(models / "demo.onnx").graph.initializers.items():
    kept = value.metadata_props.get("pkg.onnxscript.optimizer.folded_from", name)
    weights[kept.strip("[]'").removeprefix("base_model.model.").replace(".base_layer", "")] = value.const_value.numpy()
with torch.no_grad():
    for name, parameter in base.named_parameters():
        array = weights.get(name, weights["lm_head.weight"])  # the embedding is tied to the head
        turned = name.endswith("_proj.weight")  # an exported MatMul has its weight the other way round
        parameter.copy_(torch.tensor(array.T if turned else array))

licence = windows("licence")
train, held_out = licence[:96], licence[96:128]
print(f"float base               {perplexity(lambda rows: base(rows).logits, held_out):.3f}")

# 1. Four bits. The calibration is a loop of your own over a few batches. What AWQ scales stays beside the layers, so
# that adapters of the float base fit as they are.
config = quant.AWQConfig(bits=4, group_size=32, use_sym=False)
model = quant.quantize(
    base, config, run_fn=lambda prepared: [prepared(rows) for rows in windows("python")[:32].split(8)]
)
print(f"AWQ, 4 bits              {perplexity(lambda rows: model(rows).logits, held_out):.3f}")

# 2. LoRA on top, as on any model: gradients reach the adapter, the codes stay.
lora = attach_lora(model, LoraConfig("CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=4e-3)
for step in range(16):
    rows = train[torch.arange(8) + 8 * step % 88]
    lora(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
lora.eval()
in_torch = perplexity(lambda rows: lora(input_ids=rows).logits, held_out)
print(f"+ LoRA, in torch         {in_torch:.3f}")

# 3. One file: codes in ONNX Runtime's own operators, the adapter in float. `exact` multiplies in float32; without it
# decoding is several times faster and results are off by half a percent.
done = quant.export(lora, out_dir / "exported.onnx", exact=True)
size = done.path.stat().st_size
print(f"\n{len(done.layers)} layers became {done.layers[0].became}; the file has {size:,} bytes\n")

# 4. The adapter out of it again, and a session over the base that is left.
out = ax.extract_adapters(done.path, out_dir / "extracted", make_inputs=True)
session = ax.AdapterSession(
    out.model_path, adapters={"ours": out.adapter_path, "header": models / "adapters" / "header"}
)


def in_onnx(rows, **adapter):
    feeds = {"input_ids": rows.numpy(), "attention_mask": np.ones_like(rows.numpy())}
    return session.run(["logits"], feeds, **adapter)[0]


in_ort = perplexity(lambda rows: in_onnx(rows, adapter="ours"), held_out)
print(f"+ LoRA, on ONNX Runtime  {in_ort:.3f}")
print(f"base alone               {perplexity(in_onnx, held_out):.3f}")

# 5. Every row its own adapter: ours, one that was trained on the float base, and none.
lora.load_adapter(models / "adapters" / "header", "header")
rows = torch.cat([held_out[:1], windows("header")[:1], held_out[1:2]])
mixed = in_onnx(rows, adapters=["ours", "header", None])
expected = []
with torch.no_grad():
    for row, name in zip(rows.split(1), ("default", "header", None), strict=True):
        lora.set_adapter(name or "default")
        if name is None:
            with lora.disable_adapter():
                expected.append(lora(input_ids=row).logits)
        else:
            expected.append(lora(input_ids=row).logits)
print(f"\na mixed batch differs from torch by {np.abs(mixed - torch.cat(expected).numpy()).max():.1e}")
