"""SmoothQuant: large channels of the inputs are made smaller and the weights' larger, so that both take eight bits."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch

from adapterx.errors import OptionError
from adapterx.quant.activation_grid import int8_weight, static_activation
from adapterx.quant.blocks import Block
from adapterx.quant.linear import as_quantized, linear_weight, replace
from adapterx.quant.rounding import rounded
from adapterx.quant.sharing import shared_inputs
from adapterx.quant.weight import Activation, QuantWeight

Tensor = torch.Tensor

# An error is judged by so many of a layer's inputs: more change the choice of alpha no more.
_ROWS = 2048


@dataclasses.dataclass(frozen=True, slots=True)
class SmoothQuant:
    """Int8 weights and inputs behind ``s = max|x|**alpha / max|W|**(1 - alpha)`` (Xiao et al., arXiv 2211.10438).

    ``y = Q(x / s) @ Q(W * s).T``. Layers that read the same tensor share ``s``, as in the paper.

    Args:
        alpha: 0 leaves the inputs hardest, 1 the weights; "auto" takes the one with the least error of the outputs
        alphas: those that "auto" tries
        blockwise: "auto" chooses one for all layers of a block, by the block's outputs; else by the layers' own
        per: "static" has the inputs' range from calibration; "tensor" and "token" find it at each call
        format: "uint8" or "int8", of static inputs
        activation_symmetric: zero is the middle of the inputs' codes
        per_channel: a scale for each row of a weight, else one for all
        symmetric: the middle code of a weight is zero
    """

    alpha: float | Literal["auto"] = 0.5
    alphas: tuple[float, ...] = tuple(step / 10 for step in range(11))
    blockwise: bool = False
    per: Literal["static", "tensor", "token"] = "static"
    format: Literal["uint8", "int8"] = "uint8"
    activation_symmetric: bool = False
    per_channel: bool = True
    symmetric: bool = True

    def __post_init__(self) -> None:
        tried = self.alphas if self.alpha == "auto" else (self.alpha,)
        if not tried or not all(isinstance(alpha, int | float) and 0 <= alpha <= 1 for alpha in tried):
            raise OptionError(f"alpha={self.alpha!r} among {tried!r}: expected numbers from 0 to 1, or 'auto'")


@dataclasses.dataclass(slots=True, eq=False)
class _Input:
    """What some layers read: its least and largest value by channel ``[K]``, zero among them, and some of its rows."""

    names: Sequence[str]
    low: Tensor
    high: Tensor
    rows: Tensor

    def smoothing(self, weights: Mapping[str, Tensor], alpha: float) -> Tensor:
        """``s`` ``[K]``; 1 where a channel is never anything but 0, or is not looked at."""
        size = torch.maximum(self.high, -self.low)
        weight = torch.stack([weights[name].abs().amax(0) for name in self.names]).amax(0)
        scale = size.pow(alpha) / weight.pow(1 - alpha)
        return torch.where((size > 0) & (weight > 0) & torch.isfinite(scale), scale, torch.ones_like(scale))


def smoothquant(block: Block, layers: Mapping[str, SmoothQuant]) -> Mapping[str, QuantWeight]:
    """The layers of ``block`` in eight bits with ``pre_scale`` ``1 / s``. The block is left as it is.

    Ranges are those of the float model, as with observers.

    Raises:
        FeedError: layers that no call reaches
        ModelError: NaN or infinity among the inputs or weights
    """
    weights = {name: linear_weight(block.module.get_submodule(name)).to(torch.float32) for name in layers}
    inputs = _inputs(block, shared_inputs(block, layers))
    fixed = {name: _tried(layers[name]) for name in layers}
    together = [name for name in layers if len(fixed[name]) > 1 and layers[name].blockwise]
    if together:
        tried = fixed[together[0]]
        errors = [_block_error(block, inputs, weights, {n: layers[n] for n in together}, alpha) for alpha in tried]
        fixed |= dict.fromkeys(together, (tried[errors.index(min(errors))],))
    found: dict[str, QuantWeight] = {}
    for each in inputs:
        # Layers that share their inputs share alpha, too: the first one's.
        alphas = fixed[each.names[0]]
        tries = [_smoothed(each, weights, layers, alpha) for alpha in alphas]
        errors = [_layer_error(each, weights, one) for one in tries] if len(tries) > 1 else [0.0]
        found |= tries[errors.index(min(errors))]
    return found


def _tried(method: SmoothQuant) -> tuple[float, ...]:
    return method.alphas if method.alpha == "auto" else (method.alpha,)


def _inputs(block: Block, shared: Sequence[Sequence[str]]) -> list[_Input]:
    found: dict[str, _Input] = {}
    # Rows from all calls alike, not only from the first.
    share = math.ceil(_ROWS / max(len(block.float_calls), 1))

    def sink(names: Sequence[str], x: Tensor) -> None:
        rows = x.detach().to(torch.float32).flatten(0, -2)
        low, high = rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0)
        some = rows[:: max(len(rows) // share, 1)][:share].clone()
        before = found.get(names[0])
        if before is not None:
            low, high = torch.minimum(low, before.low), torch.maximum(high, before.high)
            some = torch.cat([before.rows, some])
        found[names[0]] = _Input(names, low, high, some)

    block.watch({names[0]: functools.partial(sink, names) for names in shared}, floats=True)
    return list(found.values())


def _smoothed(
    each: _Input, weights: Mapping[str, Tensor], layers: Mapping[str, SmoothQuant], alpha: float
) -> dict[str, QuantWeight]:
    scale = each.smoothing(weights, alpha)
    found = {}
    for name in each.names:
        how = layers[name]
        weight = int8_weight(weights[name] * scale, per_channel=how.per_channel, symmetric=how.symmetric, name=name)
        if how.per == "static":
            low, high = (each.low / scale).amin(), (each.high / scale).amax()
            activation = static_activation(low, high, format=how.format, symmetric=how.activation_symmetric)
        else:
            activation = Activation(format="int8" if how.activation_symmetric else "uint8", per=how.per)
        found[name] = dataclasses.replace(weight, pre_scale=1 / scale, activation=activation)
    return found


def _layer_error(each: _Input, weights: Mapping[str, Tensor], found: Mapping[str, QuantWeight]) -> float:
    """Squared error of the outputs of layers that share ``each``, over its rows, relative to the outputs' own size."""
    total = 0.0
    for name, quantized in found.items():
        assert quantized.activation is not None, "made so by _smoothed"
        assert quantized.pre_scale is not None, "made so by _smoothed"
        truth = each.rows @ weights[name].T
        got = rounded(each.rows * quantized.pre_scale, quantized.activation) @ quantized.values().T
        total += float((got - truth).square().sum() / truth.square().sum().clamp(min=1e-30))
    return total


def _block_error(
    block: Block,
    inputs: Sequence[_Input],
    weights: Mapping[str, Tensor],
    layers: Mapping[str, SmoothQuant],
    alpha: float,
) -> float:
    found: dict[str, QuantWeight] = {}
    for each in inputs:
        names = [name for name in each.names if name in layers]
        if names:
            found |= _smoothed(dataclasses.replace(each, names=names), weights, layers, alpha)
    with _placed(block, found):
        return block.error()


@contextlib.contextmanager
def _placed(block: Block, found: Mapping[str, QuantWeight]) -> Iterator[None]:
    """Within it the block's layers are those of ``found``."""
    before = {name: block.module.get_submodule(name) for name in found}
    try:
        for name, quantized in found.items():
            replace(block.module, name, as_quantized(before[name], quantized))
        yield
    finally:
        for name, module in before.items():
            replace(block.module, name, module)
