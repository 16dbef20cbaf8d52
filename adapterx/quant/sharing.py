"""Which layers of a block read the same tensor, and what they read: found by running the block, not by names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from adapterx.errors import FeedError, ModelError
from adapterx.quant.blocks import Block

Tensor = torch.Tensor


def shared_inputs(block: Block, names: Iterable[str]) -> list[list[str]]:
    """``names`` in lists of those that read one tensor, in the order in which the block comes to them.

    Example: ``[["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]``.

    Raises:
        FeedError: layers that no call of the block reaches
    """
    names = list(names)
    met: dict[str, list[int]] = {}
    last: list[Tensor] = []
    serial = 0

    def sink_of(name: str) -> Callable[[Tensor], None]:
        def sink(x: Tensor) -> None:
            nonlocal serial
            # The tensor is held until the next one comes, so its identity cannot be given to another.
            if not last or last[0] is not x:
                last[:], serial = [x], serial + 1
            met.setdefault(name, []).append(serial)

        return sink

    block.watch({name: sink_of(name) for name in names})
    _require(block, names, met)
    lists: dict[tuple[int, ...], list[str]] = {}
    for name in met:
        lists.setdefault(tuple(met[name]), []).append(name)
    return list(lists.values())


def second_moments(block: Block, shared: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """``mean(x.T @ x)``, float32 ``[K, K]``, of the inputs of each layer, one tensor for each list of ``shared``.

    Raises:
        ModelError: NaN or infinity among the inputs
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def sink_of(name: str) -> Callable[[Tensor], None]:
        def sink(x: Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1]).to(torch.float32)
            if name not in sums:
                sums[name] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            sums[name].addmm_(rows.T, rows)
            counts[name] = counts.get(name, 0) + len(rows)

        return sink

    block.watch({names[0]: sink_of(names[0]) for names in shared})
    moments = {}
    for names in shared:
        moment = sums[names[0]].div_(max(counts[names[0]], 1))
        if not bool(torch.isfinite(moment).all()):
            raise ModelError(
                f"{_full(block, names[0])}: calibration gives it inputs that are NaN, infinite or too large to square"
            )
        moments.update(dict.fromkeys(names, moment))
    return moments


def _require(block: Block, names: Sequence[str], met: Iterable[str]) -> None:
    missed = [_full(block, name) for name in names if name not in set(met)]
    if missed:
        raise FeedError(
            f"calibration data never reached {', '.join(missed[:5])}{', ...' if len(missed) > 5 else ''}: show the "
            f"model more, or leave these layers in float with set_local(name, dtype='fp32')"
        )


def _full(block: Block, name: str) -> str:
    return f"{block.name}.{name}" if block.name else name
