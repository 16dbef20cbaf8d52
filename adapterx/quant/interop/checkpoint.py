"""A folder that another library quantized: which reader it needs, its weights, and the model that they make."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapterx.errors import FormatError, UnsupportedQuantization, nearest
from adapterx.quant.architecture import GENERATION, Contents, check_fit, empty_model, fill, take_generation
from adapterx.quant.interop.auto_round import read_auto_round
from adapterx.quant.interop.awq import read_awq
from adapterx.quant.interop.bitsandbytes import read_bitsandbytes
from adapterx.quant.interop.gptq import InputsOf, read_gptq
from adapterx.quant.interop.hqq import read_hqq
from adapterx.quant.interop.source import Source, Tensors
from adapterx.quant.interop.torchao import read_torchao
from adapterx.quant.linear import QuantLinear
from adapterx.quant.tensor_files import json_file, read_tensor_files
from adapterx.quant.weight import QuantWeight

CONFIG = "config.json"
# Where AutoGPTQ and Neural Compressor put what config.json may lack.
_BESIDE = "quantize_config.json"
_METHODS = ("gptq", "awq", "auto-round", "bitsandbytes", "torchao", "hqq")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Tables that old checkpoints hold and models now compute.
_IGNORED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|attn\.bias)$")


def read_quantized(folder: str | os.PathLike[str]) -> dict[str, QuantWeight]:
    """The quantized weights of a checkpoint by the name of their layer, as ``quant_method`` of its config says: GPTQ,
    AWQ, auto-round, bitsandbytes, torchao or hqq.

    Nothing of the libraries is needed, and no model is built. Values are those that the library computes with, exactly;
    only LLM.int8's are so to the last bit of a float32.

    Args:
        folder: with safetensors and ``config.json``

    Raises:
        FormatError: no such checkpoint, or a broken one; names the file and the tensor
        UnsupportedQuantization: an encoding that cannot be held without loss; names it
    """
    path = Path(folder)
    files = read_tensor_files(path)

    def inputs_of(name: str) -> int | None:
        return None

    source = _source(files, _quantization(path, files), inputs_of)
    return {name: layer.read() for name, layer in source.layers.items()}


def is_quantized(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint that `read_quantized` is for."""
    if not any(file.suffix == ".safetensors" for file in folder.iterdir()):
        return False
    return bool(_quantization(folder, read_tensor_files(folder)))


def load_checkpoint(folder: Path, model: nn.Module | None) -> nn.Module:
    """``model``, or the transformers model of the folder's config, with the checkpoint's weights.

    Raises:
        FormatError: as `read_quantized`; or the weights do not fit the model, which is untouched
    """
    files = read_tensor_files(folder)
    config = json_file(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if model is None:
        model = empty_model(config, where=folder / CONFIG, tensors=len(files.tensors))
        take_generation(model, folder / GENERATION)
    source = _source(files, _quantization(folder, files), inputs_in(model))
    return place_source(source, files, model, dtype=_dtype(config))


def place_source(source: Source, files: Tensors, model: nn.Module, *, dtype: torch.dtype) -> nn.Module:
    """Put everything in ``source`` into ``model``; layers compute in ``dtype``.

    Raises:
        FormatError: it does not fit; ``model`` is untouched
    """
    biases = {f"{name}.bias" for name in source.layers}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    own = set(model.state_dict())
    floats = {
        name: files.tensors[stored]
        for name, stored in source.rest.items()
        if name not in biases
        and (name in own or not (_IGNORED.search(name) or any(re.search(each, name) for each in ignored)))
    }
    contents = Contents({name: layer.shape for name, layer in source.layers.items()}, {}, floats)
    check_fit(model, contents, where=files.folder)
    layers = {}
    for name, layer in source.layers.items():
        bias = _bias(source, files, model, name)
        layers[name] = QuantLinear(layer.read(), bias, compute_dtype=dtype).eval()
    tensors = {name: files.read(source.rest[name]) for name in floats}
    fill(model, contents, layers=layers, floats=tensors)
    return model


def inputs_in(model: nn.Module) -> InputsOf:
    """Says how many inputs the linear layer of a name has in ``model``."""
    known = {name: module.in_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return known.get


def _bias(source: Source, files: Tensors, model: nn.Module, name: str) -> torch.Tensor | None:
    stored = source.rest.get(f"{name}.bias")
    if stored is None:
        if getattr(model.get_submodule(name), "bias", None) is not None:
            raise FormatError(f"{files.folder}: {name}.bias is missing")
        return None
    bias = files.read(stored)
    if tuple(bias.shape) != (source.layers[name].shape[0],) or not bias.is_floating_point():
        raise FormatError(f"{files.folder}: {stored}: {bias.dtype} {list(bias.shape)} is no bias of {name}")
    # AutoGPTQ and Neural Compressor write zeros for layers that have none.
    absent = getattr(model.get_submodule(name), "bias", None) is None and not bool(bias.any())
    return None if absent else bias


def _source(files: Tensors, config: Mapping[str, Any], inputs_of: InputsOf) -> Source:
    method = config.get("quant_method")
    match str(method).removeprefix("intel/"):
        case "gptq":
            return read_gptq(files, config, inputs_of)
        case "awq":
            return read_awq(files, config)
        case "auto-round":
            return read_auto_round(files, config, inputs_of)
        case "bitsandbytes":
            return read_bitsandbytes(files, config)
        case "torchao":
            return read_torchao(files, config)
        case "hqq":
            return read_hqq(files, config)
    raise UnsupportedQuantization(
        f"{files.folder}: quant_method={method!r:.40}{nearest(str(method), _METHODS)}; {', '.join(_METHODS)} are read"
    )


def _quantization(folder: Path, files: Tensors) -> Mapping[str, Any]:
    """What the folder says of how it is quantized; empty where it says nothing."""
    config = json_file(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    told = config.get("quantization_config")
    if told is None and (folder / _BESIDE).is_file():
        told = {"quant_method": "gptq", **json_file(folder / _BESIDE)}
    if told is None and any(name.endswith(".W_q") for name in files.tensors):
        told = {"quant_method": "hqq"}  # hqq's own save says nothing in the config
    if told is not None and not isinstance(told, dict):
        raise FormatError(f"{folder / CONFIG}: quantization_config is {told!r:.40}, expected an object")
    return told or {}


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    told = config.get("dtype", config.get("torch_dtype"))
    return _DTYPES.get(told, torch.float32) if isinstance(told, str) else torch.float32
