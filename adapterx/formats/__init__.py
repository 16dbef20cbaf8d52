"""Adapter files: one door to read them and one to write them. `docs/formats.md` is the specification.

A format is one file here with ``read(file, limits) -> TensorTable`` and ``write(adapter, path)``. Whatever is read
goes through :func:`adapterx.formats.tensor_table.low_ranks`, so that all formats refuse the same things.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

from adapterx.adapter import Adapter
from adapterx.errors import OptionError
from adapterx.formats import (
    diffusers,
    diffusion,
    kohya,
    npz,
    onnx_adapter,
    peft,
    peft_folder,
    peft_kinds,
    quantized,
    safetensors,
)
from adapterx.formats.detect import Written, format_of, written_format
from adapterx.formats.file_bytes import FileBytes
from adapterx.formats.quantized import Quantization
from adapterx.formats.tensor_table import Nonfinite, TensorTable, as_peft_writes, low_ranks
from adapterx.limits import DEFAULT_LIMITS, Limits

__all__ = ["Limits", "load_adapter", "save_adapter"]

_READ = {"safetensors": safetensors.read, "onnx_adapter": onnx_adapter.read, "npz": npz.read}
_WRITE: dict[Written, Callable[[Adapter, str | os.PathLike[str]], None]] = {
    "safetensors": safetensors.write,
    "onnx_adapter": onnx_adapter.write,
    "npz": npz.write,
    "peft": peft_folder.write,
    "kohya": kohya.write,
    "diffusers": diffusers.write,
}
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
    """Read an adapter: a PEFT folder, ``.safetensors`` of ours, kohya's or diffusers', ``.onnx_adapter`` or ``.npz``.

    What it is, its content tells. Modules of a kohya file have no dots in their names: they become the names of sites
    as they are, and a model's names when the adapter is fitted to it.

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
        if kind == "safetensors" and diffusion.speaks(table):
            dialect, sites = diffusion.read(table, limits, nonfinite=nonfinite)
            return Adapter(sites, {"source": str(path), "format": dialect})
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


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    format: Written | None = None,
    quantize: Quantization | None = None,
) -> None:
    """Write an adapter, whole or not at all.

    Equal adapters of equal provenance give equal bytes. Reading ``.safetensors``, ``.onnx_adapter`` and ``.npz`` gives
    an equal adapter; PEFT's, kohya's and diffusers' files mean the same, under names that these tools know.

    Args:
        adapter: what to write; its ``source`` is not
        path: where; a file is replaced if it exists
        format: ``None`` goes by the suffix: ``.safetensors``, ``.onnx_adapter``, ``.npz``, and without one, or where a
            folder is, a PEFT folder. Else ``"safetensors"``, ``"onnx_adapter"``, ``"npz"``, ``"peft"``, ``"kohya"`` or
            ``"diffusers"``
        quantize: ``"int8"`` (a scale for each rank) or ``"int4"`` (for each 32 numbers); only for our ``.safetensors``

    Raises:
        OptionError: another suffix or format, or another format than safetensors to quantize.
        FormatError: the format cannot hold this adapter (element type, size, names, kind).
        OSError: no such folder, no permission, disk full; what was there before is still there.
    """
    kind = written_format(path, format)
    quantized.check(quantize, kind)
    if quantize is None:
        _WRITE[kind](adapter, path)
    else:
        safetensors.write(adapter, path, quantize=quantize)


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
