"""Prompts of every kind that PEFT saves: what is read is what PEFT puts in front of the tokens."""

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from adapterx.adapter import PROMPT
from adapterx.errors import UnsupportedAdapter
from adapterx.formats import load_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = 4
# What PEFT asks a model for, where it has no config that says so.
SIZES = {
    "task_type": "FEATURE_EXTRACTION",
    "token_dim": 6,
    "num_layers": 2,
    "num_attention_heads": 3,
    "num_virtual_tokens": TOKENS,
}
CASES = {
    "prompt tuning": peft.PromptTuningConfig(**SIZES),
    "P-tuning": peft.PromptEncoderConfig(**SIZES, encoder_hidden_size=5),
    "P-tuning by an LSTM": peft.PromptEncoderConfig(
        **SIZES, encoder_hidden_size=5, encoder_reparameterization_type="LSTM"
    ),
    "prefix tuning": peft.PrefixTuningConfig(**SIZES),
    "prefix tuning by an MLP": peft.PrefixTuningConfig(**SIZES, prefix_projection=True, encoder_hidden_size=5),
}


class Config(dict):
    """PEFT reads it in both ways."""

    vocab_size = 9


class Words(nn.Module):
    """As little of a language model as PEFT asks for."""

    def __init__(self):
        super().__init__()
        self.config = Config(model_type="custom")
        self.words = nn.Embedding(9, 6)
        self.device = torch.device("cpu")

    def get_input_embeddings(self):
        return self.words


def saved(config, folder):
    torch.manual_seed(0)
    model = peft.get_peft_model(Words(), config).eval()
    with torch.no_grad():
        for weight in model.prompt_encoder.parameters():
            weight.copy_(torch.randn(weight.shape))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_prompt_that_is_read_is_the_one_that_peft_computes(name, tmp_path):
    model = saved(CASES[name], tmp_path)
    with torch.no_grad():
        encoder = model.prompt_encoder["default"]
        want = encoder(model.prompt_tokens["default"][None, :TOKENS])[0].numpy()
    [(site, change)] = load_adapter(tmp_path).sites.items()
    assert site == "prompt_encoder"
    np.testing.assert_allclose(change.parts[PROMPT], want, rtol=1e-6, atol=1e-6)
    assert change.rank == 0


def test_a_prompt_of_more_than_two_dimensions_is_refused(tmp_path):
    saved(CASES["prompt tuning"], tmp_path)
    save_file({"prompt_embeddings": np.zeros((1, 4, 6), np.float32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UnsupportedAdapter, match=r"must be \[n_virtual, width\]; got \(1, 4, 6\)"):
        load_adapter(tmp_path)
