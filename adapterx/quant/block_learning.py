"""Block learning: parameters of a block's layers move so that the quantized block gives what the float block gives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.func import functional_call

from adapterx.errors import FeedError, OptionError
from adapterx.quant.blocks import Block
from adapterx.quant.calibration import first_tensor
from adapterx.quant.linear import stored_weight
from adapterx.quant.scheme import Scheme

Tensor = torch.Tensor
Weights = Callable[[], Mapping[str, Tensor]]
Move = Callable[[Sequence[Tensor], float], None]
Method = TypeVar("Method")


@dataclasses.dataclass(frozen=True, slots=True)
class Pace:
    """How long is learnt, and on how much.

    Args:
        steps: of the parameters
        rows: a step; whole calibration calls are drawn until they hold so many
        seed: of the draws
    """

    steps: int
    rows: int
    seed: int


def learn(block: Block, parameters: Sequence[Tensor], *, weights: Weights, move: Move, pace: Pace) -> None:
    """Move ``parameters`` in place; of the start, the step that looked best, and the end, that with the least error
    over all calls is left in them.

    The block's inputs are those that the quantized blocks before it give, so that it makes up for them.

    Args:
        block: left as it is
        parameters: tensors without gradients
        weights: layer -> ``[N, K]``, fake quantized, of the parameters as they are now, differentiable
        move: changes the parameters, from their gradients and the share of the learning rate, which falls to 0
        pace: how long

    Raises:
        FeedError: NaN or infinity among the block's outputs
    """
    best, best_error = _copied(parameters), error_of_all(block, weights)
    promising, promise = best, math.inf
    drawn = _draws(block, pace)
    for step in range(pace.steps):
        with torch.enable_grad():
            for parameter in parameters:
                parameter.requires_grad_()
            loss = _error(block, weights(), next(drawn))
            # An expert that no token was sent to has no gradient.
            gradients = torch.autograd.grad(loss, list(parameters), materialize_grads=True)
        for parameter in parameters:
            parameter.requires_grad_(False)
        if float(loss.detach()) < promise:
            promising, promise = _copied(parameters), float(loss.detach())
        move(gradients, 1 - step / pace.steps)
    for candidate in (promising, _copied(parameters)):
        _put(parameters, candidate)
        error = error_of_all(block, weights)
        if error < best_error:
            best, best_error = candidate, error
    _put(parameters, best)


def agreed(layers: Mapping[str, Method]) -> Method:
    """The one method that all of ``layers`` name, schemes aside.

    Raises:
        OptionError: layers of one block that want to be learnt in different ways
    """
    ways: dict[Any, str] = {}
    for name, method in layers.items():
        ways.setdefault(dataclasses.replace(method, scheme=Scheme()), name)  # type: ignore[type-var]
    if len(ways) > 1:
        raise OptionError(
            f"layers of one block are learnt together, but {' and '.join(list(ways.values())[:2])} differ in more than "
            f"their scheme; give all of a block the same steps, rates, batch size and seed"
        )
    return next(iter(layers.values()))


def _error(block: Block, weights: Mapping[str, Tensor], calls: Sequence[int]) -> Tensor:
    """Mean squared difference of the block's outputs from its targets, in float32, were its weights ``weights``."""
    stored = {
        f"{name}.weight": stored_weight(block.module.get_submodule(name), weight) for name, weight in weights.items()
    }
    wrong, count = torch.zeros(()), 0
    for index in calls:
        call, target = block.calls[index], block.targets[index]
        # Not tied: an embedding that shares the head's weight stays as it is.
        found = functional_call(block.module, stored, call.args, dict(call.kwargs), tie_weights=False)
        wrong = wrong.to(target.device) + (first_tensor(found).float() - target.float()).square().sum()
        count += target.numel()
    return wrong / max(count, 1)


def error_of_all(block: Block, weights: Weights) -> float:
    """The loss over all calls of ``block``.

    Raises:
        FeedError: NaN or infinity among the block's outputs
    """
    with torch.no_grad():
        error = float(_error(block, weights(), range(len(block.calls))))
    if not math.isfinite(error):
        raise FeedError(
            f"{block.name or 'the model'}: the calibration data give NaN or infinity, in float or with rounded "
            f"weights; look at the data, and at a model in float16 that overflows (bfloat16 does not)"
        )
    return error


def _draws(block: Block, pace: Pace) -> Iterator[list[int]]:
    """Without end: calls, drawn at random, that hold ``pace.rows`` rows together."""
    generator = torch.Generator().manual_seed(pace.seed)
    sizes = [len(target) for target in block.targets]
    while True:
        drawn: list[int] = []
        for index in torch.randperm(len(sizes), generator=generator).tolist():
            drawn.append(index)
            if sum(sizes[each] for each in drawn) >= pace.rows:
                break
        yield drawn


def _copied(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.clone() for parameter in parameters]


def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
