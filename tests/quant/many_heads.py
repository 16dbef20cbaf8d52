"""A tiny Llama whose values have as many heads as its queries, so that v_proj produces what o_proj reads."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.quant.tiny import VOCABULARY


def llama(*, layers=2, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        # Larger than usual, so that the layers add something that can be seen beside the residual.
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()
