"""How much other weights of some layers would change what comes out of the smallest module around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapterx.quant.blocks import Block
from adapterx.quant.calibration import Call, first_tensor
from adapterx.quant.linear import linear_weight, write_weight

Tensor = torch.Tensor
OutputError = Callable[[Mapping[str, Tensor]], float]


def output_error(block: Block, names: Sequence[str], *, moment: Tensor, tokens: int) -> OutputError:
    """A function from weights ``[N, K]`` by name to the squared error of the outputs.

    Of one layer alone it comes from the second moment of its inputs, all tokens at once. Of several, the smallest
    module that holds them all and is called is run, with its weights written and restored.

    Args:
        block: on its ``calls``
        names: layers that read one tensor
        moment: of that tensor, ``[K, K]``
        tokens: on which the module is run, about
    """
    if len(names) == 1:
        weight = linear_weight(block.module.get_submodule(names[0])).to(torch.float32).clone()
        return lambda weights: _of_layer(weights[names[0]] - weight, moment)
    module, calls = _around(block, names, _some(block, tokens))
    layers = {name: block.module.get_submodule(name) for name in names}
    with torch.no_grad():
        targets = [first_tensor(call.of(module)) for call in calls]

    def of_module(weights: Mapping[str, Tensor]) -> float:
        kept = {name: linear_weight(layer).clone() for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                write_weight(layer, weights[name])
            with torch.no_grad():
                pairs = [(first_tensor(call.of(module)), target) for call, target in zip(calls, targets, strict=True)]
            return sum(float((got - target).to(torch.float32).square().sum()) for got, target in pairs)
        finally:
            for name, layer in layers.items():
                write_weight(layer, kept[name])

    return of_module


def _of_layer(lost: Tensor, moment: Tensor) -> float:
    return float(((lost @ moment) * lost).sum())


def _some(block: Block, tokens: int) -> list[Call]:
    """About ``tokens`` tokens of the block's calls, from all over."""
    calls = list(block.calls)
    first = calls[0].first
    rows = first.numel() // max(first.shape[-1], 1) if isinstance(first, Tensor) else 1
    return calls[:: max(1, rows * len(calls) // tokens)]


def _around(block: Block, names: Sequence[str], calls: Sequence[Call]) -> tuple[nn.Module, list[Call]]:
    """The smallest module around ``names`` that is called, and the calls that it gets."""
    parts = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    for depth in range(len(common), 0, -1):
        module = block.module.get_submodule(".".join(common[:depth]))
        met: list[Call] = []

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], met: list[Call] = met) -> None:
            met.append(Call(args, kwargs))

        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            with torch.no_grad():
                for call in calls:
                    call.of(block.module)
        finally:
            handle.remove()
        if met:
            return module, met
    return block.module, list(calls)
