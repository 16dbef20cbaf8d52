"""Tiny seeded models, one function each: what a case's ``model`` names. Widths are all distinct, so that a mix-up shows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

HIDDEN, KV, MLP, VOCAB = 48, 24, 80, 101


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and one batch for it.

    Args:
        model: in eval mode, weights seeded
        inputs: by the names of ``forward``'s arguments
        dynamic: input name -> names of its dynamic axes
        outputs: names of the outputs to export
    """

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, str]]
    outputs: tuple[str, ...] = ("logits",)


def seeded(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep activations of the order of one, whatever the library's initialisation is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters(remove_duplicate=True)):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.1 * noise + (1.0 if "norm" in name.lower() or "ln_" in name else 0.0))
            else:
                gain = 1.0 if "embed" in name or "wte" in name else 1.0 / math.sqrt(weight[0].numel())
                weight.copy_((gain * noise).to(weight.dtype))
    return model.eval()


def _tokens(*shape: int, low: int = 0) -> torch.Tensor:
    return torch.randint(low, VOCAB, shape, generator=torch.Generator().manual_seed(7))


def _causal(model: nn.Module) -> Subject:
    return Subject(seeded(model), {"input_ids": _tokens(2, 7)}, {"input_ids": {0: "batch", 1: "tokens"}})


def _decoder(**changes: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "use_cache": False,
        "attn_implementation": "eager", "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    }  # fmt: skip
    return {**sizes, **changes}


def llama() -> Subject:
    return _causal(tf.LlamaForCausalLM(tf.LlamaConfig(**_decoder())))


def llama_tied() -> Subject:
    return _causal(tf.LlamaForCausalLM(tf.LlamaConfig(**_decoder(tie_word_embeddings=True))))


def phi3() -> Subject:
    return _causal(tf.Phi3ForCausalLM(tf.Phi3Config(**_decoder())))


def gpt2() -> Subject:
    config = tf.GPT2Config(n_embd=HIDDEN, n_layer=2, n_head=4, n_inner=MLP, vocab_size=VOCAB, n_positions=64,
                           use_cache=False, attn_implementation="eager", bos_token_id=1, eos_token_id=2)  # fmt: skip
    return _causal(tf.GPT2LMHeadModel(config))


class TwoLayers(nn.Module):
    """Rows of features, no sequence: exporters make Gemm of its linears."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(40, 56, bias=bias)
        self.fc2 = nn.Linear(56, 24, bias=bias)
        self.head = nn.Linear(24, 10, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def _rows(model: nn.Module, width: int) -> Subject:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(7))
    return Subject(seeded(model), {"x": x}, {"x": {0: "batch"}}, ("y",))


def mlp() -> Subject:
    return _rows(TwoLayers(bias=True), 40)


def mlp_no_bias() -> Subject:
    return _rows(TwoLayers(bias=False), 40)


MODELS: dict[str, Callable[[], Subject]] = {f.__name__: f for f in (llama, llama_tied, phi3, gpt2, mlp, mlp_no_bias)}
