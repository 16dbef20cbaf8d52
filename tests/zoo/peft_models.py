"""PEFT on a model: adapters "a" (exported), "b" (another) and "c" (other rank and alpha), and what is true of them."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from tests.zoo.case import Lora, TruthSite

SEEDS = {"a": 11, "b": 22, "c": 33}
CONFIGS: dict[str, Any] = {
    "lora": peft.LoraConfig, "dora": peft.LoraConfig, "adalora": peft.AdaLoraConfig, "ia3": peft.IA3Config,
    "vera": peft.VeraConfig, "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig, "oft": peft.OFTConfig,
    "tokens": peft.TrainableTokensConfig, "prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig,
}  # fmt: skip


def config(lora: Lora, label: str) -> Any:
    """PEFT's config of adapter ``label``."""
    extra = dict(lora.extra_c if label == "c" and lora.extra_c is not None else lora.extra)
    r, alpha = (lora.r + 3, lora.alpha * 1.5) if label == "c" else (lora.r, lora.alpha)
    own: dict[str, Any] = {
        "lora": {"r": r, "lora_alpha": alpha},
        "dora": {"r": r, "lora_alpha": alpha, "use_dora": True},
        "adalora": {"init_r": r, "target_r": r, "lora_alpha": alpha, "total_step": 10, "tinit": 1, "tfinal": 1},
        "loha": {"r": r, "alpha": alpha},
        "lokr": {"r": r, "alpha": alpha},
        # b shares its random projections with a, c has others.
        "vera": {"r": r, "save_projection": True, "projection_prng_key": 1 if label == "c" else 0},
        "prompt": {"num_virtual_tokens": 5},
        "prefix": {"num_virtual_tokens": 5},
    }.get(lora.kind, {})
    if lora.targets:
        own["target_modules"] = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return CONFIGS[lora.kind](**{**own, "task_type": lora.task_type, **extra})


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
            if not weight.requires_grad or (keep_b and "lora_B" in name):
                continue
            if "ia3_" in name or "magnitude" in name:
                weight.mul_(1 + 0.3 * noise)
            else:
                weight.copy_(noise / math.sqrt(max(weight[0].numel(), 2)))


def truth(adapted: peft.PeftModel) -> list[TruthSite]:
    """Every place of ``adapted`` where an active adapter acts, in module order."""
    if adapted.active_peft_config.is_prompt_learning:
        prompt = adapted.prompt_encoder[adapted.active_adapter].embedding
        return [TruthSite("prompt_encoder", adapted.active_adapter, 0, 1.0, *prompt.weight.shape)]
    rows = []
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            saved: Any = layer.original_module
            rows += [TruthSite(name, each, 0, 1.0, saved.in_features, saved.out_features) for each in _active(layer)]
        elif isinstance(layer, BaseTunerLayer):
            rows += [_row(name, layer, each) for each in _active(layer)]
    return rows


def _active(layer: Any) -> list[str]:
    return list(layer.active_adapters)


def _row(name: str, layer: Any, adapter: str) -> TruthSite:
    rank, scale = getattr(layer, "r", {}).get(adapter, 0), getattr(layer, "scaling", {}).get(adapter, 1.0)
    if hasattr(layer, "ranknum"):
        scale = scale / (float(layer.ranknum[adapter]) + 1e-5)
    sized = layer if hasattr(layer, "in_features") else layer.get_base_layer()
    return TruthSite(name, adapter, int(rank), float(scale), sized.in_features, sized.out_features)


def save(adapted: peft.PeftModel, folder: Path, *, name: str) -> None:
    """PEFT's own folder; PEFT puts every adapter but ``default`` into a folder below."""
    work = folder.with_name(f"{folder.name}.peft")
    adapted.save_pretrained(str(work), selected_adapters=[name])
    shutil.move(work if name == "default" else work / name, folder)
    shutil.rmtree(work, ignore_errors=True)
