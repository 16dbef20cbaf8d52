"""PEFT loads what we write, and computes what the adapter says."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from torch import nn

import adapterx as ax
from adapterx.adapter import GAIN, INPUT_GAIN, MAGNITUDE, PROMPT, SHIFT, WHOLE_BIAS, WHOLE_WEIGHT
from adapterx.formats import load_adapter, peft_folder

pytestmark = pytest.mark.filterwarnings("ignore")


def low_rank(d_in: int, d_out: int, rank: int = 2, kernel: tuple = (), **parts: np.ndarray) -> ax.LowRank:
    random = np.random.default_rng(d_in * 100 + d_out + rank)
    a, b = random.normal(size=(rank, d_in, *kernel)), random.normal(size=(rank, d_out))
    return ax.LowRank(a=a.astype(np.float32), b=b.astype(np.float32), parts=parts)


def row(width: int, seed: int = 0) -> np.ndarray:
    """In steps that survive the addition of 1, which (IA)3 files need."""
    return np.round(np.random.default_rng(seed).normal(size=(1, width)) * 64).astype(np.float32) / 64


class Tower(nn.Module):
    """A layer of each kind, and one whose name ends as another's does."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "custom"}
        self.wte, self.conv = nn.Embedding(7, 4), nn.Conv2d(4, 5, (3, 1))
        self.q, self.inner = nn.Linear(4, 6), nn.ModuleDict({"q": nn.Linear(4, 6), "v": nn.Linear(6, 3, bias=False)})
        self.head = nn.Linear(3, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        x = x + self.conv(x.mT[..., None].expand(-1, -1, -1, 1)[:, :, [0, 1, 2]]).sum() / 9
        return self.head(self.inner["v"](torch.tanh(self.q(x) - self.inner["q"](x))))


def changed(base: Tower, sites: dict[str, ax.LowRank]) -> Tower:
    """``base`` with every site's change written into its own parameters."""
    for name, site in sites.items():
        layer = base.get_submodule(name)
        if WHOLE_WEIGHT in site.parts:
            layer.weight.data = torch.tensor(site.parts[WHOLE_WEIGHT])
        delta = torch.tensor(site.b.T @ site.a.reshape(site.rank, -1)) if site.rank else torch.zeros(1, 1)
        weight = layer.weight.data
        weight += delta.T if isinstance(layer, nn.Embedding) else delta.reshape(weight.shape) if site.rank else 0
        if MAGNITUDE in site.parts:
            norm = weight.flatten(1).norm(dim=1)
            weight *= (torch.tensor(site.parts[MAGNITUDE][0]) / norm).reshape(-1, *[1] * (weight.ndim - 1))
        weight *= 1 + torch.tensor(site.parts.get(INPUT_GAIN, np.zeros((1, 1), np.float32)))
        if GAIN in site.parts:
            weight *= 1 + torch.tensor(site.parts[GAIN].T)
        bias = layer.bias if getattr(layer, "bias", None) is not None else None
        if bias is None:
            if SHIFT in site.parts:
                layer.bias = nn.Parameter(torch.tensor(site.parts[SHIFT][0]))
            continue
        bias.data = bias.data * (1 + torch.tensor(site.parts.get(GAIN, np.zeros((1, 1), np.float32))[0]))
        bias.data = torch.tensor(site.parts.get(WHOLE_BIAS, bias.data[None].numpy())[0])
        bias.data = bias.data + torch.tensor(site.parts.get(SHIFT, np.zeros((1, 1), np.float32))[0])
    return base


KINDS = {
    "ranks that differ": {"q": low_rank(4, 6, 3), "inner.q": low_rank(4, 6, 2), "inner.v": low_rank(6, 3, 2)},
    "the rank of one that ends as another": {"q": low_rank(4, 6, 2), "inner.q": low_rank(4, 6, 5)},
    "some sites": {"inner.q": low_rank(4, 6)},
    "convolution and embedding": {"conv": low_rank(4, 5, 3, (3, 1)), "wte": low_rank(7, 4), "q": low_rank(4, 6)},
    "biases of its own": {"q": low_rank(4, 6, shift=row(6)), "inner.v": low_rank(6, 3)},
    "DoRA": {
        "q": low_rank(4, 6, magnitude=np.abs(row(6)) + 1),
        "conv": low_rank(4, 5, 3, (3, 1), magnitude=np.abs(row(5)) + 1),
    },
    "(IA)3": {"q": ax.LowRank.of_parts({GAIN: row(6)}), "inner.v": ax.LowRank.of_parts({INPUT_GAIN: row(6, 1)})},
    "a head trained in full": {
        "q": low_rank(4, 6, whole_bias=row(6)),
        "head": ax.LowRank.of_parts({WHOLE_WEIGHT: np.ones((2, 3), np.float32), WHOLE_BIAS: row(2)}),
    },
}


@pytest.mark.parametrize("sites", KINDS.values(), ids=KINDS)
def test_peft_computes_what_the_adapter_says(tmp_path: Path, sites: dict) -> None:
    adapter = ax.Adapter(sites, {"base_model": "org/tower", "task_type": "FEATURE_EXTRACTION"})
    peft_folder.write(adapter, tmp_path / "p")
    torch.manual_seed(0)
    base = Tower()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    ids = torch.tensor([[0, 3, 6, 1], [2, 2, 5, 4]])
    loaded = peft.PeftModel(base, peft.PeftConfig.from_pretrained(tmp_path / "p"))
    assert not loaded.load_adapter(tmp_path / "p", "default").unexpected_keys
    with torch.no_grad():
        met = loaded.base_model.model(ids)
        plain = Tower()
        plain.load_state_dict(state)
        before = plain(ids)
        expected = changed(plain, sites)(ids)
    torch.testing.assert_close(met, expected, rtol=1e-5, atol=1e-5)
    assert (met - before).abs().max() > 0.05
    again = load_adapter(tmp_path / "p")
    zeros = {f"{name}.shift.weight" for name in sites}
    assert {n for n, t in again.tensors() if n not in zeros or t.any()} == {n for n, _ in adapter.tensors()}
    for name, tensor in adapter.tensors():
        np.testing.assert_array_equal(dict(again.tensors())[name], tensor)
    assert again.metadata["base_model"] == "org/tower"


def test_a_llama_with_a_rank_of_its_own_at_each_site_computes_the_same_from_a_written_folder(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    base = LlamaForCausalLM(sizes).eval()
    state = {name: value.clone() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM",
        rank_pattern={"layers.0.*q_proj": 2, "down_proj": 5}, alpha_pattern={"k_proj": 1, "layers.1.*v_proj": 9},
    )  # fmt: skip
    trained = peft.get_peft_model(base, config).eval()
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    trained.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = trained(ids).logits
        with trained.disable_adapter():
            before = trained(ids).logits
    peft_folder.write(load_adapter(tmp_path / "theirs"), tmp_path / "ours")
    fresh = LlamaForCausalLM(sizes).eval()
    fresh.load_state_dict(state)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        met = loaded(ids).logits
    torch.testing.assert_close(met, expected, rtol=1e-5, atol=1e-5)
    assert (met - before).abs().max() > 0.1
    raw = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["task_type"]) == (4, 4, "CAUSAL_LM")
    assert sorted(set(raw["rank_pattern"].values())) == [2, 5]
    assert raw["target_modules"] == sorted(raw["target_modules"])


@pytest.mark.parametrize(
    ("site", "cause"),
    [
        (ax.LowRank.of_parts({PROMPT: np.ones((2, 3), np.float32)}), "a prompt"),
        (ax.LowRank.of_parts({SHIFT: row(6)}), "a shift without matrices"),
        (ax.LowRank.of_parts({GAIN: row(6)}), r"other: not just one gain as in \(IA\)3"),
        (low_rank(4, 6, magnitude=row(6), shift=row(6)), "other: it has no magnitude(?s:.*)x: a magnitude and a shift"),
    ],
)
def test_what_no_peft_adapter_is_is_refused_and_nothing_is_written(
    tmp_path: Path, site: ax.LowRank, cause: str
) -> None:
    with pytest.raises(ax.FormatError, match=cause):
        peft_folder.write(ax.Adapter({"x": site, "other": low_rank(4, 6)}), tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_flattened_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ax.FormatError, match="lora_unet_mid_block_to_q: underscores stand for the dots"):
        peft_folder.write(ax.Adapter({"lora_unet_mid_block_to_q": low_rank(4, 6)}), tmp_path / "p")


def test_a_folder_that_is_there_keeps_its_other_files_and_gets_both_of_ours(tmp_path: Path) -> None:
    peft_folder.write(ax.Adapter({"q": low_rank(4, 6)}), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    other = low_rank(4, 6, 3)
    half = ax.LowRank(a=other.a.astype(ml_dtypes.bfloat16), b=other.b.astype(ml_dtypes.bfloat16))
    peft_folder.write(ax.Adapter({"q": half}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert load_adapter(tmp_path) == ax.Adapter({"q": half})
