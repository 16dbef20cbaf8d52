"""Limits: how large a file from elsewhere may be, checked before anything is allocated for it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """The most that a reader accepts; raise a limit only for files that you trust.

    Args:
        file_bytes: size of one adapter file, and of what a compressed one says it inflates to
        header_bytes: JSON header of a safetensors file, central directory of an npz file
        tensors: tensors in one file
        rank: rank of one site
        ndim: dimensions of one tensor
        name_bytes: a tensor's name in UTF-8
        json_depth: nesting of a JSON text
        config_bytes: size of an ``adapter_config.json``
        inflation: bytes that a compressed file may inflate to, per byte of the file

    Example:
        >>> Limits(rank=4096).tensors
        20000
    """

    file_bytes: int = 2 << 30
    header_bytes: int = 16 << 20
    tensors: int = 20_000
    rank: int = 1024
    ndim: int = 5
    name_bytes: int = 512
    json_depth: int = 16
    config_bytes: int = 1 << 20
    inflation: int = 20


DEFAULT_LIMITS = Limits()
