"""Calibration: what a model was shown, kept so that its blocks can be quantized one after another.

While the user's own loop runs the model, hooks keep the arguments of each call of the model, the first input of each
chain of blocks, and the other arguments of each block (masks, positions), which are shared between blocks and so cost
little. The loop runs to its end: nothing is aborted, and no exception is raised in it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from adapterx.errors import FeedError
from adapterx.quant.linear import is_linear

Tensor = torch.Tensor

# A cache of keys and values would grow at each rerun of a block, and attend to itself.
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def of(self, module: nn.Module) -> Any:
        """What ``module`` returns for them."""
        return module(*self.args, **self.kwargs)

    def with_first(self, value: Tensor) -> Call:
        """The same call, with another tensor in the first place (``hidden_states``)."""
        if self.args:
            return Call((value, *self.args[1:]), self.kwargs)
        name = next(iter(self.kwargs))
        return Call((), {**self.kwargs, name: value})

    @property
    def first(self) -> Any:
        """The first argument, by position or by name."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)


def first_tensor(result: Any) -> Tensor:
    """The hidden states of what a block returned: the tensor itself, or the first of a tuple or of an output object."""
    return result if isinstance(result, Tensor) else result[0]


def chains(model: nn.Module) -> list[list[str]]:
    """Names of the blocks of ``model``, one list for each chain: the outermost ``ModuleList``s whose members hold
    linear layers.

    Example:
        >>> chains(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))
        [['0', '1']]
    """
    found: list[list[str]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for chain in found for block in chain)
        if isinstance(module, nn.ModuleList) and not inside and len(module) > 1:
            names = [f"{name}.{index}" if name else str(index) for index in range(len(module))]
            if all(any(is_linear(part) for part in block.modules()) for block in module):
                found.append(names)
    return found


class Calibration:
    """The calls that a model and its blocks got while this was attached.

    Args:
        model: hooks are put on it at once, and taken off by `detach`
        needed: names of the layers that have to be reached
    """

    def __init__(self, model: nn.Module, needed: list[str]) -> None:
        self.model, self.needed = model, needed
        self.calls: list[Call] = []
        self.blocks: dict[str, list[Call]] = {}
        self.chains = chains(model)
        self._heads = {chain[0] for chain in self.chains}
        self._outputs: dict[str, Tensor] = {}
        self._broken: set[str] = set()
        self._reached: set[str] = set()
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._model_hook, with_kwargs=True)]
        for chain in self.chains:
            for before, name in zip([None, *chain], chain, strict=False):
                block = model.get_submodule(name)
                self._handles.append(block.register_forward_pre_hook(self._block_hook(name, before), with_kwargs=True))
                self._handles.append(block.register_forward_hook(self._output_hook(name)))
        for name in needed:
            self._handles.append(model.get_submodule(name).register_forward_pre_hook(self._reach_hook(name)))

    def detach(self) -> None:
        """Take the hooks off; what was kept stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()
        # Nothing that came out of inference mode may be part of a gradient, which some methods follow.
        self.calls = _normal(self.calls)
        self.blocks = _normal(self.blocks)

    def moved_to(self, model: nn.Module) -> Calibration:
        """This for ``model``, a deep copy of its own model: hooks that were copied along are taken off there."""
        ids = {handle.id for handle in self._handles}
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
                for known in ids & hooks.keys():
                    del hooks[known]
        moved = copy.copy(self)
        moved.model, moved._handles, moved._outputs = model, [], {}
        return moved

    def require(self) -> None:
        """See to it that every layer that needs data got some.

        Raises:
            FeedError: layers that no calibration call reached
        """
        missed = [name for name in self.needed if name not in self._reached]
        if missed:
            seen = f"{len(self.calls)} calls" if self.calls else "the model was never called"
            raise FeedError(
                f"calibration data never reached {len(missed)} of {len(self.needed)} layers "
                f"({', '.join(missed[:5])}{', ...' if len(missed) > 5 else ''}; {seen}). Run the prepared model on a "
                f"few batches between prepare and convert, or pass run_fn; leave these layers in float with "
                f"set_local(name, dtype='fp32')"
            )

    def unbroken_chains(self) -> list[list[str]]:
        """The chains in which each block's input is what the block before it gave:

        Only those can be walked block by block.
        """
        return [
            chain
            for chain in self.chains
            if not self._broken.intersection(chain) and all(n in self.blocks for n in chain)
        ]

    def _model_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append(Call(_kept(args), _kept(kwargs)))
        self._outputs.clear()

    def _block_hook(self, name: str, before: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = Call(args, kwargs)
            if before is not None and self._outputs.get(before) is not call.first:
                self._broken.add(name)
            kept = Call(_kept(args), _kept(kwargs))
            # The hidden states of the later blocks are computed again, so they need not be held.
            self.blocks.setdefault(name, []).append(kept if name in self._heads else kept.with_first(torch.empty(0)))

        return hook

    def _output_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            self._outputs[name] = first_tensor(result)

        return hook

    def _reach_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._reached.add(name)

        return hook


def _kept(value: Any, name: str = "") -> Any:
    """``value`` with tensors cut off from their graph, and without a cache of keys and values."""
    if name in _CACHES or type(value).__name__.endswith("Cache"):
        return None
    if name == "use_cache":
        return False
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(_kept(item) for item in value)
    return {key: _kept(item, key) for key, item in value.items()} if type(value) is dict else value


def _normal(value: Any) -> Any:
    """``value`` with tensors from inference mode copied to tensors that are not."""
    match value:
        case Tensor():
            return value.clone() if value.is_inference() else value
        case Call():
            return Call(_normal(value.args), _normal(value.kwargs))
        case dict():
            return {key: _normal(item) for key, item in value.items()}
        case list() | tuple() if type(value) in (tuple, list):
            return type(value)(_normal(item) for item in value)
    return value


def batches(calls: list[Call]) -> Iterator[Call]:
    """``calls`` one after another, without gradients."""
    with torch.no_grad():
        yield from calls
