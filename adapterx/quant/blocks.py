"""Blocks: a calibrated model walked block by block, so that memory is the model plus one block's inputs.

Each block is shown twice over: what the float model gives it, and what the model gives whose earlier blocks are
quantized already. The methods choose. A model without a chain of blocks is one block, and so is what lies outside.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from adapterx.quant.calibration import Calibration, Call, first_tensor
from adapterx.quant.fold import Fold

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Block:
    """One block, and what it is shown.

    Args:
        name: in the model; "" is the model itself
        module: the block; a method changes it in place, by `linear.replace` or `linear.write_weight`
        calls: its inputs as the quantized blocks before it give them
        float_calls: its inputs as the float model gives them
        targets: its outputs in float, for ``float_calls``, one a call
        folds: what methods moved into producers while they quantized the block, by names within it
    """

    name: str
    module: nn.Module
    calls: Sequence[Call]
    float_calls: Sequence[Call]
    targets: Sequence[Tensor]
    folds: list[Fold] = dataclasses.field(default_factory=list)

    def watch(self, sinks: Mapping[str, Callable[[Tensor], None]], *, floats: bool = False) -> None:
        """Run the block on all its calls; ``sinks[name](x)`` gets each input of its layer ``name``."""
        with watched(self.module, sinks), torch.no_grad():
            for call in self.float_calls if floats else self.calls:
                call.of(self.module)

    def outputs(self, calls: Sequence[Call] | None = None) -> list[Tensor]:
        """What the block gives now for its ``calls``."""
        return _run(self.module, self.calls if calls is None else calls)

    def error(self) -> float:
        """Mean squared difference of the block's outputs now from ``targets``, relative to their own mean square."""
        wrong = power = 0.0
        for got, target in zip(self.outputs(), self.targets, strict=True):
            wrong += float((got - target).square().sum())
            power += float(target.square().sum())
        return wrong / max(power, 1e-30)


@contextlib.contextmanager
def watched(module: nn.Module, sinks: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """Within it, ``sinks[name]`` is called with every input of the layer ``name``."""
    handles = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, sink=sink: sink(args[0]))
        for name, sink in sinks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def walk(calibration: Calibration, layers: Sequence[str]) -> Iterator[tuple[Block, list[str]]]:
    """Each block of the calibrated model with those of ``layers`` that lie in it, by their names within it.

    What a method does to a block before it asks for the next decides what the next is shown. Layers outside of every
    chain come last, in one block that is the model itself.
    """
    left = list(layers)
    for chain in calibration.unbroken_chains():
        if not any(_within(block, left) for block in chain):
            continue
        float_states = states = [call.first for call in calibration.blocks[chain[0]]]
        for place, name in enumerate(chain):
            module = calibration.model.get_submodule(name)
            given = calibration.blocks[name]
            float_calls = [call.with_first(state) for call, state in zip(given, float_states, strict=True)]
            same = all(a is b for a, b in zip(states, float_states, strict=True))
            calls = float_calls if same else [c.with_first(s) for c, s in zip(given, states, strict=True)]
            block = Block(name, module, calls, float_calls, targets := _run(module, float_calls))
            if inside := _within(name, left):
                left = [layer for layer in left if layer not in inside]
                yield block, [layer[len(name) + 1 :] for layer in inside]
            if not any(_within(later, left) for later in chain[place + 1 :]):
                break
            float_states = targets
            states = targets if same and not inside else _run(module, calls)
    if left:
        model = calibration.model
        yield Block("", model, calibration.calls, calibration.calls, _run(model, calibration.calls)), left


def _within(block: str, layers: Sequence[str]) -> list[str]:
    return [layer for layer in layers if layer.startswith(f"{block}.")]


def _run(module: nn.Module, calls: Sequence[Call]) -> list[Tensor]:
    with torch.no_grad():
        return [first_tensor(call.of(module)) for call in calls]
