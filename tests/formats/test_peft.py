"""What PEFT saves means to us what it means to PEFT."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterx.formats import load_adapter, save_adapter


class Block(nn.Module):
    """Two linear layers and one of GPT-2's, whose weight lies the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.c_attn = nn.Linear(4, 6), nn.Linear(4, 3), Conv1D(6, 4)
        self.config = {"model_type": "custom"}


CONFIGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3, "proj": 5}, "alpha_pattern": {r"[qk]_proj": 7, "v_.*": 1}},
    "patterns and rslora": {"use_rslora": True, "rank_pattern": {"^v_proj": 1}, "alpha_pattern": {"c_attn": 3}},
    "eva-like": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_a_saved_adapter_makes_the_change_that_peft_makes(tmp_path: Path, options: dict) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "c_attn"], **options)
    model = peft.get_peft_model(Block(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "p")
    adapter = load_adapter(tmp_path / "p")
    for name, site in adapter.sites.items():
        layer = getattr(model.base_model.model, name)
        delta = layer.get_delta_weight("default").detach().numpy()
        expected = delta.T if name == "c_attn" else delta
        np.testing.assert_allclose(site.b.T @ site.a, expected, rtol=1e-5, atol=1e-6)
    assert set(adapter.sites) == {"q_proj", "v_proj", "c_attn"}
    assert load_adapter(tmp_path / "p" / "adapter_model.safetensors") == adapter
    save_adapter(adapter, tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors") == adapter


@pytest.mark.filterwarnings("ignore")
def test_the_base_model_is_remembered(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path="org/model", task_type="CAUSAL_LM")
    peft.PeftModel(Block(), config).save_pretrained(tmp_path)
    kept = load_adapter(tmp_path).metadata
    assert (kept["peft_type"], kept["task_type"], kept["format"]) == ("LORA", "CAUSAL_LM", "peft")
