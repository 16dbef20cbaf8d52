"""PEFT on a model: adapters "a" (exported), "b" (another) and "c" (other rank and alpha), and what is true of them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer

from tests.zoo.case import Lora, TruthSite

SEEDS = {"a": 11, "b": 22, "c": 33}
CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig, "dora": peft.LoraConfig, "adalora": peft.AdaLoraConfig, "ia3": peft.IA3Config,
}  # fmt: skip


def config(lora: Lora, label: str) -> Any:
    """PEFT's config of adapter ``label``."""
    extra = dict(lora.extra_c if label == "c" and lora.extra_c is not None else lora.extra)
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    common = {"target_modules": targets, "task_type": lora.task_type, **extra}
    if lora.kind == "ia3":
        return peft.IA3Config(**common)
    r, alpha = (lora.r + 3, lora.alpha * 1.5) if label == "c" else (lora.r, lora.alpha)
    if lora.kind == "adalora":
        return peft.AdaLoraConfig(init_r=r, target_r=r, total_step=10, tinit=1, tfinal=1, lora_alpha=alpha, **common)
    return peft.LoraConfig(r=r, lora_alpha=alpha, use_dora=lora.kind == "dora", **common)


def attach(model: torch.nn.Module, lora: Lora, label: str) -> peft.PeftModel:
    """``model`` with adapter ``label`` ("a" together with those of ``lora.also``), seeded, in eval mode."""
    also = lora.also if label == "a" else ()
    adapted = peft.get_peft_model(
        model, config(lora, label), adapter_name=lora.name, autocast_adapter_dtype=not lora.half
    )
    for name in also:
        adapted.add_adapter(name, config(lora, "c"), autocast_adapter_dtype=not lora.half)
    if also:
        adapted.base_model.set_adapter([lora.name, *also])
    _randomise(adapted, SEEDS[label], keep_b=lora.zero_b and label == "a")
    return adapted.eval()


def _randomise(adapted: peft.PeftModel, seed: int, *, keep_b: bool) -> None:
    """Own values for everything that PEFT added: its B starts at zero, and proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(adapted.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if not any(prefix in name for prefix in ("lora_", "ia3_")) or (keep_b and "lora_B" in name):
                continue
            if "ia3_" in name or "magnitude" in name:
                weight.mul_(1 + 0.3 * noise)
            else:
                weight.copy_(noise / math.sqrt(max(weight[0].numel(), 2)))


def truth(adapted: peft.PeftModel) -> list[TruthSite]:
    """Every place of ``adapted`` with an active low-rank linear adapter, in module order."""
    rows = []
    for name, layer in adapted.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            rank, scale = layer.r[adapter], layer.scaling[adapter]
            if hasattr(layer, "ranknum"):
                scale = scale / (float(layer.ranknum[adapter]) + 1e-5)
            rows.append(TruthSite(name, adapter, int(rank), float(scale), layer.in_features, layer.out_features))
    return rows


def save(adapted: peft.PeftModel, folder: Path, *, name: str) -> None:
    """PEFT's own folder; PEFT puts every adapter but ``default`` into a folder below."""
    work = folder.with_name(f"{folder.name}.peft")
    adapted.save_pretrained(str(work), selected_adapters=[name])
    shutil.move(work if name == "default" else work / name, folder)
    shutil.rmtree(work, ignore_errors=True)
