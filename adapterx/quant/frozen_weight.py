"""FrozenWeight: a dequantized weight that may be read and not written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from adapterx.errors import ModelError

_WRITES = ("__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


class FrozenWeight(torch.Tensor):
    """What `QuantLinear.weight` gives: a tensor of its own, whose writing would be lost, and so is an error.

    Much of PEFT writes into ``weight.data``: merging, and the initialisations that change the base (PiSSA, OLoRA,
    CorDA, LoftQ). What is computed from it is a plain tensor.

    Raises:
        ModelError: at any operation in place, at ``weight.data = ...``
    """

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Every operation on it comes by here."""
        name = getattr(func, "__name__", "")
        in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        if in_place and args and isinstance(args[0], cls) and name != "requires_grad_":
            raise ModelError(
                "a QuantLinear's weight is frozen, and this would write into a copy of it. To merge, wrap the model "
                "with adapterx.quant.lora.attach_lora; what changes the base first (PiSSA, OLoRA, CorDA, LoftQ) has "
                "to run on the float model, before it is quantized"
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        # `.data` has to stay what cannot be written.
        return found.as_subclass(cls) if name == "__get__" and _is_data(func) else found


def _is_data(func: Callable[..., Any]) -> bool:
    return getattr(func, "__self__", None) is torch.Tensor.data
