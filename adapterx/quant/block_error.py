"""How far a block with other weights is from what it gives in float: the loss of the methods that learn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.func import functional_call

from adapterx.errors import FeedError
from adapterx.quant.blocks import Block
from adapterx.quant.calibration import first_tensor
from adapterx.quant.linear import stored_weight

Tensor = torch.Tensor


def block_error(block: Block, weights: Mapping[str, Tensor], calls: Sequence[int] | None = None) -> Tensor:
    """Mean squared difference of the block's outputs from its targets, were its layers' weights ``weights``.

    Differentiable, and the block is left as it is. In float32, whatever the block computes in.

    Args:
        block: with calls as the quantized blocks before it give them
        weights: layer -> ``[N, K]``
        calls: which of them; all by default
    """
    stored = {
        f"{name}.weight": stored_weight(block.module.get_submodule(name), weight) for name, weight in weights.items()
    }
    wrong, count = torch.zeros(()), 0
    for index in range(len(block.calls)) if calls is None else calls:
        call, target = block.calls[index], block.targets[index]
        # Not tied: an embedding that shares the head's weight stays as it is.
        found = functional_call(block.module, stored, call.args, dict(call.kwargs), tie_weights=False)
        wrong = (first_tensor(found).float() - target.float()).square().sum() + wrong.to(target.device)
        count += target.numel()
    return wrong / max(count, 1)


def finite_error(block: Block, weights: Mapping[str, Tensor]) -> float:
    """`block_error` of all calls, without gradients.

    Raises:
        FeedError: NaN or infinity among the block's outputs
    """
    with torch.no_grad():
        error = float(block_error(block, weights))
    if not math.isfinite(error):
        raise FeedError(
            f"{block.name or 'the model'}: the calibration data give NaN or infinity, in float or with rounded "
            f"weights; look at the data, and at a model in float16 that overflows (bfloat16 does not)"
        )
    return error


def draws(block: Block, rows: int, *, generator: torch.Generator) -> Iterator[list[int]]:
    """Without end: calls, drawn at random, that hold ``rows`` rows together. A call is never cut in two."""
    sizes = [len(target) for target in block.targets]
    while True:
        drawn: list[int] = []
        left = rows
        for index in torch.randperm(len(sizes), generator=generator).tolist():
            drawn.append(index)
            left -= sizes[index]
            if left <= 0:
                break
        yield drawn
