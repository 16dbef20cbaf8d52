"""Producers: which module's weights can take over a scale of the inputs of other layers.

Nothing is believed by name. A candidate is a norm whose output is the very tensor that the layers read, or a linear
layer of the block that ran before and is as wide. Each is proven: the block is run with a random scale in both, and
must give what it gave.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapterx.errors import MismatchError, nearest
from adapterx.quant.blocks import Block
from adapterx.quant.calibration import first_tensor
from adapterx.quant.fold import scale_inputs, scale_outputs
from adapterx.quant.linear import is_linear, linear_weight

Tensor = torch.Tensor

# What is left of the effect of a scale when its producer takes it back: rounding, and nothing else.
_LEFT = 1e-3


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """``producer`` and all the linear layers that read what it gives, by names within a block."""

    producer: str
    consumers: tuple[str, ...]


def find_producers(
    block: Block, lists: Sequence[Sequence[str]], absorb: Mapping[str, Sequence[str]]
) -> list[Pair | None]:
    """For each of ``lists``, layers that read one tensor, the pair that can be folded; None where there is none.

    The block's weights are changed while this runs, and are the same bits afterwards.

    Args:
        block: needs at least one call; only the first is run
        lists: of `adapterx.quant.sharing.Inputs`
        absorb: ``{producer: consumers}`` that the user knows, by names in the model or in the block

    Raises:
        MismatchError: a pair of ``absorb`` that is not one, or names what the block does not have
    """
    trace = _traced(block)
    known = _known(block, absorb, lists)
    found: list[Pair | None] = []
    for names in lists:
        consumers = trace.readers(names[0])
        if names[0] in known:
            pair = known[names[0]]
            if not proven(block, pair):
                raise MismatchError(
                    f"absorb: a scale cannot move from the inputs of {', '.join(pair.consumers)} into {pair.producer}: "
                    f"the block {block.name!r} gives something else then. Leave the pair out, and it is looked for"
                )
            found.append(pair)
            continue
        pairs = (Pair(producer, consumers) for producer in trace.candidates(names[0], consumers))
        found.append(next((pair for pair in pairs if proven(block, pair)), None))
    return found


@torch.no_grad()
def proven(block: Block, pair: Pair) -> bool:
    """Whether the block gives the same when the inputs' scale moves into the producer, and would not without that."""
    producer = block.module.get_submodule(pair.producer)
    consumers = [block.module.get_submodule(name) for name in pair.consumers]
    width = linear_weight(consumers[0]).shape[1]
    if any(linear_weight(layer).shape[1] != width for layer in consumers) or _width(producer) != width:
        return False
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp2(torch.rand(width, generator=generator) * 2 - 1).to(linear_weight(consumers[0]).device)
    before = _output(block)
    with _kept([producer, *consumers]):
        for layer in consumers:
            scale_inputs(layer, scale)
        effect = float((_output(block) - before).abs().max())
        scale_outputs(producer, 1 / scale)
        left = float((_output(block) - before).abs().max())
    noise = 8 * torch.finfo(before.dtype).eps * float(before.abs().max())
    return effect > 10 * noise and left <= max(_LEFT * effect, noise)


class _Trace:
    """What the modules of a block read and gave in one call. Tensors are held, so that each has its identity."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.modules: dict[str, nn.Module] = {}

    def readers(self, name: str) -> tuple[str, ...]:
        """The float linear layers that read what ``name`` reads."""
        x = self.inputs[name]
        return tuple(other for other, read in self.inputs.items() if read is x and is_linear(self.modules[other]))

    def candidates(self, name: str, consumers: Sequence[str]) -> Iterator[str]:
        """Norms first, then linear layers, those that ran last in front."""
        x = self.inputs[name]
        ran = list(self.outputs)
        before = ran[: ran.index(name)][::-1]
        for other in before:
            if self.outputs[other] is x and not is_linear(self.modules[other]) and _width(self.modules[other]):
                yield other
        for other in before:
            if is_linear(self.modules[other]) and other not in consumers and _width(self.modules[other]) == x.shape[-1]:
                yield other


def _traced(block: Block) -> _Trace:
    trace, handles = _Trace(), []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if args and isinstance(args[0], Tensor):
                trace.inputs[name] = args[0]
            if isinstance(result, Tensor):
                trace.outputs[name] = result

        return hook

    for name, module in block.module.named_modules():
        trace.modules[name] = module
        handles.append(module.register_forward_hook(hook_of(name)))
    try:
        _output(block)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _known(block: Block, absorb: Mapping[str, Sequence[str]], lists: Sequence[Sequence[str]]) -> dict[str, Pair]:
    """The pairs of ``absorb`` that lie in the block, by each consumer."""
    inside = {name for name, _ in block.module.named_modules() if name}
    prefix = f"{block.name}." if block.name else ""
    wanted = {name for names in lists for name in names}
    known: dict[str, Pair] = {}
    for producer, consumers in absorb.items():
        pair = Pair(producer.removeprefix(prefix), tuple(name.removeprefix(prefix) for name in consumers))
        if not wanted.intersection(pair.consumers):
            continue
        for name in (pair.producer, *pair.consumers):
            if name not in inside:
                raise MismatchError(f"absorb: {name!r} is no module of block {block.name!r}{nearest(name, inside)}")
        known.update(dict.fromkeys(pair.consumers, pair))
    return known


def _width(module: nn.Module) -> int:
    """Features that a linear layer or a norm gives; 0 of any other module."""
    if is_linear(module):
        return int(linear_weight(module).shape[0])
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.ndim == 1 else 0


def _output(block: Block) -> Tensor:
    with torch.no_grad():
        return first_tensor(block.calls[0].of(block.module))


@contextlib.contextmanager
def _kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    kept = [(part, part.detach().clone()) for module in modules for part in module.parameters(recurse=False)]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, value in kept:
                part.copy_(value)
