"""Fold: a scale that moves from the inputs of some layers into the module that produces them. The model stays the same.

A method that folds leaves no multiplication behind, but an adapter that was trained before now sees other inputs:
`adapterx.quant.rebase.rebase_adapter` carries it over.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from adapterx.quant.linear import is_linear, linear_weight, write_weight

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """``producer``'s output is divided by ``scale``, and the weights of ``consumers`` are multiplied by it.

    Args:
        producer: name of a norm, or of a linear layer
        consumers: names of the linear layers that read its output, perhaps through what commutes with a scale
        scale: float32 ``[K]``, positive, by feature between them
    """

    producer: str
    consumers: tuple[str, ...]
    scale: Tensor

    def within(self, block: str) -> Fold:
        """The same fold, by names in the model instead of names in its block."""
        prefix = f"{block}." if block else ""
        return Fold(f"{prefix}{self.producer}", tuple(f"{prefix}{name}" for name in self.consumers), self.scale)


@torch.no_grad()
def fold_in(module: nn.Module, fold: Fold) -> None:
    """Change the weights of ``module`` in place by ``fold``; its names are those within ``module``."""
    for name in fold.consumers:
        scale_inputs(module.get_submodule(name), fold.scale)
    scale_outputs(module.get_submodule(fold.producer), 1 / fold.scale)


@torch.no_grad()
def scale_inputs(layer: nn.Module, scale: Tensor) -> None:
    """Multiply the columns of a float linear layer's weight ``[N, K]`` by ``scale`` ``[K]``."""
    write_weight(layer, linear_weight(layer) * scale)


@torch.no_grad()
def scale_outputs(producer: nn.Module, scale: Tensor) -> None:
    """Multiply what a norm or a float linear layer gives by ``scale``, by way of its weight and bias."""
    if is_linear(producer):
        write_weight(producer, linear_weight(producer) * scale.unsqueeze(1))
    else:
        weight = producer.weight
        assert isinstance(weight, Tensor), "a norm without a weight is no candidate"
        gain = 1.0 if is_centered(producer) else 0.0
        weight.copy_((weight + gain) * scale - gain)
    if isinstance(bias := getattr(producer, "bias", None), Tensor):
        bias.copy_(bias * scale)


def is_centered(norm: nn.Module) -> bool:
    """Whether a norm multiplies by ``1 + weight``, as Gemma's do: seen from what it gives for a weight of zeros."""
    weight = norm.weight
    assert isinstance(weight, Tensor), "a norm without a weight is no candidate"
    kept = weight.detach().clone()
    probe = torch.linspace(-1, 1, len(kept), device=kept.device, dtype=kept.dtype).unsqueeze(0)
    bias = getattr(norm, "bias", None)
    try:
        with torch.no_grad():
            weight.zero_()
            given = norm(probe)
            return bool((given - (0 if bias is None else bias)).abs().max() > 0)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
