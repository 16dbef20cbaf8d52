"""Device: which accelerator there is, and which one the user wants.

Quantizing runs where the model's layers are. This says where to put the model: ``model.to(target_device())``.
"""

from __future__ import annotations

import dataclasses
import os

import torch

from adapterx.errors import OptionError, nearest

# Best first. Whichever is set is the user's word; the first wins where both are.
_ORDER = ("hpu", "xpu", "cuda", "cpu")
_VARIABLES = ("ADAPTERX_TARGET_DEVICE", "INC_TARGET_DEVICE")


@dataclasses.dataclass(frozen=True, slots=True)
class Accelerator:
    """One kind of device, with the few calls that differ between kinds.

    Args:
        kind: "hpu", "xpu", "cuda" or "cpu"
    """

    kind: str

    def name(self) -> str:
        """The kind."""
        return self.kind

    def is_available(self) -> bool:
        """Whether torch can use one here."""
        if self.kind == "cpu":
            return True
        module = getattr(torch, self.kind, None)
        return module is not None and bool(module.is_available())

    def device_name(self, index: int) -> str:
        """The name of device ``index``: "cuda:0"; "cpu" for any."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{index}"

    def device(self, index: int | None = None) -> torch.device:
        """The torch device, the current one by default."""
        return torch.device(self.current_device_name() if index is None else self.device_name(index))

    def current_device(self) -> int | str:
        """Its number; "cpu" for the CPU."""
        return self.kind if self.kind == "cpu" else int(getattr(torch, self.kind).current_device())

    def current_device_name(self) -> str:
        """The name of the current one: "cuda:0", "cpu"."""
        current = self.current_device()
        return current if isinstance(current, str) else self.device_name(current)

    def set_device(self, index: int) -> None:
        """Make it the current one; nothing for the CPU."""
        if self.kind != "cpu":
            getattr(torch, self.kind).set_device(index)

    def synchronize(self) -> None:
        """Wait for what was started; nothing for the CPU."""
        if self.kind != "cpu":
            getattr(torch, self.kind).synchronize()

    def empty_cache(self) -> None:
        """Give memory back that torch keeps for later; nothing for the CPU."""
        if self.kind not in ("cpu", "hpu"):
            getattr(torch, self.kind).empty_cache()


def auto_detect_accelerator(device_name: str = "auto") -> Accelerator:
    """The accelerator to use.

    That is what ``ADAPTERX_TARGET_DEVICE`` or ``INC_TARGET_DEVICE`` names, else ``device_name``, else the first
    available of hpu, xpu, cuda, cpu.

    Nothing is remembered: a variable that changes is heard.

    Raises:
        OptionError: one that does not exist, or is not available; Neural Compressor takes another in silence

    Example:
        >>> auto_detect_accelerator("cpu").current_device_name()
        'cpu'
    """
    wanted, whose = device_name, "device_name"
    for variable in reversed(_VARIABLES):
        if os.environ.get(variable):
            wanted, whose = os.environ[variable], variable
    if wanted.lower() == "auto":
        return next(found for found in map(Accelerator, _ORDER) if found.is_available())
    kind = wanted.lower().partition(":")[0]
    if kind not in _ORDER:
        raise OptionError(f"{whose}={wanted!r} is no device; known are {', '.join(_ORDER)}{nearest(kind, _ORDER)}")
    found = Accelerator(kind)
    if not found.is_available():
        there = ", ".join(name for name in _ORDER if Accelerator(name).is_available())
        raise OptionError(f"{whose}={wanted!r} is not available to torch {torch.__version__} here; available: {there}")
    return found


def target_device(device_name: str = "auto") -> torch.device:
    """`auto_detect_accelerator`'s torch device, with the number where one is named ("cuda:1")."""
    accelerator = auto_detect_accelerator(device_name)
    named = next((os.environ[v] for v in _VARIABLES if os.environ.get(v)), device_name)
    _, _, index = named.partition(":")
    return accelerator.device(int(index)) if index.isdigit() else accelerator.device()
