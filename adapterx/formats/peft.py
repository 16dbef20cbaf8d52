"""PEFT folders: ``adapter_config.json`` beside ``adapter_model.safetensors``. Only LoRA on linear layers is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from adapterx.errors import FormatError, UnsupportedAdapter
from adapterx.formats import peft_config, safetensors
from adapterx.formats.detect import PICKLE_ADVICE
from adapterx.formats.faults import Faults
from adapterx.formats.file_bytes import FileBytes
from adapterx.formats.peft_config import PeftLora
from adapterx.formats.tensor_table import TensorTable
from adapterx.limits import Limits

WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_LORA = (".lora_A.weight", ".lora_B.weight", ".lora_A.default.weight", ".lora_B.default.weight")

# Copies of base weights that save_embedding_layers adds: the base has them.
_COPIES = (".base_layer.weight", ".base_layer.bias")

# Tensors of other ways to adapt, by what their name contains.
_OTHERS = {
    ".lora_embedding_": "LoRA on an embedding",
    ".lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "a bias of the adapter (lora_bias)",
    ".lora_E": "AdaLoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".ia3_": "(IA)3",
    ".vera_": "VeRA",
}
_Open = Callable[[Path], FileBytes]


def read(folder: Path, open_file: _Open, limits: Limits) -> tuple[TensorTable, PeftLora]:
    """The tensors of a PEFT folder under their names in the file, and what scales them.

    Args:
        folder: what ``save_pretrained`` wrote
        open_file: opens a file inside it with the caller's checks
        limits: passed on

    Raises:
        FormatError: a file is missing (the message lists what is there) or broken.
        UnsupportedAdapter: the adapter does something that these two matrices a site cannot; all such things at once.
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


def beside(table: TensorTable, folder: Path, open_file: _Open, limits: Limits) -> tuple[TensorTable, PeftLora]:
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
        lora = peft_config.read(file, limits)
    faults = Faults(str(folder))
    for key, reason in lora.unsupported:
        faults.add(f"{peft_config.NAME}: {key}", reason)
    arrays = {}
    for name, array in table.arrays.items():
        if name.endswith(_LORA):
            arrays[name] = array
            if array.ndim > 2:
                faults.add(name, f"LoRA on a convolution, its shape is {array.shape}")
        elif not name.endswith(_COPIES):
            others = [what for sign, what in _OTHERS.items() if sign in name]
            faults.add(name, others[0] if others else "a whole weight that replaces one of the base (modules_to_save)")
    faults.refuse(
        "this adapter cannot be applied exactly",
        advice="Nothing was loaded. Train it as plain LoRA on linear layers, or merge it with PEFT.",
        error=UnsupportedAdapter,
    )
    return dataclasses.replace(table, arrays=arrays, layout="peft"), lora


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
