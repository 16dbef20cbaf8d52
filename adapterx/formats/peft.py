"""PEFT folders: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from adapterx.errors import FormatError, UnsupportedAdapter
from adapterx.faults import Faults
from adapterx.formats import peft_config, safetensors
from adapterx.formats.detect import PICKLE_ADVICE
from adapterx.formats.file_bytes import FileBytes
from adapterx.formats.peft_config import PeftSettings
from adapterx.formats.tensor_table import TensorTable
from adapterx.limits import Limits

WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PLAIN = (".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_B.default.weight")
# Copies of base weights that save_embedding_layers adds: the base has them.
_COPIES = (".base_layer.weight",)

_Open = Callable[[Path], FileBytes]


def read(folder: Path, open_file: _Open, limits: Limits) -> tuple[TensorTable, PeftSettings]:
    """The tensors of a PEFT folder under their names in the file, and what they mean.

    Args:
        folder: what ``save_pretrained`` wrote
        open_file: opens a file inside it with the caller's checks
        limits: passed on

    Raises:
        FormatError: a file is missing (the message lists what is there) or broken.
        UnsupportedAdapter: the config has keys that change the numbers in unknown ways; all of them at once.
    """
    present = sorted(entry.name for entry in _entries(folder))
    if peft_config.NAME not in present:
        raise FormatError(f"{folder}: no {peft_config.NAME}, so no PEFT folder; {_listed(folder, present)}")
    if WEIGHTS not in present:
        if _PICKLED in present:
            raise FormatError(f"{folder / _PICKLED}: {PICKLE_ADVICE}")
        raise FormatError(f"{folder}: no {WEIGHTS}; {_listed(folder, present)}")
    with open_file(folder / WEIGHTS) as file:
        table = safetensors.read(file, limits)
    return beside(table, folder, open_file, limits)


def beside(table: TensorTable, folder: Path, open_file: _Open, limits: Limits) -> tuple[TensorTable, PeftSettings]:
    """Tensors of PEFT that have been read already, with the config that lies in ``folder``.

    Raises:
        FormatError, UnsupportedAdapter: as :func:`read`.
    """
    if not has_config(folder):
        raise FormatError(
            f"{table.where}: tensors of PEFT, whose scale stands in {peft_config.NAME}, and there is none beside it; "
            "pass the PEFT folder"
        )
    with open_file(folder / peft_config.NAME) as file:
        settings = peft_config.read(file, limits)
    faults = Faults(str(folder))
    for key, reason in settings.unsupported:
        faults.add(f"{peft_config.NAME}: {key}", reason)
    faults.refuse(
        "this adapter cannot be applied exactly",
        advice="Nothing was loaded. Train it without that, or merge it with PEFT.",
        error=UnsupportedAdapter,
    )
    arrays = {name: array for name, array in table.arrays.items() if not name.endswith(_COPIES)}
    return dataclasses.replace(table, arrays=arrays, layout="peft"), settings


def is_plain(table: TensorTable, settings: PeftSettings) -> bool:
    """Whether the table holds pairs of matrices and nothing else: LoRA on linear layers."""
    whole = all(name.endswith(_PLAIN) and array.ndim == 2 for name, array in table.arrays.items())
    return whole and settings.kind == "LORA" and not settings.dora


def has_config(folder: Path) -> bool:
    """Whether ``folder`` has an ``adapter_config.json``."""
    return (folder / peft_config.NAME).is_file()


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise FormatError(f"{folder}: the folder cannot be listed ({error.strerror})") from None


def _listed(folder: Path, present: list[str]) -> str:
    inner = [name for name in present if has_config(folder / name)]
    if inner:
        return f"its folder {inner[0]} is one, pass {folder / inner[0]}"
    shown = ", ".join(present[:20]) + (", ..." if len(present) > 20 else "")
    return f"there is {shown}" if present else "the folder is empty"
