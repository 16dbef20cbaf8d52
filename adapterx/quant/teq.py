"""TEQ: a scale for each input of a layer, learnt so that the quantized block gives what the float block gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from adapterx.errors import OptionError
from adapterx.quant.affine import grouped, ungrouped
from adapterx.quant.block_learning import Pace, Weights, agreed, error_of_all, learn
from adapterx.quant.blocks import Block
from adapterx.quant.fold import Fold, fold_in
from adapterx.quant.linear import linear_weight
from adapterx.quant.producers import Pair, find_producers
from adapterx.quant.rtn import RTN, finite, rtn
from adapterx.quant.scheme import Scheme
from adapterx.quant.sharing import inputs_of
from adapterx.quant.straight_through import grid_through, on_grid_through
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor

# Some inputs of large models are a hundred times larger than others: further than steps of a size that learns would go.
_POWERS = (0.0, 0.25, 0.5, 0.75)


@dataclasses.dataclass(frozen=True, slots=True)
class TEQ:
    """Trainable equivalent transformation (Cheng et al., arXiv 2310.10944), block by block.

    ``y = (x / s) @ Q(W * s).T``, and ``s``, one number an input, is learnt. In float nothing changes, whatever ``s``
    is. Layers that read the same tensor share it, so that it can be folded into what produces that tensor. Where the
    paper starts from 1, a block starts from a power of its inputs' sizes, as in AWQ, if that loses less.

    Args:
        scheme: integers only
        steps: of Adam, a block
        lr: of the logarithm of ``s``, falling to 0 in a line
        batch_size: rows a step; whole calibration calls are drawn until they hold so many
        seed: of the draws
        folding: divide what produces the inputs by ``s`` where that can be proven, in place of the inputs themselves;
            layers without such a producer get no scale. Adapters of folded layers must follow (`rebase_adapter`)
        absorb: ``{producer: consumers}`` that the user knows; with it only these consumers get a scale
    """

    scheme: Scheme = dataclasses.field(default_factory=Scheme)
    steps: int = 100
    lr: float = 0.02
    batch_size: int = 8
    seed: int = 42
    folding: bool = False
    absorb: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.scheme.format != "int":
            raise OptionError(f"TEQ learns scales for integers, not for {self.scheme.format!r}; RTN and AWQ know it")
        if self.steps < 0 or self.batch_size < 1:
            raise OptionError(f"steps={self.steps!r}, batch_size={self.batch_size!r}: expected at least 0 and 1")


@dataclasses.dataclass(slots=True, eq=False)
class _Scaled:
    """The layers that read one tensor, float32 ``[N, K]`` each, the logarithm ``[K]`` of their scale, and who
    takes it.
    """

    weights: Mapping[str, Tensor]
    schemes: Mapping[str, Scheme]
    log_scale: Tensor
    pair: Pair | None

    def fake(self) -> dict[str, Tensor]:
        scale = self.log_scale.exp()
        return {
            name: _fake_quantized(weight * scale, self.schemes[name]) / scale for name, weight in self.weights.items()
        }

    def quantized(self, block: Block) -> dict[str, QuantWeight]:
        """By the weights of the block as they are now: a fold has scaled them already."""
        scaled = bool(self.log_scale.any()) and self.pair is None
        scale = self.log_scale.exp() if scaled else torch.ones_like(self.log_scale)
        return {
            name: dataclasses.replace(
                rtn(_weight(block, name) * scale, RTN(scheme), name=name), pre_scale=1 / scale if scaled else None
            )
            for name, scheme in self.schemes.items()
        }


def teq(block: Block, layers: Mapping[str, TEQ]) -> Mapping[str, QuantWeight]:
    """The layers of ``block``, rounded to nearest behind scales that are learnt together, each a ``pre_scale``.

    With ``folding``, float weights of the block change in place: it computes the same, and `Block.folds` says what
    moved. Else it is left as it is. Its error on the calibration data is never larger than without scales.

    Raises:
        FeedError: NaN or infinity among the block's outputs, or layers that no call reaches
        MismatchError: a pair of ``absorb`` that is not one
        ModelError: NaN or infinity among the inputs or weights
        OptionError: layers of one block that want to be learnt in different ways
    """
    how = agreed(layers)
    inputs = inputs_of(block, layers)
    pairs = find_producers(block, inputs.shared, how.absorb) if how.folding else [None] * len(inputs.shared)
    scaled = [_started(block, names, layers, pair) for names, pair in zip(inputs.shared, pairs, strict=True)]
    learning = [each for each in scaled if _learns(each, block, how)]
    parameters = [each.log_scale for each in learning]
    optimizer = torch.optim.Adam(parameters, lr=how.lr)

    def move(gradients: Sequence[Tensor], share: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = how.lr * share
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()

    def weights() -> dict[str, Tensor]:
        return {name: weight for each in scaled for name, weight in each.fake().items()}

    if parameters and how.steps:
        _place(block, learning, [inputs.sizes[next(iter(each.weights))] for each in learning], weights)
        learn(block, parameters, weights=weights, move=move, pace=Pace(how.steps, how.batch_size, how.seed))
    for each in learning:
        if each.pair is not None and bool(each.log_scale.any()):
            fold = Fold(each.pair.producer, each.pair.consumers, each.log_scale.exp())
            fold_in(block.module, fold)
            block.folds.append(fold)
    return {name: found for each in scaled for name, found in each.quantized(block).items()}


def _place(block: Block, learning: Sequence[_Scaled], sizes: Sequence[Tensor], weights: Weights) -> None:
    """Put the scales of a block where they are learnt from: the power of the inputs' sizes with the least error."""
    starts = [torch.log((size / size.mean().clamp(min=1e-30)).clamp(min=1e-4)) for size in sizes]
    errors = []
    for power in _POWERS:
        for each, start in zip(learning, starts, strict=True):
            each.log_scale.copy_(start * power)
        errors.append(error_of_all(block, weights))
    for each, start in zip(learning, starts, strict=True):
        each.log_scale.copy_(start * _POWERS[errors.index(min(errors))])


def _learns(scaled: _Scaled, block: Block, how: TEQ) -> bool:
    """Whether these layers get a scale: not without somebody to take it, and not where the user named others."""
    if how.folding and scaled.pair is None:
        return False
    named = {name for names in how.absorb.values() for name in names}
    prefix = f"{block.name}." if block.name else ""
    return not named or any(name in named or prefix + name in named for name in scaled.weights)


def _started(block: Block, names: Sequence[str], layers: Mapping[str, TEQ], pair: Pair | None) -> _Scaled:
    weights = {name: _weight(block, name) for name in names}
    first = weights[names[0]]
    zero = torch.zeros(first.shape[1], device=first.device)
    return _Scaled(weights, {name: layers[name].scheme for name in names}, zero, pair)


def _weight(block: Block, name: str) -> Tensor:
    return finite(linear_weight(block.module.get_submodule(name)), f"{block.name}.{name}" if block.name else name)


def _fake_quantized(weight: Tensor, scheme: Scheme) -> Tensor:
    group, _ = scheme.groups_of(weight.shape[1])
    groups = grouped(weight, group)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    scale, zero = grid_through(low, high, scheme)
    return ungrouped(on_grid_through(groups, scale, zero, bits=scheme.bits), weight.shape[1])
