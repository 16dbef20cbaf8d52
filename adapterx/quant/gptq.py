"""GPTQ: the columns of a weight are rounded one after another, and those that are left make up for the error so far
(Frantar et al., arXiv 2210.17323).

The error that counts is that of the layer's outputs on the calibration data, so all that is needed of the data is the
second moment of the inputs: its Cholesky factor says how each column makes up for the others.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import cast

import torch

from adapterx.errors import ModelError, OptionError
from adapterx.quant.affine import grouped
from adapterx.quant.blocks import Block
from adapterx.quant.levels import Levels, levels_of
from adapterx.quant.linear import linear_weight, write_weight
from adapterx.quant.rtn import finite
from adapterx.quant.scheme import Scheme
from adapterx.quant.sharing import inputs_of
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class GPTQ:
    """GPTQ, in ``scheme``: integers, or a table, with ``mse`` and ``double`` as there.

    Args:
        scheme: of the codes
        act_order: columns whose inputs are largest first; groups are made in that order, and the result has an
            ``order``, so its inputs must be gathered when it runs
        static_groups: the groups are those of the weight as it lies, with scales from before the first step; with
            ``act_order`` nothing has to be gathered
        hybrid_order: groups whose inputs are largest first, and within each the columns likewise; nothing has to be
            gathered
        true_sequential: layers of a block that come later see inputs from the quantized layers before them
        percdamp: of the mean of the moment's diagonal, added to the diagonal; ten times as much when the factor fails
        block_size: columns whose corrections are applied to the rest at once; speed only

    Raises:
        OptionError: ``act_order`` together with ``hybrid_order``; a damping or block size that is not positive
    """

    scheme: Scheme = dataclasses.field(default_factory=Scheme)
    act_order: bool = False
    static_groups: bool = False
    hybrid_order: bool = False
    true_sequential: bool = False
    percdamp: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if self.act_order and self.hybrid_order:
            raise OptionError("act_order and hybrid_order are two orders of the same columns; take one of them")
        if not self.percdamp > 0:
            raise OptionError(f"percdamp={self.percdamp!r} must be positive; 0.01 is usual")
        if self.block_size < 1:
            raise OptionError(f"block_size={self.block_size!r} is not a number of columns; 128 is usual")


def gptq(block: Block, layers: Mapping[str, GPTQ]) -> Mapping[str, QuantWeight]:
    """The weights of ``layers``, names within ``block``, quantized on the inputs that the block is shown.

    Where a method of ``layers`` is ``true_sequential``, the block's float weights hold the quantized values afterwards.

    Raises:
        FeedError: layers that the calibration data never reaches
        ModelError: weights or inputs that are not finite; a moment that no damping makes positive
        OptionError: a group that does not fit
    """
    found = inputs_of(block, layers)
    results: dict[str, QuantWeight] = {}
    sequential = any(method.true_sequential for method in layers.values())
    for stage, names in enumerate(found.shared):
        # Layers before the first one of a block have not changed what it reads.
        moments = inputs_of(block, names).moments if sequential and stage else found.moments
        for name in names:
            layer = block.module.get_submodule(name)
            full = f"{block.name}.{name}" if block.name else name
            results[name] = solved(linear_weight(layer), moments[name], layers[name], name=full)
            if sequential:
                write_weight(layer, results[name].dequantized())
    return {name: results[name] for name in layers}


def solved(weight: Tensor, moment: Tensor, method: GPTQ, *, name: str = "a layer") -> QuantWeight:
    """``weight`` ``[N, K]`` in codes that keep the outputs for inputs with the second moment ``moment`` ``[K, K]``.

    Columns whose inputs were always zero are rounded to nearest: they take no part.
    """
    weight, scheme = finite(weight, name), method.scheme
    inputs = weight.shape[1]
    group, count = scheme.groups_of(inputs, name=name)
    order = _order(moment.diagonal(), group, method)
    places = torch.arange(inputs, device=weight.device) if _moves_groups(method) else order
    factor = _factor(moment[order][:, order], method.percdamp, name)
    columns = weight[:, order].T.contiguous()
    fixed = levels_of(grouped(weight, group), scheme).doubled() if method.static_groups else None
    steps = _Steps(factor, (places // group).tolist(), count, method.block_size, scheme)
    codes, levels = _rounded(columns, steps, fixed)
    if fixed is None and scheme.double is not None:
        # The rounded scales are known only when all scales are, so the codes are chosen once more.
        codes, levels = _rounded(columns, steps, levels.doubled())
    codes = torch.empty_like(codes).index_copy_(0, places, codes).T.contiguous()
    return levels.weight(codes, order=order if _moves_groups(method) else None)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """``factor`` ``[K, K]`` and ``groups``, the group of each column, both in the order of the steps."""

    factor: Tensor
    groups: list[int]
    count: int
    block_size: int
    scheme: Scheme

    def chunks(self) -> list[tuple[int, int]]:
        """Runs of at most ``block_size`` columns. A group lies within one, or begins one, so that all corrections of
        earlier columns have come when its scale is found.
        """
        cuts, stop = [0], 0
        for _, run in itertools.groupby(self.groups):
            start, stop = stop, stop + len(list(run))
            if stop - cuts[-1] > self.block_size and start > cuts[-1]:
                cuts.append(start)
            while stop - cuts[-1] > self.block_size:
                cuts.append(cuts[-1] + self.block_size)
        return list(zip(cuts, [*cuts[1:], len(self.groups)], strict=True))


def _moves_groups(method: GPTQ) -> bool:
    return method.act_order and not method.static_groups


def _order(diagonal: Tensor, group: int, method: GPTQ) -> Tensor:
    """The columns in the order of the steps."""
    if method.act_order:
        return torch.argsort(diagonal, descending=True, stable=True)
    if not method.hybrid_order:
        return torch.arange(len(diagonal), device=diagonal.device)
    rows = torch.nn.functional.pad(diagonal, (0, -len(diagonal) % group), value=-1).reshape(-1, group)
    first = torch.argsort(rows.amax(-1), descending=True, stable=True)
    within = (
        torch.argsort(rows, dim=-1, descending=True, stable=True)
        + torch.arange(len(rows)).to(diagonal.device).unsqueeze(1) * group
    )
    flat = within[first].flatten()
    return flat[flat < len(diagonal)]


def _factor(moment: Tensor, percdamp: float, name: str) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moment."""
    diagonal = moment.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.mean())
    damp = percdamp * mean if mean > 0 else 1.0
    for _ in range(8):
        damped = moment + torch.diag(damp + dead * (mean or 1.0))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return cast(Tensor, upper)
        damp *= 10
    raise ModelError(
        f"{name}: the second moment of its inputs cannot be factored, even with {damp / 10:.3g} added to its diagonal "
        f"(mean {mean:.3g}); look for inputs of extreme size, or take another method for it"
    )


def _rounded(columns: Tensor, steps: _Steps, fixed: Levels | None) -> tuple[Tensor, Levels]:
    """Codes, float32 ``[K, N]`` in the order of the steps, and the levels: ``fixed``, or found group by group."""
    columns, codes = columns.clone(), torch.empty_like(columns)
    rows = columns.shape[1]
    scale = columns.new_empty(rows, steps.count)
    levels = fixed or Levels(steps.scheme, scale, torch.empty_like(scale))
    met: set[int] = set()
    for start, stop in steps.chunks():
        errors = columns.new_empty(stop - start, rows)
        for step in range(start, stop):
            group = steps.groups[step]
            if fixed is None and group not in met:
                met.add(group)
                end = step + steps.groups.count(group)
                found = levels_of(columns[step:end].T.unsqueeze(1), steps.scheme)
                levels.scale[:, group], levels.zero[:, group] = found.scale[:, 0], found.zero[:, 0]
            column, row = columns[step], steps.factor[step]
            codes[step] = code = levels.codes(column, group)
            errors[step - start] = error = (column - levels.values(code, group)) / row[step]
            columns[step + 1 : stop].addr_(row[step + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(steps.factor[start:stop, stop:].T, errors, alpha=-1)
    return codes, levels
