"""Originals: what a model was, kept while it is quantized, so that it can be put back when a method fails midway."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from adapterx.quant.linear import replace
from adapterx.quant.tying import computes_with_tying


class Originals:
    """The float layers that were replaced, the weights that a method changed in place, and what else was set.

    Layers are kept as they are, not copied; of a block's tensors only those are kept that a method changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._undo: list[Callable[[], object]] = []

    def replace(self, name: str, layer: nn.Module) -> None:
        """Put ``layer`` where the module called ``name`` is."""
        before = self.model.get_submodule(name)
        self._undo.append(lambda: replace(self.model, name, before))
        replace(self.model, name, layer)

    def untie(self, name: str) -> None:
        """Give the layer a weight of its own, where it shares one with another module (a head with its embedding)."""
        layer = self.model.get_submodule(name)
        weight = layer.weight
        if not isinstance(weight, nn.Parameter):
            return
        owners = [m for m in self.model.modules() if any(p is weight for p in m.parameters(recurse=False))]
        if len(owners) > 1:
            self._undo.append(lambda: setattr(layer, "weight", weight))
            layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            config = getattr(self.model, "config", None)
            if getattr(config, "tie_word_embeddings", False) and not computes_with_tying(self.model):
                # Else transformers would tie them again, when it saves or resizes.
                self._undo.append(lambda: setattr(config, "tie_word_embeddings", True))
                setattr(config, "tie_word_embeddings", False)  # noqa: B010 - of an object of unknown type

    @contextlib.contextmanager
    def guarding(self, module: nn.Module) -> Iterator[None]:
        """Within it, changes in place of what ``module`` holds are noted, to be taken back."""
        with torch.no_grad():
            kept = [(held, held.detach().clone()) for held in [*module.parameters(), *module.buffers()]]
        try:
            yield
        finally:
            for held, before in kept:
                if not torch.equal(held.detach(), before):
                    self._undo.append(functools.partial(_copy, held, before))

    def put_back(self) -> None:
        """Undo everything, the last first."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[Originals]:
    """Gives the model's `Originals`, which are put back after an error."""
    originals = Originals(model)
    try:
        yield originals
    except BaseException:
        originals.put_back()
        raise


def _copy(held: torch.Tensor, before: torch.Tensor) -> None:
    with torch.no_grad():
        held.copy_(before)
