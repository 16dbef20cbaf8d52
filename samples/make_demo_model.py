"""Train the model of `make demo` again: a base on mixed text, three adapters on one kind each, one export.

    pip install "adapterx[cpu,train]" && python samples/make_demo_model.py

It reads text that any machine with Python has: the standard library, the C headers of CPython, the licences and the
readmes of installed packages (and of `/usr/share/common-licenses`). It writes into `samples/models`, about 11 MB:

    demo.onnx             base + the adapter `python`, as `torch.onnx.export` writes any PEFT model
    adapters/python       PEFT folders; `licence` and `header` are nowhere in the ONNX file
    adapters/licence
    adapters/header

Six minutes on two cores with bf16 instructions, longer on others; the same bytes every time on one machine.
`held_out/` is only read: a document that shares text with it is never trained on. Other machines have other text and
other arithmetic, so the weights differ from the committed ones; `samples/demo.py` says whether its claims still hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from demo_text import KINDS, gather
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
MODELS = HERE / "models"
CONTEXT, BATCH = 256, 16  # bytes a window, windows a step
BASE_STEPS, ADAPTER_STEPS = 1000, 200
BASE_MIX = {"prose": 0.7, "python": 0.1, "licence": 0.1, "header": 0.1}
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Three ranks, three scales (alpha / r, alpha / sqrt(r), and one rank that differs by module), as adapters from
# three teams would have.
ADAPTERS = {
    "python": LoraConfig("CAUSAL_LM", r=8, lora_alpha=16, target_modules=ALL_LINEAR),
    "licence": LoraConfig("CAUSAL_LM", r=4, lora_alpha=8, use_rslora=True, target_modules=ALL_LINEAR),
    "header": LoraConfig("CAUSAL_LM", r=16, lora_alpha=32, rank_pattern={"down_proj": 8}, target_modules=ALL_LINEAR),
}

Batches = Callable[[], torch.Tensor]
Optimizers = list[torch.optim.Optimizer]


# --- batches ---------------------------------------------------------------------------------------------------------


def windows(text: torch.Tensor, size: int, *, generator: torch.Generator) -> torch.Tensor:
    """``size`` random windows: ``int64 [size, CONTEXT]``."""
    starts = torch.randint(len(text) - CONTEXT, (size, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT)].long()


def mixed_batches(texts: dict[str, torch.Tensor]) -> Batches:
    generator = torch.Generator().manual_seed(1)
    kinds, shares = list(BASE_MIX), torch.tensor(list(BASE_MIX.values()))

    def draw() -> torch.Tensor:
        chosen = torch.multinomial(shares, BATCH, replacement=True, generator=generator)
        return torch.cat([windows(texts[kinds[i]], 1, generator=generator) for i in chosen])

    return draw


def batches_of(text: torch.Tensor) -> Batches:
    generator = torch.Generator().manual_seed(2)
    return lambda: windows(text, BATCH, generator=generator)


# --- training --------------------------------------------------------------------------------------------------------


def new_base() -> LlamaForCausalLM:
    """A Llama over bytes (its vocabulary is the 256 bytes, so the demo needs no tokenizer): 2.2 M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        name_or_path="adapterx-demo",
    )
    return LlamaForCausalLM(config)


def optimizers(model: torch.nn.Module, *, matrix_lr: float, other_lr: float) -> Optimizers:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in trained if p.ndim != 2 or "embed" in name]
    made: Optimizers = [torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    return made + ([torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95))] if others else [])


def train(model: torch.nn.Module, batches: Batches, *, steps: int, made: Optimizers, name: str) -> None:
    """``steps`` steps with a short warm-up and a linear way down to zero."""
    # bf16 halves the time where the processor has it, and costs more than it gives where it has not.
    fast = torch.cpu._is_avx512_bf16_supported()
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: min((i + 1) / 40, (steps - i) / steps)) for o in made]
    columns = (TextColumn(f"  {name:8}"), BarColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task(name, total=steps, loss="")
        smooth = math.nan
        for _ in range(steps):
            ids = batches()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in made:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            for schedule in schedules:
                schedule.step()
            smooth = loss.item() if math.isnan(smooth) else 0.97 * smooth + 0.03 * loss.item()
            progress.update(bar, advance=1, loss=f"{math.exp(smooth):5.2f} perplexity a byte")


def train_base(texts: dict[str, torch.Tensor], *, steps: int) -> LlamaForCausalLM:
    model = new_base()
    made = optimizers(model, matrix_lr=0.01, other_lr=0.003)
    train(model, mixed_batches(texts), steps=steps, made=made, name="base")
    return model


def train_adapter(base: LlamaForCausalLM, kind: str, *, text: torch.Tensor, steps: int) -> None:
    """Train the adapter ``kind`` on ``base``, save it as a PEFT folder, and leave ``base`` as it was."""
    torch.manual_seed(0)
    model = get_peft_model(base, ADAPTERS[kind])
    trained = [p for p in model.parameters() if p.requires_grad]
    made = [torch.optim.AdamW(trained, lr=0.005, weight_decay=0.01)]
    train(model, batches_of(text), steps=steps, made=made, name=kind)
    folder = MODELS / "adapters" / kind
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a model card without content
    (folder / "adapter_model.safetensors").chmod(0o644)  # written for its owner alone
    tidy(folder / "adapter_config.json")
    model.unload()


def tidy(config: Path) -> None:
    """PEFT writes the target modules in the order of a set: sort them, so that training again changes no line."""
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "target_modules": sorted(fields["target_modules"])}, indent=2) + "\n")


# --- export ----------------------------------------------------------------------------------------------------------


def export(base: LlamaForCausalLM, kind: str, path: Path) -> PeftModel:
    """Write ``base`` with the adapter ``kind``, ``input_ids [batch, sequence] -> logits [batch, sequence, 256]``."""
    model = PeftModel.from_pretrained(base, MODELS / "adapters" / kind, adapter_name=kind).eval()
    ids = torch.randint(256, (2, 16))
    torch.onnx.export(
        model,
        (),
        path,
        kwargs={"input_ids": ids},
        input_names=["input_ids"],
        output_names=["logits"],
        dynamic_shapes={"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=CONTEXT)}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    drop_stack_traces(path)
    return model


def drop_stack_traces(path: Path) -> None:
    """Of the exporter's notes, those that name the folders of this machine; all others stay."""
    model = onnx.load(path)
    for node in itertools.chain(model.graph.node, *(function.node for function in model.functions)):
        kept = [entry for entry in node.metadata_props if entry.key != "pkg.torch.onnx.stack_trace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    onnx.save(model, path)


def check(model: PeftModel, path: Path) -> None:
    """The file must compute what PyTorch computes, also for a batch and a length that the export did not see."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 77)))
    with torch.no_grad():
        expected = model(input_ids=ids).logits.numpy()
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (met,) = session.run(["logits"], {"input_ids": ids.numpy()})
    error = float(np.abs(met - expected).max())
    print(f"  onnxruntime against PyTorch: largest difference of a logit {error:.1e}")
    if error > 1e-4:
        raise SystemExit("the exported model does not compute what PyTorch computes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-steps", type=int, default=BASE_STEPS)
    parser.add_argument("--adapter-steps", type=int, default=ADAPTER_STEPS)
    options = parser.parse_args()
    started = time.monotonic()
    print("text of this machine, without what is held out:")
    texts = {kind: torch.frombuffer(bytearray(raw), dtype=torch.uint8) for kind, raw in gather().items()}
    print("training:")
    base = train_base(texts, steps=options.base_steps)
    shutil.rmtree(MODELS / "adapters", ignore_errors=True)
    for kind in KINDS:
        train_adapter(base, kind, text=texts[kind], steps=options.adapter_steps)
    print("export:")
    model = export(base, "python", MODELS / "demo.onnx")
    check(model, MODELS / "demo.onnx")
    written = [MODELS / "demo.onnx", *sorted((MODELS / "adapters").rglob("*.safetensors"))]
    for path in written:
        print(f"  {path.relative_to(HERE.parent)}  {path.stat().st_size / 1e6:.2f} MB")
    print(f"{time.monotonic() - started:.0f} s in all. Now see it: python samples/demo.py")


if __name__ == "__main__":
    main()
