"""Adapter files: one door to read them and one to write them. `docs/formats.md` is the specification.

A format is one file here with ``read(file, limits) -> TensorTable`` and ``write(adapter, path)``. Whatever is read
goes through :func:`adapterx.formats.tensor_table.low_ranks`, so that all formats refuse the same things.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from adapterx.adapter import Adapter
from adapterx.errors import OptionError, nearest
from adapterx.formats import npz, onnx_adapter, peft, peft_kinds, safetensors
from adapterx.formats.detect import BY_SUFFIX, format_of
from adapterx.formats.file_bytes import FileBytes
from adapterx.formats.tensor_table import Nonfinite, TensorTable, as_peft_writes, low_ranks
from adapterx.limits import DEFAULT_LIMITS, Limits

__all__ = ["Limits", "load_adapter", "save_adapter"]

_READ = {"safetensors": safetensors.read, "onnx_adapter": onnx_adapter.read, "npz": npz.read}
_WRITE = {"safetensors": safetensors.write, "onnx_adapter": onnx_adapter.write, "npz": npz.write}
_SHA256 = re.compile("[0-9a-fA-F]{64}")


def load_adapter(
    path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    nonfinite: Nonfinite = "refuse",
    mmap: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    root: str | os.PathLike[str] | None = None,
) -> Adapter:
    """Read an adapter: a PEFT folder, ``.safetensors``, ``.onnx_adapter`` or ``.npz``, told apart by content.

    Everything is checked before anything is returned, and nothing in a file is ever run. The tensors are read-only
    views of one buffer that holds the file's bytes: what happens to the file afterwards does not matter.

    Args:
        path: a file, or a folder that PEFT's ``save_pretrained`` wrote
        sha256: hex digest that the file must have; not for PEFT folders, whose meaning lies in two files
        nonfinite: ``"allow"`` takes tensors with NaN or infinity, which are refused otherwise
        mmap: map the file instead of reading it. Processes then share its pages, but a file that is rewritten in place
            changes a loaded adapter, and one that is truncated kills the process (SIGBUS): only for files that are
            replaced by rename, as a content-addressed store does
        limits: sizes beyond which a file is refused
        root: a folder that the file must really lie in, symlinks resolved

    Raises:
        FormatError: no such file, broken, too large, not what it says, or a pickle; names the file, the tensor and
            the cause.
        UnsupportedAdapter: a sound file whose arithmetic is not plain LoRA on linear layers.
        OptionError: an option that does not exist or does not fit.

    Example:
        >>> import numpy as np, tempfile
        >>> from adapterx.adapter import LowRank
        >>> adapter = Adapter({"fc": LowRank(a=np.ones((2, 4), np.float32), b=np.ones((2, 3), np.float32))})
        >>> path = Path(tempfile.mkdtemp(), "fr.safetensors")
        >>> save_adapter(adapter, path)
        >>> load_adapter(path) == adapter
        True
    """
    if nonfinite not in ("refuse", "allow"):
        raise OptionError(f"nonfinite={nonfinite!r} is no option; expected 'refuse' or 'allow'")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise OptionError(f"sha256={sha256!r} is no digest; expected 64 hex digits")
    path = Path(path)
    # The config of a PEFT adapter is parsed into plain values, so mapping it would gain nothing.
    open_file = functools.partial(FileBytes, limits=limits, root=root, mmap=mmap)
    if path.is_dir():
        _refuse_pin(sha256, path)
        table, settings = peft.read(path, open_file, limits)
    else:
        with open_file(path, sha256=sha256) as file:
            kind = format_of(file)
            table = _READ[kind](file, limits)
        settings = None
        if kind == "safetensors" and _is_peft(table, path):
            _refuse_pin(sha256, path)
            table, settings = peft.beside(table, path.parent, open_file, limits)
    if settings is None:
        sites = low_ranks(table, limits, nonfinite=nonfinite)
        return Adapter(sites, {**table.metadata, "source": str(path), "format": kind})
    if peft.is_plain(table, settings):
        sites = low_ranks(table, limits, nonfinite=nonfinite, scale=settings.scale)
    else:
        sites = peft_kinds.changes(table, settings, limits, nonfinite=nonfinite)
    return Adapter(sites, {**settings.metadata, "source": str(path), "format": "peft"})


def save_adapter(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write an adapter to ``.safetensors``, ``.onnx_adapter`` or ``.npz``, by suffix, whole or not at all.

    Reading it gives an equal adapter. Equal adapters of equal provenance give equal bytes.

    Args:
        adapter: what to write; its ``source`` is not
        path: where; replaced if it exists

    Raises:
        OptionError: another suffix.
        FormatError: the format cannot hold this adapter (element type, size).
        OSError: no such folder, no permission, disk full; what was there before is still there.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in BY_SUFFIX:
        raise OptionError(
            f"{path}: the suffix {suffix!r} is no format that is written; "
            f"expected one of {', '.join(BY_SUFFIX)}{nearest(suffix, BY_SUFFIX)}"
        )
    _WRITE[BY_SUFFIX[suffix]](adapter, path)


def _is_peft(table: TensorTable, path: Path) -> bool:
    if table.layout == "rank_first":
        return False
    return as_peft_writes(table.arrays) or (path.name == peft.WEIGHTS and peft.has_config(path.parent))


def _refuse_pin(sha256: str | None, path: Path) -> None:
    if sha256 is not None:
        raise OptionError(
            f"{path}: sha256 cannot pin a PEFT adapter, whose scale stands in a second file; "
            "save it as one file with save_adapter first"
        )
