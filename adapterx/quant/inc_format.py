"""Neural Compressor's own folders: ``qconfig.json`` and ``quantized_weight.pt``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from adapterx.errors import FormatError, OptionError, UnsupportedQuantization
from adapterx.quant.interop.bit_stream import fields
from adapterx.quant.interop.checkpoint import inputs_in, place_source
from adapterx.quant.interop.gptq import PARTS, gptq_layer
from adapterx.quant.interop.source import FLOATS, Layer, Source, finite, names_with, stored
from adapterx.quant.tensor_files import StoredTensor, json_file
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor
WEIGHTS, CONFIG = "quantized_weight.pt", "qconfig.json"
_KEY = re.compile(r"^\('(?P<name>.*)', .*\)$")
# Its 4-bit codes are in two's complement: 0 to 7, then -8 to -1, in an order of its own; -8 stands for nothing.
_NF4 = (7, 1, 2, 3, 4, 5, 6, 0, 8, 9, 10, 11, 12, 13, 14, 15)
_BNB = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
_E2M1_HALF = (1 / 96, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)
_E2M1 = (0.0, *_E2M1_HALF, 0.0, *(-value for value in _E2M1_HALF))
_TABLES = MappingProxyType({"fp4": _BNB, "fp4_e2m1_bnb": _BNB, "fp4_e2m1": _E2M1})


@dataclasses.dataclass(frozen=True, slots=True)
class _Loaded:
    """Tensors in memory, as readers ask for them."""

    folder: Path
    state: Mapping[str, Tensor]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        return {
            name: StoredTensor(WEIGHTS, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
            for name, tensor in self.state.items()
        }

    def read(self, name: str) -> Tensor:
        return self.state[name]


def read_inc(folder: Path, model: nn.Module | None) -> nn.Module:
    """``model`` with the weights that Neural Compressor saved in ``folder`` (``format="default"`` there).

    The tensors are in a pickle, which is read by ``torch.load(weights_only=True)``: it builds tensors and plain
    containers and refuses everything else, code included. Weights are in GPTQ's layout, codes of 3 bits ten a word;
    AWQ's and TEQ's factors on the inputs become ``pre_scale``. NF4 and FP4 have code orders and tables of their own.

    Args:
        folder: with ``quantized_weight.pt`` and ``qconfig.json``
        model: the float model that was quantized; filled in place

    Raises:
        OptionError: no model given; the format does not say how to build one
        FormatError: no tensors, or tensors that do not fit; ``model`` is untouched
        UnsupportedQuantization: a method or type that cannot be held
    """
    if model is None:
        raise OptionError(f"{folder}: Neural Compressor's format does not hold the architecture; pass model=")
    configs = _configs(folder / CONFIG)
    files = _Loaded(folder, _state(folder / WEIGHTS))
    known = inputs_in(model)
    layers: dict[str, Layer] = {}
    taken: set[str] = set()
    rest = {}
    for stem in names_with(files, ".qweight"):
        parent = stem.removesuffix(".linear")
        scaled = parent != stem and f"{parent}.input_scale" in files.state
        name = parent if scaled else stem
        config = configs.get(name, configs.get(stem, {}))
        read = _float_layer if "qzeros" not in _parts_of(files, stem) else gptq_layer
        layer = read(files, stem, config, lambda _, name=name: known(name))  # type: ignore[misc]
        layers[name] = _scaled(files, f"{name}.input_scale", layer) if scaled else layer
        taken |= {f"{stem}.{part}" for part in PARTS} | ({f"{name}.input_scale"} if scaled else set())
        rest[f"{stem}.bias"] = f"{name}.bias"
    if not layers:
        raise UnsupportedQuantization(f"{folder / WEIGHTS}: no layer in the layout of its weight-only methods")
    others = {rest.get(stored, stored): stored for stored in files.state if stored not in taken}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return place_source(Source(layers, others), files, model, dtype=dtype)


def _parts_of(files: _Loaded, stem: str) -> set[str]:
    return {part for part in PARTS if f"{stem}.{part}" in files.state}


def _scaled(files: _Loaded, name: str, layer: Layer) -> Layer:
    """``layer`` behind a factor for each input."""
    stored(files, name, *FLOATS, shape=(layer.shape[1],))

    def read() -> QuantWeight:
        return dataclasses.replace(layer.read(), pre_scale=finite(files, name, files.read(name)))

    return Layer(layer.shape, read)


def _float_layer(files: _Loaded, name: str, config: Mapping[str, Any], inputs_of: Any) -> Layer:
    """A layer of NF4 or FP4: ``qweight`` int32 ``[N, K / 8]``, ``scales`` ``[N, G]``."""
    kind = config.get("dtype", "int")
    if kind != "nf4" and kind not in _TABLES:
        raise UnsupportedQuantization(f"{files.folder}: {name} is {kind!r:.40}; nf4, {', '.join(_TABLES)} can be held")
    outputs, words = stored(files, f"{name}.qweight", torch.int32, shape=(None, None))
    _, groups = stored(files, f"{name}.scales", *FLOATS, shape=(outputs, None))
    inputs = inputs_of(name) or 8 * words
    group = config.get("group_size", 32)
    group = inputs if group == -1 else group
    if -(-inputs // 8) != words or type(group) is not int or group < 1 or -(-inputs // group) != groups:
        raise FormatError(
            f"{files.folder}: {name}: {inputs} inputs in groups of {group!r:.20} do not fit {groups} scales"
        )

    def read() -> QuantWeight:
        codes = fields(files.read(f"{name}.qweight"), 4)[:, :inputs]
        if kind == "nf4":
            codes = torch.tensor(_NF4, dtype=torch.uint8)[codes.long()]
        return QuantWeight(
            codes=codes,
            scales=finite(files, f"{name}.scales", files.read(f"{name}.scales")),
            group=min(group, inputs),
            bits=4,
            format="nf4" if kind == "nf4" else "codebook",
            codebook=None if kind == "nf4" else torch.tensor(_TABLES[kind]),
        )

    return Layer((outputs, inputs), read)


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FormatError(f"{path}: no such file; a folder of Neural Compressor has {WEIGHTS} and {CONFIG}")
    # What a broken or hostile pickle raises is up to the pickle.
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise FormatError(f"{path}: not a file of tensors and nothing else; it was not loaded ({error})") from None
    if not isinstance(state, dict) or not all(type(tensor) is Tensor for tensor in state.values()):
        raise FormatError(f"{path}: expected tensors by name")
    return {str(name): tensor.contiguous() for name, tensor in state.items()}


def _configs(path: Path) -> dict[str, Mapping[str, Any]]:
    """What ``qconfig.json`` says of each layer; its keys are Python's text of ``(name, type)``."""
    found: dict[str, Mapping[str, Any]] = {}
    for key, value in json_file(path).items():
        match = _KEY.match(key)
        inner = next(iter(value.values()), None) if isinstance(value, dict) else None
        if match is None or not isinstance(inner, dict):
            raise FormatError(f"{path}: {key[:80]!r}: expected ('name', 'type') and an object by algorithm")
        found[match["name"]] = inner
    return found
