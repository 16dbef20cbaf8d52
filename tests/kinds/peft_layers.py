"""Layers that PEFT has wrapped, what they compute, and the formula that every kind comes down to."""

import dataclasses
import math

import numpy as np
import peft
import torch
from torch import nn

from adapterx.adapter import GAIN, INPUT_GAIN, SHIFT
from adapterx.kinds import lowered, needs_weight


class Layers(nn.Module):
    """One of each, not run as a whole."""

    def __init__(self):
        super().__init__()
        self.config = {"model_type": "custom"}
        self.q, self.v, self.wide = nn.Linear(12, 20), nn.Linear(20, 9, bias=False), nn.Linear(6, 30)
        self.conv1, self.conv2 = nn.Conv1d(6, 8, 3, stride=2), nn.Conv2d(4, 6, (3, 2), padding=1, bias=False)
        self.grouped, self.conv3 = nn.Conv1d(6, 8, 3, groups=2), nn.Conv3d(2, 6, (1, 2, 3))
        self.table = nn.Embedding(11, 8)
        self.head = nn.Linear(9, 3)


INPUTS = {
    "q": (2, 5, 12), "v": (2, 5, 20), "wide": (4, 6), "conv1": (2, 6, 9), "conv2": (2, 4, 5, 6), "grouped": (2, 6, 9),
    "conv3": (2, 2, 3, 4, 5), "head": (4, 9),
}  # fmt: skip


@dataclasses.dataclass
class Wrapped:
    """PEFT's model on a copy of ``base``, all that it trains drawn at random."""

    base: Layers
    model: peft.PeftModel

    def answer(self, name, x):
        with torch.no_grad():
            return self.model.base_model.model.get_submodule(name)(x)


def wrapped(config, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    base, adapted = Layers().to(dtype), Layers().to(dtype)
    adapted.load_state_dict(base.state_dict())
    model = peft.get_peft_model(adapted, config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape).to(dtype)
                around_one = "ia3_" in name or "magnitude" in name
                size = 1 / math.sqrt(max(parameter[0].numel() if parameter.ndim else 1, 2))
                parameter.copy_(parameter * (1 + 0.3 * noise) if around_one else noise * size)
    return Wrapped(base, model)


def example(name, dtype=torch.float32):
    """What the layer ``name`` takes."""
    if name == "table":
        return torch.arange(11).reshape(1, -1)
    return torch.randn(INPUTS[name]).to(dtype)


def by_the_formula(layer, change, x):
    """``op(x * (1 + input_gain)) * (1 + gain) + shift + (x @ a.T) @ b``, in float32, by torch's own operations."""
    layer, x = layer.float(), x if x.dtype == torch.long else x.float()
    weight = layer.weight.detach().numpy().reshape(len(layer.weight), -1)
    bias = getattr(layer, "bias", None)
    change = lowered(change, weight if needs_weight(change) else None, None if bias is None else bias.detach().numpy())
    parts = {name: torch.tensor(part.astype(np.float32)) for name, part in change.parts.items()}
    a, b = (torch.tensor(side.astype(np.float32)) for side in (change.a, change.b))
    axes = layer.weight.ndim - 2 if isinstance(layer, nn.modules.conv._ConvNd) else 0
    column = (1, -1, *[1] * axes) if axes else (-1,)
    with torch.no_grad():
        scaled = x * (1 + parts[INPUT_GAIN].reshape(column)) if INPUT_GAIN in parts else x
        y = layer(scaled)
        y = y * (1 + parts[GAIN].reshape(column)) if GAIN in parts else y
        y = y + parts[SHIFT].reshape(column) if SHIFT in parts else y
        if not change.rank:
            return y
        if isinstance(layer, nn.Embedding):
            return y + a[:, x].movedim(0, -1) @ b
        if not axes:
            return y + (x @ a.T) @ b
        run = getattr(nn.functional, f"conv{axes}d")
        low = run(x, a.reshape(len(a), x.shape[1], *layer.kernel_size), stride=layer.stride, padding=layer.padding)
        return y + run(low, b.T.reshape(*b.T.shape, *[1] * axes))
