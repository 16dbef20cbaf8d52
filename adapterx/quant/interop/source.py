"""Source: the quantized layers that a reader finds in another library's checkpoint, and what else is in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from adapterx.errors import FormatError, UnsupportedQuantization
from adapterx.quant.tensor_files import StoredTensor
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Tensors(Protocol):
    """Tensors by name, of a folder: `TensorFiles`, or what another reader has in memory."""

    @property
    def folder(self) -> Path:
        """What messages name."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Type and shape of each."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the files say of themselves."""

    def read(self, name: str) -> Tensor:
        """The tensor itself."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One quantized layer, not read yet.

    Args:
        shape: ``(N, K)``
        read: reads and unpacks it
    """

    shape: tuple[int, int]
    read: Callable[[], QuantWeight]


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """What is in a checkpoint.

    Args:
        layers: by the name of the module
        rest: the other tensors, biases among them: name in the model -> name in the file
    """

    layers: Mapping[str, Layer]
    rest: Mapping[str, str]


def source_of(files: Tensors, layers: Mapping[str, Layer], parts: Iterable[str]) -> Source:
    """The source of ``layers``, each of which has the tensors ``<name>.<part>``; all other tensors are the rest.

    Raises:
        FormatError: no layer
    """
    if not layers:
        raise FormatError(f"{files.folder}: its config says that it is quantized, and no layer is")
    taken = {f"{name}.{part}" for name in layers for part in parts}
    return Source(layers, {name: name for name in files.tensors if name not in taken})


def names_with(files: Tensors, ending: str) -> list[str]:
    """Modules that have a tensor ``<module><ending>``."""
    return sorted(name.removesuffix(ending) for name in files.tensors if name.endswith(ending))


def stored(files: Tensors, name: str, *dtypes: torch.dtype, shape: tuple[int | None, ...]) -> tuple[int, ...]:
    """The shape of tensor ``name``, which must be of one of ``dtypes`` and of ``shape``, where None is any size.

    Raises:
        FormatError: it is missing or otherwise
    """
    met = files.tensors.get(name)
    told = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    wanted = f"expected {told} [{', '.join('any' if size is None else str(size) for size in shape)}]"
    if met is None:
        raise FormatError(f"{files.folder}: {name} is missing; {wanted}")
    fits = len(met.shape) == len(shape) and all(b in (None, a) for a, b in zip(met.shape, shape, strict=False))
    if met.dtype not in dtypes or not fits or 0 in met.shape:
        raise FormatError(f"{files.folder}: {name}: {wanted}, got {met.dtype} {list(met.shape)}")
    return met.shape


def whole(config: Mapping[str, Any], key: str, among: Iterable[int], default: int, *, where: Path) -> int:
    """The whole number ``config[key]``.

    Raises:
        UnsupportedQuantization: a number that is not ``among`` those that can be held
        FormatError: no number
    """
    value = config.get(key, default)
    if type(value) is not int:
        raise FormatError(f"{where}: {key} is {value!r:.40}, expected a whole number")
    if value not in among:
        raise UnsupportedQuantization(f"{where}: {key}={value} cannot be held; expected one of {_told(among)}")
    return value


def finite(files: Tensors, name: str, tensor: Tensor) -> Tensor:
    """``tensor`` in float32, none of it NaN or infinite.

    Raises:
        FormatError: some is; names the tensor
    """
    wide = tensor.to(torch.float32)
    if not bool(torch.isfinite(wide).all()):
        raise FormatError(f"{files.folder}: {name}: not all of it is finite; download the checkpoint again")
    return wide


def kept_zeros(zeros: Tensor, bits: int) -> Tensor | None:
    """Whole zero points ``[N, G]`` as a `QuantWeight` has them: none where they are all the middle."""
    return None if bool((zeros == 2 ** (bits - 1)).all()) else zeros.to(torch.uint8)


def _told(among: Iterable[int]) -> str:
    return f"{among.start} to {among.stop - 1}" if isinstance(among, range) else ", ".join(map(str, among))
