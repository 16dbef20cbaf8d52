"""Each kind's file, read down to matrices and vectors, computes what PEFT's own layers do."""

import peft
import pytest
import torch

from adapterx.formats import load_adapter
from adapterx.kinds import vera
from tests.kinds.peft_layers import by_the_formula, example, wrapped

pytestmark = pytest.mark.filterwarnings("ignore")

LINEAR = ["q", "v", "wide"]
LORA = {"r": 3, "lora_alpha": 5}
STEPS = {"total_step": 9, "tinit": 1, "tfinal": 1}
PATTERNS = {"rank_pattern": {"wide": 4, "^v": 1}, "alpha_pattern": {"q": 11}}

CASES = {
    "lora": peft.LoraConfig(**LORA, target_modules=LINEAR),
    "lora with patterns": peft.LoraConfig(**LORA, **PATTERNS, target_modules=LINEAR),
    "lora_bias": peft.LoraConfig(**LORA, **PATTERNS, target_modules=["q", "wide"], lora_bias=True),
    "bias of the base": peft.LoraConfig(**LORA, target_modules=LINEAR, bias="lora_only"),
    "dora": peft.LoraConfig(**LORA, **PATTERNS, target_modules=LINEAR, use_dora=True),
    "dora with rslora": peft.LoraConfig(**LORA, target_modules=LINEAR, use_dora=True, use_rslora=True),
    "dora of convolutions": peft.LoraConfig(**LORA, target_modules=["conv1", "conv2", "conv3"], use_dora=True),
    "adalora": peft.AdaLoraConfig(init_r=3, target_r=3, lora_alpha=5, **STEPS, target_modules=LINEAR),
    "convolutions": peft.LoraConfig(**LORA, target_modules=["conv1", "conv2", "conv3"]),
    "grouped convolution": peft.LoraConfig(r=6, lora_alpha=5, target_modules=["grouped"]),
    "embedding": peft.LoraConfig(**LORA, target_modules=["table"]),
    "whole modules": peft.LoraConfig(**LORA, target_modules=["q"], modules_to_save=["head"]),
    "ia3": peft.IA3Config(target_modules=LINEAR, feedforward_modules=["v"]),
    "ia3 of convolutions": peft.IA3Config(target_modules=["conv2", "conv3"], feedforward_modules=["conv3"]),
    "loha": peft.LoHaConfig(r=2, alpha=5, target_modules=LINEAR),
    "loha with patterns": peft.LoHaConfig(r=2, alpha=5, **PATTERNS, target_modules=LINEAR),
    "loha of a rank beyond the layer's": peft.LoHaConfig(r=4, alpha=5, target_modules=LINEAR),
    "loha of convolutions": peft.LoHaConfig(r=2, alpha=5, target_modules=["conv2"]),
    "lokr": peft.LoKrConfig(r=8, alpha=5, target_modules=LINEAR),
    "lokr with patterns": peft.LoKrConfig(r=2, alpha=5, **PATTERNS, target_modules=LINEAR),
    "lokr by factors of factors": peft.LoKrConfig(r=1, alpha=5, decompose_both=True, target_modules=LINEAR),
    "lokr of blocks": peft.LoKrConfig(r=2, alpha=5, decompose_factor=3, target_modules=LINEAR),
    "lokr of convolutions": peft.LoKrConfig(r=8, alpha=5, target_modules=["conv2"]),
    "lokr of convolutions by factors": peft.LoKrConfig(r=1, alpha=5, target_modules=["conv2"]),
    "vera": peft.VeraConfig(r=5, target_modules=LINEAR, save_projection=True),
}  # fmt: skip


def read(config, tmp_path, **options):
    met = wrapped(config, **options)
    met.model.save_pretrained(tmp_path / "adapter")
    return met, load_adapter(tmp_path / "adapter")


def here(change, layer, config):
    """What only a model tells of a site: how many of VeRA's columns are its own, that LoHa's belong to a kernel."""
    if isinstance(config, peft.VeraConfig):
        return vera.cut(change, layer.in_features)
    return change


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_computes_what_peft_computes(name, tmp_path):
    met, adapter = read(CASES[name], tmp_path)
    for site, change in adapter.sites.items():
        layer, x = met.base.get_submodule(site), example(site)
        got, want = by_the_formula(layer, here(change, layer, CASES[name]), x), met.answer(site, x)
        assert (want - layer(x)).abs().max() > 1e-2, f"{site}: the adapter does nothing"
        assert (got - want).abs().max() < 1e-5, site


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "loha", "lokr", "vera", "lora_bias"])
def test_half_an_adapter_stays_half_and_is_right_as_far_as_that_goes(name, tmp_path):
    met, adapter = read(CASES[name], tmp_path, dtype=torch.float16)
    for site, change in adapter.sites.items():
        assert change.dtype == "float16"
        layer, x = met.base.get_submodule(site), example(site, torch.float16)
        want = met.answer(site, x).float()
        got = by_the_formula(layer, here(change, layer, CASES[name]), x)
        assert (got - want).abs().max() < 2e-2, site
