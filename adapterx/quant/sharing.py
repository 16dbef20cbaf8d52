"""What the layers of a block read, and which read the same tensor: found by running the block, not by names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch

from adapterx.errors import FeedError, ModelError
from adapterx.quant.blocks import Block

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Of the layers of a block, over all its calls.

    Args:
        shared: names in lists of those that read one tensor, in the order in which the block comes to them, for example
            ``[["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]``
        moments: ``mean(x.T @ x)`` by name, float32 ``[K, K]``
        sizes: ``mean(|x|)`` by name, float32 ``[K]``
    """

    shared: list[list[str]]
    moments: Mapping[str, Tensor]
    sizes: Mapping[str, Tensor]


def inputs_of(block: Block, names: Iterable[str]) -> Inputs:
    """What the layers ``names`` of ``block`` read, from one run over its calls.

    Raises:
        FeedError: layers that no call of the block reaches
        ModelError: NaN or infinity among the inputs
    """
    names = list(names)
    sums: dict[str, _Sum] = {}
    last = _Last()

    def sink_of(name: str) -> Callable[[Tensor], None]:
        def sink(x: Tensor) -> None:
            last.take(x)
            if name not in sums:
                sums[name] = _Sum(last)
            sums[name].add(last)

        return sink

    block.watch({name: sink_of(name) for name in names})
    _require(block, names, sums)
    lists: dict[tuple[int, ...], list[str]] = {}
    for name, found in sums.items():
        lists.setdefault(tuple(found.serials), []).append(name)
        if not bool(torch.isfinite(found.moment).all()):
            raise ModelError(
                f"{_full(block, name)}: calibration gives it inputs that are NaN, infinite or too large to square"
            )
    means = {name: (found.moment / max(found.rows, 1), found.size / max(found.rows, 1)) for name, found in sums.items()}
    return Inputs(
        shared=list(lists.values()),
        moments={name: moment for name, (moment, _) in means.items()},
        sizes={name: size for name, (_, size) in means.items()},
    )


def shared_inputs(block: Block, names: Iterable[str]) -> list[list[str]]:
    """`Inputs.shared` alone; errors as of `inputs_of`."""
    return inputs_of(block, names).shared


class _Last:
    """The tensor that was read last, and its sums. It is held, so that no other can take its place in memory."""

    def __init__(self) -> None:
        self.serial = self.rows = 0
        self.x: Tensor | None = None
        self.product = self.size = torch.empty(0)

    def take(self, x: Tensor) -> None:
        if x is self.x:
            return
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        self.x, self.serial, self.rows = x, self.serial + 1, len(rows)
        self.product, self.size = rows.T @ rows, rows.abs().sum(0)


class _Sum:
    """Over all that one layer read."""

    def __init__(self, last: _Last) -> None:
        self.serials: list[int] = []
        self.rows = 0
        self.moment, self.size = torch.zeros_like(last.product), torch.zeros_like(last.size)

    def add(self, last: _Last) -> None:
        self.moment += last.product
        self.size += last.size
        self.serials.append(last.serial)
        self.rows += last.rows


def _require(block: Block, names: Iterable[str], met: Iterable[str]) -> None:
    missed = [_full(block, name) for name in names if name not in set(met)]
    if missed:
        raise FeedError(
            f"calibration data never reached {', '.join(missed[:5])}{', ...' if len(missed) > 5 else ''}: show the "
            f"model more, or leave these layers in float with set_local(name, dtype='fp32')"
        )


def _full(block: Block, name: str) -> str:
    return f"{block.name}.{name}" if block.name else name
