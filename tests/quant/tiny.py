"""Tiny models with random weights, and data to calibrate them on."""

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 128


def llama(*, tied=False, layers=2, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def t5(seed=0):
    torch.manual_seed(seed)
    config = T5Config(
        d_model=64, d_ff=96, d_kv=16, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()


def convolutional(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 6, 32), nn.Linear(32, 4)).eval()


def batches(count=4, *, rows=2, length=16, seed=1):
    chance = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (rows, length), generator=chance) for _ in range(count)]


def run(model, data=None):
    with torch.no_grad():
        for ids in batches() if data is None else data:
            model(ids)


@torch.no_grad()
def logits(model, ids=None):
    return model(batches(1, seed=2)[0] if ids is None else ids).logits


def error(model, reference):
    """Mean square of what differs from ``reference``, relative to its own."""
    return float((logits(model) - reference).square().mean() / reference.square().mean())


def bits_of(model):
    from adapterx.quant.linear import quant_layers

    return {name: layer.bits for name, layer in quant_layers(model)}


def same(left, right):
    """Whether two models hold the same tensors, bit for bit."""
    mine, theirs = left.state_dict(), right.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
