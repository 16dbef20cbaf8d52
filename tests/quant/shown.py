"""What a block of a tiny model is shown, and inputs and weights on which rounding to nearest does badly."""

import torch

from adapterx.quant.blocks import Block, walk
from adapterx.quant.calibration import Calibration, Call
from adapterx.quant.linear import is_linear
from tests.quant.tiny import batches


def first_block(model, data=None):
    """The first block of ``model``, and the names of its linear layers."""
    names = [name for name, module in model.named_modules() if is_linear(module) and name != "lm_head"]
    calibration = Calibration(model, names)
    with torch.no_grad():
        for ids in batches() if data is None else data:
            model(ids)
    calibration.detach()
    return next(walk(calibration, names))


def block_of(module, inputs):
    """``module`` as a block that is shown ``inputs``, one tensor a call."""
    calls = [Call((x,), {}) for x in inputs]
    with torch.no_grad():
        return Block("block", module, calls, calls, [call.of(module) for call in calls])


def correlated(inputs, count=512, *, seed=0):
    """``[count, inputs]``: channels that depend on each other, and some of which are much larger."""
    chance = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, inputs, generator=chance) @ torch.randn(inputs, inputs, generator=chance) / inputs**0.5
    size = torch.ones(inputs)
    size[:: max(inputs // 4, 1)] = 8
    return (mixed + torch.randn(count, 1, generator=chance)) * size


def weight(rows, inputs, *, seed=1):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def output_error(found, original, x):
    """Of the layer's outputs for ``x``, relative."""
    lost = x @ (found.dequantized() - original).T
    return float(lost.square().mean() / (x @ original.T).square().mean())


def same(one, other):
    """Whether two quantized weights are the same bits."""
    fields = ("codes", "scales", "zeros", "order", "pre_scale")
    pairs = [(getattr(one, name), getattr(other, name)) for name in fields]
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)
