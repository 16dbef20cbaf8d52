"""Which format a file has, by what is in it: names lie. And which one is to be written, by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast, get_args

from adapterx.errors import FormatError, OptionError, nearest
from adapterx.formats.file_bytes import FileBytes

Format = Literal["safetensors", "onnx_adapter", "npz"]
Written = Literal["safetensors", "onnx_adapter", "npz", "peft", "kohya", "diffusers"]

BY_SUFFIX: dict[str, Format] = {".safetensors": "safetensors", ".onnx_adapter": "onnx_adapter", ".npz": "npz"}
PICKLE_ADVICE = (
    "this is a pickle, which runs code when it is opened; nothing was read. If you trust it, load it with PEFT and "
    "write it again with save_pretrained(folder), which gives adapter_model.safetensors"
)
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def format_of(file: FileBytes) -> Format:
    """The format that the first bytes tell; where they tell nothing, the suffix, whose reader then says what is wrong.

    Raises:
        FormatError: a pickle, two formats at once, or none that is known.
    """
    # No more than the smallest header: what is read here is gone from the pass that checks values as they come.
    head = file.head(9)
    signs: dict[Format, bool] = {
        "npz": head.startswith((b"PK\x03\x04", b"PK\x05\x06")),
        "onnx_adapter": head[4:8] == b"TORT",
        # A header of a plausible length is a JSON object.
        "safetensors": head[8:9] == b"{" and head[5:8] == b"\0\0\0",
    }
    # A safetensors header of 640 bytes begins like a pickle, too.
    pickled = head[:1] == b"\x80" and head[1:2] in b"\2\3\4\5" and not signs["safetensors"]
    if pickled or (signs["npz"] and b"data.pkl" in file.head(256)):
        raise FormatError(f"{file.path}: {PICKLE_ADVICE}")
    found = [name for name, sign in signs.items() if sign]
    if len(found) > 1:
        raise FormatError(
            f"{file.path}: it can be read as {' and as '.join(found)}; which one is meant cannot be known"
        )
    if found:
        return found[0]
    suffix = file.path.suffix.lower()
    if suffix in _PICKLE_SUFFIXES:
        raise FormatError(f"{file.path}: {PICKLE_ADVICE}")
    if suffix in BY_SUFFIX:
        return BY_SUFFIX[suffix]
    raise FormatError(
        f"{file.path}: no adapter file, it begins with {head[:8]!r}; expected .safetensors, .onnx_adapter, .npz or a "
        "PEFT folder"
    )


def written_format(path: str | os.PathLike[str], given: str | None = None) -> Written:
    """The format to write: the one that is given, else that of the suffix. A folder, or no suffix, is PEFT's.

    Raises:
        OptionError: no such format, or a suffix that is none.
    """
    path = Path(path)
    known = get_args(Written)
    if given is not None:
        if given not in known:
            raise OptionError(
                f"format={given!r} is no format; expected one of {', '.join(known)}{nearest(given, known)}"
            )
        return cast(Written, given)
    suffix = path.suffix.lower()
    if suffix in BY_SUFFIX and not path.is_dir():
        return BY_SUFFIX[suffix]
    if not suffix or path.is_dir():
        return "peft"
    raise OptionError(
        f"{path}: the suffix {suffix!r} is no format that is written; expected one of {', '.join(BY_SUFFIX)}, or none "
        f"for a PEFT folder{nearest(suffix, BY_SUFFIX)}"
    )
