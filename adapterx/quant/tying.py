"""Tying: a head that shares its embedding's weight, in transformers' models."""

from __future__ import annotations

import inspect

from torch import nn


def computes_with_tying(model: nn.Module) -> bool:
    """Whether ``config.tie_word_embeddings`` is part of what ``model`` computes.

    It cannot be set then to say that a head has a weight of its own now. T5 divides its last states by the root of
    their width where the two are tied.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    return code is not None and "tie_word_embeddings" in code.co_names
