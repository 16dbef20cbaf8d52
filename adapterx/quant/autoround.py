"""AutoRound: which way each weight is rounded, and how far each range is cut, are learnt with signs of gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from adapterx.errors import OptionError
from adapterx.quant.affine import double_quantized, grouped, ungrouped
from adapterx.quant.block_learning import Pace, agreed, learn
from adapterx.quant.blocks import Block
from adapterx.quant.linear import linear_weight
from adapterx.quant.rtn import as_weight, finite
from adapterx.quant.scheme import Scheme
from adapterx.quant.straight_through import grid_through, on_grid_through
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class AutoRound:
    """AutoRound (Cheng et al., arXiv 2309.05516): SignSGD on how a block rounds, against its outputs in float.

    Each weight has an offset within half a code, and each group a factor for either end of its range. The inputs are
    those that the quantized blocks before give, so that later blocks make up for earlier ones.

    Args:
        scheme: integers only
        iters: steps a block; 0 is round to nearest
        lr: how far an offset moves in the first step, falling to 0 in a line; None is ``1 / iters``
        minmax_lr: the same for the ranges; None is ``lr``
        batch_size: rows a step; whole calibration calls are drawn until they hold so many
        tune_ranges: learn the ranges, too
        seed: of the draws
    """

    scheme: Scheme = dataclasses.field(default_factory=Scheme)
    iters: int = 200
    lr: float | None = None
    minmax_lr: float | None = None
    batch_size: int = 8
    tune_ranges: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        if self.scheme.format != "int":
            raise OptionError(f"AutoRound rounds to integers, not to {self.scheme.format!r}; RTN, GPTQ and AWQ know it")
        if self.iters < 0 or self.batch_size < 1:
            raise OptionError(f"iters={self.iters!r}, batch_size={self.batch_size!r}: expected at least 0 and 1")


@dataclasses.dataclass(slots=True, eq=False)
class _Rounding:
    """What is learnt of one layer: ``offset`` ``[N, G, group]``, and ``reach`` ``[2, N, G, 1]`` for low and high."""

    groups: Tensor
    low: Tensor
    high: Tensor
    offset: Tensor
    reach: Tensor
    scheme: Scheme
    inputs: int

    def grid(self) -> tuple[Tensor, Tensor]:
        return grid_through(self.low * self.reach[0], self.high * self.reach[1], self.scheme)

    def weight(self) -> Tensor:
        scale, zero = self.grid()
        found = on_grid_through(self.groups, scale, zero, bits=self.scheme.bits, offset=self.offset)
        return ungrouped(found, self.inputs)

    def quantized(self) -> QuantWeight:
        scales, zero = (part.squeeze(-1) for part in self.grid())
        double = None if self.scheme.double is None else double_quantized(scales, self.scheme.double)
        scales = scales if double is None else double.values()
        codes = torch.round(self.groups / scales.unsqueeze(-1) + self.offset) + zero.unsqueeze(-1)
        codes = ungrouped(codes.clamp(0, 2**self.scheme.bits - 1), self.inputs).to(torch.uint8)
        return as_weight(codes, scales, zero, self.scheme, double=double)


def autoround(block: Block, layers: Mapping[str, AutoRound]) -> Mapping[str, QuantWeight]:
    """The layers of ``block``, their rounding learnt together. The block is left as it is.

    Its error on the calibration data is never larger than that of round to nearest.

    Raises:
        FeedError: NaN or infinity among the block's outputs
        ModelError: NaN or infinity among the weights
        OptionError: layers of one block that want to be learnt in different ways

    Example:
        >>> from adapterx.quant.calibration import Call
        >>> layer, x = torch.nn.Linear(8, 8, bias=False), torch.randn(4, 8)
        >>> calls = [Call((x,), {})]
        >>> block = Block("", torch.nn.Sequential(layer), calls, calls, [layer(x).detach()])
        >>> autoround(block, {"0": AutoRound(Scheme(bits=4, group_size=-1), iters=10)})["0"].bits
        4
    """
    how = agreed(layers)
    roundings = {name: _started(block, name, method.scheme) for name, method in layers.items()}
    lr = 1 / max(how.iters, 1) if how.lr is None else how.lr
    minmax_lr = 0.0 if not how.tune_ranges else lr if how.minmax_lr is None else how.minmax_lr

    def move(gradients: Sequence[Tensor], share: float) -> None:
        for rounding, offset, reach in zip(roundings.values(), gradients[::2], gradients[1::2], strict=True):
            rounding.offset.sub_(offset.sign(), alpha=lr * share).clamp_(-0.5, 0.5)
            rounding.reach.sub_(reach.sign(), alpha=minmax_lr * share).clamp_(0, 1)

    learn(
        block,
        [part for rounding in roundings.values() for part in (rounding.offset, rounding.reach)],
        weights=lambda: {name: rounding.weight() for name, rounding in roundings.items()},
        move=move,
        pace=Pace(how.iters, how.batch_size, how.seed),
    )
    return {name: rounding.quantized() for name, rounding in roundings.items()}


def _started(block: Block, name: str, scheme: Scheme) -> _Rounding:
    full = f"{block.name}.{name}" if block.name else name
    weight = finite(linear_weight(block.module.get_submodule(name)), full)
    group, _ = scheme.groups_of(weight.shape[1], name=full)
    groups = grouped(weight, group)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    reach = torch.ones(2, *low.shape, device=weight.device)
    return _Rounding(groups, low, high, torch.zeros_like(groups), reach, scheme, weight.shape[1])
