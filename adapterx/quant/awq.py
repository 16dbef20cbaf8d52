"""AWQ: activation-aware weight quantization (Lin et al., arXiv 2306.00978).

Channels whose inputs are large matter most, so their weights are made larger before rounding, and the inputs smaller by
the same. How much is searched for: powers of the inputs' size, judged by what comes out. Then each group's range is
cut where that helps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from adapterx.errors import OptionError
from adapterx.quant.affine import grouped, ungrouped
from adapterx.quant.blocks import Block
from adapterx.quant.fold import Fold, fold_in
from adapterx.quant.levels import Levels, levels_of
from adapterx.quant.linear import linear_weight
from adapterx.quant.output_error import OutputError, output_error
from adapterx.quant.producers import find_producers
from adapterx.quant.rtn import finite
from adapterx.quant.scheme import Scheme
from adapterx.quant.sharing import Inputs, inputs_of
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor

# Ranges are cut down to this part of themselves at most, in so many steps.
_LEAST_KEPT, _CUTS = 0.4, 24


@dataclasses.dataclass(frozen=True, slots=True)
class AWQ:
    """AWQ, in ``scheme``.

    Args:
        scheme: integers, or a table
        auto_scale: search scales for the inputs
        auto_clip: search the range of each group; not where ``scheme.mse`` does that already
        folding: the scales go into what produces the inputs, where such a module is found and proven; where there is
            none, the inputs are not scaled. Else the scales are ``pre_scale`` of the results, and whatever else reads
            the same inputs, an adapter for one, sees no change
        absorb: ``{producer: consumers}`` for ``folding``, where the user knows them; also proven
        ratios: powers that are tried, from 0, which is no scale
        tokens: of the calibration that scales are judged by, about; ranges are judged by all

    Raises:
        OptionError: no ratio or no tokens
    """

    scheme: Scheme = dataclasses.field(default_factory=Scheme)
    auto_scale: bool = True
    auto_clip: bool = True
    folding: bool = False
    absorb: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    ratios: int = 20
    tokens: int = 2048

    def __post_init__(self) -> None:
        if self.ratios < 1 or self.tokens < 1:
            raise OptionError(f"ratios={self.ratios!r}, tokens={self.tokens!r}: expected at least 1 of each")


def awq(block: Block, layers: Mapping[str, AWQ]) -> Mapping[str, QuantWeight]:
    """The weights of ``layers``, names within ``block``, scaled and cut so that little of the outputs is lost.

    Layers that read one tensor share a scale, which the smallest module around them judges by its outputs. With
    ``folding``, float weights of the block change in place: it computes the same, and `Block.folds` says what moved.

    Raises:
        FeedError: layers that the calibration data never reaches
        MismatchError: a pair of ``absorb`` that is not one
        ModelError: weights or inputs that are not finite
        OptionError: a group that does not fit
    """
    inputs = inputs_of(block, layers)
    weights = {name: _weight(block, name) for name in layers}
    folding = {name for name, method in layers.items() if method.folding}
    absorb = {key: names for method in layers.values() for key, names in method.absorb.items()}
    pairs = find_producers(block, inputs.shared, absorb) if folding else [None] * len(inputs.shared)
    results: dict[str, QuantWeight] = {}
    searches = []
    for names, pair in zip(inputs.shared, pairs, strict=True):
        some = {name: layers[name] for name in names}
        folds = bool(folding.intersection(names))
        tokens = max(method.tokens for method in some.values())
        error = output_error(block, names, moment=inputs.moments[names[0]], tokens=tokens)
        search = _Search({name: weights[name] for name in names}, some, inputs, error)
        if pair is not None or not folds:
            search.find_scale()
        search.find_ranges()
        searches.append((search, pair if folds else None))
    for search, pair in searches:
        if pair is not None and search.is_scaled:
            fold = Fold(pair.producer, pair.consumers, search.scale)
            fold_in(block.module, fold)
            block.folds.append(fold)
    for search, pair in searches:
        for name in search.weights:
            weight = _weight(block, name) if folding else weights[name]
            scaled = weight if pair is not None else weight * search.scale
            results[name] = search.quantized(name, scaled, None if pair is not None else search.pre_scale)
    return {name: results[name] for name in layers}


class _Search:
    """What is best for the layers that read one tensor: one ``scale`` of their inputs, and ranges for each."""

    def __init__(
        self, weights: Mapping[str, Tensor], methods: Mapping[str, AWQ], inputs: Inputs, error: OutputError
    ) -> None:
        self.weights, self.methods, self.error = weights, methods, error
        first = next(iter(weights))
        self.moment, self.size = inputs.moments[first], inputs.sizes[first]
        self.scale = torch.ones_like(self.size)
        self.keep: dict[str, Tensor | float] = dict.fromkeys(weights, 1.0)

    @property
    def is_scaled(self) -> bool:
        return bool((self.scale != 1).any())

    @property
    def pre_scale(self) -> Tensor | None:
        return 1 / self.scale if self.is_scaled else None

    def find_scale(self) -> None:
        if not all(method.auto_scale for method in self.methods.values()):
            return
        ratios = max(method.ratios for method in self.methods.values())
        size = (self.size / self.size.mean().clamp(min=1e-30)).clamp(min=1e-4)
        least, best = float("inf"), self.scale
        for step in range(ratios):
            power = size.pow(step / ratios)
            self.scale = power / (power.max() * power.min()).sqrt() if step else torch.ones_like(size)
            error = self.error(self._tried())
            if error < least:
                least, best = error, self.scale
        self.scale = best

    def find_ranges(self) -> None:
        """Each layer's ranges by its own outputs; kept where the module around the layers loses less, too."""
        least: float | None = None
        for name, method in self.methods.items():
            if not method.auto_clip or method.scheme.mse:
                continue
            least = self.error(self._tried()) if least is None else least
            self.keep[name] = self._range(name)
            error = self.error(self._tried())
            if error < least:
                least = error
            else:
                self.keep[name] = 1.0

    def quantized(self, name: str, scaled: Tensor, pre_scale: Tensor | None) -> QuantWeight:
        levels, codes = self._rounded(name, scaled)
        return levels.weight(codes, pre_scale=pre_scale)

    def _range(self, name: str) -> Tensor:
        """``[N, G, 1]``: the part of each group's range with the least error of the outputs, that group alone."""
        scheme, inputs = self.methods[name].scheme, len(self.scale)
        group, count = scheme.groups_of(inputs)
        groups = grouped(self.weights[name] * self.scale, group)
        short = -inputs % group
        moment = torch.nn.functional.pad(self.moment / torch.outer(self.scale, self.scale), (0, short, 0, short))
        blocks = moment.reshape(count, group, count, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        best = torch.ones_like(groups[..., :1])
        least = torch.full_like(best, float("inf"))
        for step in range(_CUTS):
            keep = 1 - (1 - _LEAST_KEPT) * step / _CUTS
            lost = (levels_of(groups, scheme, keep=keep).nearest(groups) - groups).transpose(0, 1)
            error = ((lost @ blocks) * lost).sum(-1).T.unsqueeze(-1)
            best = torch.where(error < least, keep, best)
            least = torch.minimum(least, error)
        return best

    def _tried(self) -> dict[str, Tensor]:
        """The weights that would act on unscaled inputs."""
        tried = {}
        for name, weight in self.weights.items():
            levels, codes = self._rounded(name, weight * self.scale)
            group, _ = levels.scheme.groups_of(weight.shape[1])
            tried[name] = ungrouped(levels.values(grouped(codes, group)), weight.shape[1]) / self.scale
        return tried

    def _rounded(self, name: str, scaled: Tensor) -> tuple[Levels, Tensor]:
        scheme, inputs = self.methods[name].scheme, scaled.shape[1]
        groups = grouped(scaled, scheme.groups_of(inputs, name=name)[0])
        levels = levels_of(groups, scheme, keep=self.keep[name]).doubled()
        return levels, ungrouped(levels.codes(groups), inputs)


def _weight(block: Block, name: str) -> Tensor:
    full = f"{block.name}.{name}" if block.name else name
    return finite(linear_weight(block.module.get_submodule(name)), full).clone()
