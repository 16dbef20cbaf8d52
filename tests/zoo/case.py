"""What a case of the zoo is made of: the recipe (Case, Lora) and the product (Built, TruthSite)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from adapterx.adapter import Array


class TruthSite(NamedTuple):
    """A site that is really in the exported file.

    ``adapter`` is ``""`` where nothing in the graph tells it; ``scale`` is the factor that the graph applies
    (1.0 where the exporter has put it inside B). Rank and scale are PEFT's own, also where the change is not of that
    rank (LoHa, LoKr) or the graph holds the product only. What has none has rank 0 and scale 1.0: (IA)3, a module of
    ``modules_to_save``, a prompt. A prompt is one row named ``prompt_encoder``, virtual tokens to width. A bias that is
    trained with the low-rank part (``lora_bias``, ``bias="lora_only"``) is no row of its own.
    """

    name: str
    adapter: str
    rank: int
    scale: float
    d_in: int
    d_out: int


@dataclasses.dataclass(frozen=True, slots=True)
class Lora:
    """The adapter of a case, by PEFT's own words; ``extra`` goes to PEFT's config as it is."""

    targets: tuple[str, ...] | str
    r: int = 4
    alpha: float = 8
    kind: str = "lora"
    quantized: str = ""
    name: str = "default"
    also: tuple[str, ...] = ()
    task_type: str | None = None
    zero_b: bool = False
    half: bool = False
    extra: tuple[tuple[str, Any], ...] = ()
    extra_c: tuple[tuple[str, Any], ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One exported file.

    Args:
        name: what ``build`` takes
        model: function of ``models.py``; ``""`` for a case that is made from the file of another
        lora: what PEFT adds to the model; ``None`` for a plain model
        export: function of ``exporters.py``
        options: for the exporter, as pairs
        wrap: dotted attribute path under which a wrapper holds the model; ``""`` exports the model itself
        dtype: of the base weights
        source: the case whose file is the input of ``post``
        post: functions of ``post.py``, in order
        file: the file of a set (encoder, decoder ...) that the exporter wrote
        atol: tolerance of the export against torch, on outputs of the order of one
        needs_adapter: names cannot be known from the graph; the exported adapter has to be given
        runs_on_ort: ONNX Runtime's CPU provider runs the file
        negative: nothing is to be found
        unsupported: holds an adapter of a kind that is refused, and why
        with_base: export the base model without any adapter too
        note: what is worth knowing
        kind: of the adapter that the graph holds: "lora" for low rank on linears only, else what makes it more
        quantized: the function of ``quantizers.py`` that the exported file went through; ``expected`` is ONNX Runtime's
            answer then, on the base quantized so and each adapter in float
    """

    name: str
    model: str = ""
    lora: Lora | None = None
    export: str = "torchscript"
    options: tuple[tuple[str, Any], ...] = ()
    wrap: str = "m"
    dtype: str = "float32"
    source: str = ""
    post: tuple[str, ...] = ()
    file: str = ""
    atol: float = 1e-4
    needs_adapter: bool = False
    runs_on_ort: bool = True
    negative: bool = False
    unsupported: str = ""
    with_base: bool = False
    note: str = ""
    kind: str = "lora"
    quantized: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Built:
    """A case on disk, with what torch says about it.

    Args:
        model: the exported ``.onnx``: base and adapter "a"
        base_model: the same without any adapter, where the case has it
        adapters: PEFT folders: "a" (exported), "b" (another, same config), "c" (other rank and alpha)
        feeds: by the model's input names
        expected: torch's outputs with "a", "b", "c" and "base"; bf16 is stored as float32
        truth: the sites of the file
    """

    model: Path
    base_model: Path | None
    adapters: dict[str, Path]
    feeds: dict[str, Array]
    expected: dict[str, list[Array]]
    truth: list[TruthSite]


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """Everything of a :class:`Built` that an exporter has to say beside the file itself."""

    feeds: dict[str, Array]
    expected: dict[str, list[Array]]
    truth: list[TruthSite]


def as_stored(array: Array) -> Array:
    """npz knows no bf16."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array
