"""Files with a cache of keys and values: feeds for their inputs, and torch's answer by the names of their outputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from adapterx.adapter import Array
from tests.zoo.models import VOCAB

ROWS, ENCODED = 2, 5
Tensors = Mapping[str, torch.Tensor]


def feeds_for(model: onnx.ModelProto, config: Any, *, past: int, tokens: int, use_cache: bool) -> dict[str, Array]:
    """Seeded feeds for every input of ``model``, told by its name."""
    random = np.random.default_rng(3)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "d_kv", None) or config.hidden_size // config.num_attention_heads
    mask = np.ones((ROWS, ENCODED), np.int64)
    mask[1, ENCODED - 1] = 0
    known: dict[str, Array] = {
        "input_ids": random.integers(2, VOCAB, (ROWS, tokens)),
        "attention_mask": np.ones((ROWS, past + tokens), np.int64),
        "position_ids": np.tile(np.arange(past, past + tokens), (ROWS, 1)),
        "token_type_ids": np.zeros((ROWS, tokens), np.int64),
        "encoder_attention_mask": mask,
        "encoder_hidden_states": random.standard_normal((ROWS, ENCODED, config.hidden_size), np.float32),
        "use_cache_branch": np.array([use_cache]),
    }
    feeds = {}
    for name in (i.name for i in model.graph.input):
        length = ENCODED if ".encoder." in name else past
        kept = name.startswith("past")
        feeds[name] = random.standard_normal((ROWS, heads, length, width), np.float32) if kept else known[name]
    return feeds


def run(model: Any, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
    """torch's values for ``outputs``; ``model`` is a PeftModel or a transformers model."""
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    with torch.no_grad():
        named = _encoder_decoder(model, tensors) if "encoder_attention_mask" in feeds else _one_stack(model, tensors)
    return [named[name].numpy() for name in outputs]


def run_encoder(model: Any, feeds: Mapping[str, Array]) -> list[Array]:
    """The encoder's states alone."""
    with torch.no_grad():
        return [model.get_encoder()(**{k: torch.from_numpy(v) for k, v in feeds.items()}).last_hidden_state.numpy()]


def _cache(feeds: Tensors, pattern: str) -> DynamicCache:
    cache, keys = DynamicCache(), {}
    for name, value in feeds.items():
        if (found := re.fullmatch(rf"past_key_values\.(\d+)\.{pattern}(key|value)", name)) and value.shape[2]:
            keys[int(found[1]), found[2]] = value
    for layer in sorted({layer for layer, _ in keys}):
        cache.update(keys[layer, "key"], keys[layer, "value"], layer)
    return cache


def _present(cache: DynamicCache, infix: str) -> dict[str, torch.Tensor]:
    named = {}
    for index, layer in enumerate(cache.layers):
        named[f"present.{index}.{infix}key"], named[f"present.{index}.{infix}value"] = layer.keys, layer.values
    return named


def _one_stack(model: Any, feeds: Tensors) -> dict[str, torch.Tensor]:
    plain = {name: value for name, value in feeds.items() if not name.startswith("past")}
    if len(plain) == len(feeds):
        return dict(model(**plain).items())
    cache = _cache(feeds, "")
    return {"logits": model(**plain, past_key_values=cache, use_cache=True).logits, **_present(cache, "")}


def _encoder_decoder(model: Any, feeds: Tensors) -> dict[str, torch.Tensor]:
    first = "use_cache_branch" in feeds and not bool(feeds["use_cache_branch"])
    held = {} if first else feeds
    cache = EncoderDecoderCache(_cache(held, r"decoder\."), _cache(held, r"encoder\."))
    mask = feeds["encoder_attention_mask"]
    # With a cache the encoder's states are not read again, and the file has no input for them.
    states = feeds.get("encoder_hidden_states", torch.zeros(*mask.shape, model.config.hidden_size))
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=mask, use_cache=True,
        decoder_input_ids=feeds["input_ids"], past_key_values=cache,
    ).logits  # fmt: skip
    own, cross = cache.self_attention_cache, cache.cross_attention_cache
    encoded = _present(cross, "encoder.")
    if "use_cache_branch" in feeds and not first:
        # The branch has not computed them, and both branches must give as many outputs.
        encoded = {name: value[:0, :, :1] for name, value in encoded.items()}
    return {"logits": logits, **_present(own, "decoder."), **encoded}
