"""A small Llama that is really trained, and its twin with outliers: what the quantizers are tested and measured on.

Random weights tell nothing of a quantizer: their errors are alike everywhere. This model, 1.12 M parameters, has learnt
Python from the standard library in two minutes, and loses perplexity as large models do. The twin computes the same
function, but three channels of each pair of layers that could be folded are 30 times larger, as channels of models of
billions of parameters are (Dettmers et al., arXiv 2208.07339).

Trained on first use and kept under ``.cache/``, by a hash of the recipe. The same bits each time on one machine.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.quant.corpus import VOCABULARY, Corpus, corpus, version

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "language"
Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """How the model is made; each field decides its weights. Muon trains the matrices of the layers, AdamW the rest.

    Args:
        steps: 800 for figures, 200 for tests: those order the methods alike
        rows: windows a step
        length: tokens a window
        matrix_lr: Muon's
        other_lr: AdamW's
    """

    steps: int = 800
    rows: int = 16
    length: int = 128
    hidden: int = 128
    inner: int = 384
    layers: int = 4
    heads: int = 4
    matrix_lr: float = 0.01
    other_lr: float = 0.02
    seed: int = 0

    def key(self) -> str:
        """A hash of the recipe, of the text and of the packages that do the arithmetic."""
        versions = [f"{name}={importlib.metadata.version(name)}" for name in ("torch", "transformers", "tokenizers")]
        return hashlib.sha256(repr((self, version(), versions)).encode()).hexdigest()[:16]


def text() -> Corpus:
    """The tokens for training, calibration and evaluation."""
    with _locked(CACHE / "corpus.lock"):
        return corpus(CACHE)


def language(steps: int = 200, *, twin: bool = False) -> LlamaForCausalLM:
    """The trained model, a new copy at each call; with ``twin`` the one with outliers."""
    recipe = Recipe(steps=steps)
    file = CACHE / f"{recipe.key()}.safetensors"
    with _locked(file.with_suffix(".lock")):
        if not file.exists():
            work = file.with_suffix(".tmp")
            save_file({name: part.contiguous() for name, part in trained(recipe).state_dict().items()}, work)
            work.rename(file)
    model = untrained(recipe)
    model.load_state_dict(load_file(file))
    return with_outliers(model) if twin else model


def perplexity(model: nn.Module, tokens: Tensor | None = None) -> float:
    """Of a causal LM on text that it has not seen: ``exp`` of the mean loss of a token, over ``tokens`` ``[n, t]``."""
    tokens = text().evaluation() if tokens is None else tokens
    losses = []
    with torch.no_grad():
        for rows in tokens.split(16):
            logits = model(input_ids=rows).logits[:, :-1].float()
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).double().mean())


def with_outliers(model: LlamaForCausalLM, *, factor: float = 30.0, channels: int = 3) -> LlamaForCausalLM:
    """A copy that computes the same, with ``channels`` channels between each pair of layers ``factor`` times larger."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        pairs = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            (attention.v_proj, (attention.o_proj,)),
            (mlp.up_proj, (mlp.down_proj,)),
        )
        for producer, consumers in pairs:
            chosen = torch.randperm(len(producer.weight), generator=generator)[:channels]
            with torch.no_grad():
                producer.weight[chosen] *= factor
                for consumer in consumers:
                    consumer.weight[:, chosen] /= factor
    return model


def untrained(recipe: Recipe) -> LlamaForCausalLM:
    """The model before its first step."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config).eval()


def trained(recipe: Recipe) -> LlamaForCausalLM:
    """The model after its last step, from nothing."""
    tokens, model = text().train, untrained(recipe).train()
    generator = torch.Generator().manual_seed(recipe.seed)
    body = [p for name, p in model.model.layers.named_parameters() if p.ndim == 2]
    inside = {id(p) for p in body}
    rest = [p for p in model.parameters() if id(p) not in inside]
    optimizers = [
        torch.optim.Muon(body, lr=recipe.matrix_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.other_lr, betas=(0.9, 0.95)),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: _pace(step, recipe)) for each in optimizers]
    with _one_thread():
        for _ in range(recipe.steps):
            starts = torch.randint(len(tokens) - recipe.length, (recipe.rows, 1), generator=generator)
            rows = tokens[starts + torch.arange(recipe.length)]
            model(input_ids=rows, labels=rows).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return model.eval()


def _pace(step: int, recipe: Recipe) -> float:
    """The share of the learning rate: a short way up, a linear way down."""
    return min((step + 1) / 20, (recipe.steps - step) / recipe.steps)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # Sums that are split among threads depend on their number.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
