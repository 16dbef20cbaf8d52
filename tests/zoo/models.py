"""Tiny seeded models, one function each: what a case's ``model`` names. Widths differ, so that a mix-up shows."""

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


def llama_short() -> Subject:
    """One layer, for what the second would only repeat: a dynamo export takes seconds."""
    return _causal(tf.LlamaForCausalLM(tf.LlamaConfig(**_decoder(num_hidden_layers=1))))


def llama_tied() -> Subject:
    return _causal(tf.LlamaForCausalLM(tf.LlamaConfig(**_decoder(tie_word_embeddings=True, num_hidden_layers=1))))


def phi3() -> Subject:
    return _causal(tf.Phi3ForCausalLM(tf.Phi3Config(**_decoder(num_hidden_layers=1))))


def llama_wide() -> Subject:
    """Head width 16, which GroupQueryAttention asks for; nothing as wide as the vocabulary."""
    return _causal(tf.LlamaForCausalLM(tf.LlamaConfig(**_decoder(hidden_size=64))))


def phi3_wide() -> Subject:
    return _causal(tf.Phi3ForCausalLM(tf.Phi3Config(**_decoder(hidden_size=64))))


def t5() -> Subject:
    config = tf.T5Config(d_model=HIDDEN, d_kv=12, d_ff=MLP, num_layers=2, num_decoder_layers=2, num_heads=4,
                         vocab_size=VOCAB, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)  # fmt: skip
    return Subject(seeded(tf.T5ForConditionalGeneration(config)), {}, {})


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


def _sentences(model: nn.Module, outputs: tuple[str, ...]) -> Subject:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    inputs = {"input_ids": _tokens(2, 7, low=1), "attention_mask": mask}
    return Subject(seeded(model), inputs, {name: {0: "batch", 1: "tokens"} for name in inputs}, outputs)


def _bert(**changes: Any) -> tf.BertConfig:
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": VOCAB, "max_position_embeddings": 32, "type_vocab_size": 2, "num_labels": 3,
        "attn_implementation": "eager",
    }  # fmt: skip
    return tf.BertConfig(**{**sizes, **changes})


def bert() -> Subject:
    return _sentences(tf.BertModel(_bert(), add_pooling_layer=False), ("last_hidden_state",))


def bert_classifier() -> Subject:
    return _sentences(tf.BertForSequenceClassification(_bert()), ("logits",))


def vit() -> Subject:
    config = tf.ViTConfig(hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=2, num_attention_heads=4,
                          image_size=16, patch_size=8, num_labels=5, attn_implementation="eager")  # fmt: skip
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    return Subject(
        seeded(tf.ViTForImageClassification(config)), {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}
    )


class Repeated(nn.Module):
    """One block called twice, as ALBERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.norm = nn.Linear(40, 56), nn.Linear(56, 56), nn.LayerNorm(56)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.stem(x)
        for _ in range(2):
            h = self.norm(torch.relu(self.block(h)))
        return h


class Normed(nn.Module):
    """Linears whose only reader is a LayerNorm: fusions make the join of base and adapter their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_norm = nn.Linear(40, 56, bias=False), nn.LayerNorm(56)
        self.down, self.down_norm = nn.Linear(56, 24), nn.LayerNorm(24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_norm(self.down(torch.relu(self.up_norm(self.up(x)))))


class Bottleneck(nn.Module):
    """A base with a low-rank branch of its own, which is no adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.low, self.high = (
            nn.Linear(40, 56, bias=False),
            nn.Linear(40, 4, bias=False),
            nn.Linear(4, 56, bias=False),
        )
        self.head = nn.Linear(56, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.full(x) + self.high(self.low(x)) * 2.0))


class Pictures(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


class Signals(nn.Module):
    """One dimension: strided, grouped, and of width 1. No dilation: PEFT forgets it on its own convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(6, 16, 5, stride=2, padding=3)
        self.conv2, self.conv3 = nn.Conv1d(16, 24, 3, padding=1, groups=2), nn.Conv1d(24, 10, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x)))))


class Volumes(nn.Module):
    """Three dimensions, and kernels, strides and paddings that differ by axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(2, 12, (3, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), bias=False)
        self.conv2 = nn.Conv3d(12, 10, (1, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(torch.relu(self.conv1(x)))


def _steps(model: nn.Module) -> Subject:
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(7))
    return Subject(seeded(model), {"x": x}, {"x": {0: "batch", 1: "tokens"}}, ("y",))


def repeated() -> Subject:
    return _steps(Repeated())


def normed() -> Subject:
    return _steps(Normed())


def bottleneck() -> Subject:
    return _steps(Bottleneck())


def _convolved(model: nn.Module, *shape: int) -> Subject:
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(7))
    return Subject(seeded(model), {"x": x}, {"x": {0: "batch"}}, ("y",))


def pictures() -> Subject:
    return _convolved(Pictures(), 3, 8, 8)


def signals() -> Subject:
    return _convolved(Signals(), 6, 20)


def volumes() -> Subject:
    return _convolved(Volumes(), 2, 4, 7, 6)


SUBJECTS = (
    llama, llama_short, llama_tied, llama_wide, phi3, phi3_wide, t5, gpt2, mlp, mlp_no_bias, bert, bert_classifier,
    vit, repeated, normed, bottleneck, pictures, signals, volumes,
)  # fmt: skip
MODELS: dict[str, Callable[[], Subject]] = {f.__name__: f for f in SUBJECTS}
