"""save and load: a quantized model as a folder of safetensors files, one JSON and the model's own config."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from adapterx.atomic import atomic_write, replaced_folder
from adapterx.errors import FormatError, ModelError, OptionError, nearest
from adapterx.faults import Faults
from adapterx.quant.architecture import GENERATION, Contents, check_fit, empty_model, fill, take_generation
from adapterx.quant.inc_format import WEIGHTS as INC_WEIGHTS
from adapterx.quant.inc_format import read_inc
from adapterx.quant.interop import is_quantized, load_checkpoint
from adapterx.quant.linear import quant_layers
from adapterx.quant.mixed_precision import HalfConv1d, HalfConv2d, HalfConv3d, HalfLinear
from adapterx.quant.stored_layer import check_record, record_of, stored_layer
from adapterx.quant.tensor_files import PICKLED, SHARD_BYTES, json_file, read_tensor_files, write_tensor_files
from adapterx.quant.tying import computes_with_tying

Tensor = torch.Tensor
Format = Literal["default", "huggingface", "neural_compressor"]
Folder = str | os.PathLike[str]

RECORD, CONFIG = "quantization.json", "config.json"
MARK, VERSION = "adapterx.quant", 1
_FORMATS = ("default", "huggingface", "neural_compressor")
_HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_HALF = (HalfLinear, HalfConv1d, HalfConv2d, HalfConv3d)
_FIELDS = {"format", "version", "model", "layers", "halves", "tied"}
_ADVICE = "Nothing was changed. Save or download the model again."


def save(
    model: nn.Module,
    output_dir: Folder = "./saved_results",
    format: Format = "default",
    *,
    checkpoint_dir: Folder | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a quantized model into a folder, whole or not at all.

    ``quantized.safetensors`` holds every tensor (shards and an index above ``shard_bytes``), ``quantization.json`` says
    of each quantized layer how its codes are to be read, and where the model is one of transformers', ``config.json``
    and ``generation_config.json`` make `load` work without the code that made it. Nothing is pickled. A folder with an
    earlier save is replaced; other files in it (a tokenizer) stay. Transformers' own ``from_pretrained`` refuses the
    folder.

    Args:
        model: with at least one `QuantLinear`, or layer in half precision
        output_dir: the folder
        format: "default"; "huggingface" is the same and refuses a model that is not transformers'
        checkpoint_dir: Neural Compressor's other name for ``output_dir``
        shard_bytes: the most that one file holds

    Raises:
        ModelError: nothing in the model is quantized, or a layer has not been converted yet
        OptionError: no such format, or the folder holds the weights of another model
        OSError: no permission, disk full. The folder is as it was.
    """
    _check_format(format, ("default", "huggingface"), "saved")
    target = Path(output_dir if checkpoint_dir is None else checkpoint_dir)
    record, tensors = _contents(model)
    config = _config(model)
    if format == "huggingface" and config is None:
        raise OptionError(f"{type(model).__name__} is no model of transformers; save it with format='default'")
    with replaced_folder(target, dropped=_own_files(target)) as stage:
        write_tensor_files(tensors, stage, metadata={"format": "pt"}, shard_bytes=shard_bytes)
        _write_json(stage / RECORD, record)
        if config is not None:
            _write_json(stage / CONFIG, config)
            generation = getattr(model, "generation_config", None)
            if generation is not None:
                _write_json(stage / GENERATION, json.loads(generation.to_json_string()))


def load(
    output_dir: Folder = "./saved_results",
    model: nn.Module | None = None,
    *,
    original_model: nn.Module | None = None,
    model_name_or_path: Folder | None = None,
    format: Format = "default",
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A quantized model from a folder: one that `save` wrote, or a checkpoint of GPTQ, AWQ, auto-round, bitsandbytes,
    torchao or hqq, as its ``config.json`` says.

    Reads safetensors and JSON; no code of the folder is run and nothing is unpickled. The one exception has to be asked
    for by name: ``format="neural_compressor"`` reads that library's ``quantized_weight.pt`` with
    ``torch.load(weights_only=True)``. Everything is checked before the first layer of ``model`` is touched.

    Args:
        output_dir: the folder
        model: the float model, filled in place; its weights are not read and may be on the meta device. Needed where
            the architecture is not one of transformers'
        original_model: Neural Compressor's other name for ``model``
        model_name_or_path: Neural Compressor's other name for ``output_dir``
        format: "default" finds out; "huggingface" takes only checkpoints with a ``config.json`` that says how they are
            quantized
        device: where the model goes

    Returns:
        the model, in evaluation mode, with a `QuantLinear` for each quantized layer

    Raises:
        FormatError: a file that is broken, missing, unsafe, or does not fit the model; names the file and the tensor
        UnsupportedQuantization: a sound checkpoint whose encoding cannot be held without loss; names it
        OptionError: no such format
    """
    _check_format(format, _FORMATS, "loaded")
    folder = Path(output_dir if model_name_or_path is None else model_name_or_path)
    model = original_model if model is None else model
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder; give one that save() wrote (names of hubs are not looked up)")
    if format == "neural_compressor":
        found = read_inc(folder, model)
    elif (folder / RECORD).is_file() and format == "default":
        found = _load_own(folder, model)
    elif is_quantized(folder):
        found = load_checkpoint(folder, model)
    else:
        raise _unknown(folder, format)
    mark_quantized(found)
    return found.to(device).eval()


def mark_quantized(model: nn.Module) -> None:
    """Give a quantized model ``is_quantized`` and its ``save(output_dir, format)``; a ``save`` that it had is kept as
    ``orig_save``.

    Models of transformers get no ``is_quantized``: there the name means one of transformers' own quantizers, and with
    it ``Trainer`` and ``model.float()`` refuse the model.
    """
    own = getattr(model, "save", None)
    if own is not None and getattr(own, "__func__", None) is not save:
        object.__setattr__(model, "orig_save", own)
    # Past nn.Module, which would take a bound method's module for one of the model's own.
    object.__setattr__(model, "save", types.MethodType(save, model))
    if not any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__):
        object.__setattr__(model, "is_quantized", True)


def _unknown(folder: Path, format: str) -> FormatError:
    if (folder / INC_WEIGHTS).is_file():
        return FormatError(
            f"{folder}: {INC_WEIGHTS} is Neural Compressor's, and a pickle; format='neural_compressor' reads it with "
            "torch.load(weights_only=True)"
        )
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    told = f"; {pickled[0]} may run code when it is loaded, and is not" if pickled else ""
    wanted = "" if format == "huggingface" else f"{RECORD}, or "
    return FormatError(f"{folder}: expected {wanted}a {CONFIG} with a quantization_config, found neither{told}")


def _check_format(format: str, known: tuple[str, ...], what: str) -> None:
    if format not in known:
        raise OptionError(f"no format {format!r} can be {what}; {', '.join(known)} can{nearest(str(format), known)}")


# -- Writing -----------------------------------------------------------------------------------------------------------


def _contents(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `quantization.json` says, and the tensors."""
    layers = dict(quant_layers(model))
    halves = {name: module.weight.dtype for name, module in model.named_modules() if isinstance(module, _HALF)}
    for name, module in model.named_modules():
        if type(module).__module__.startswith("adapterx.") and name not in layers and name not in halves:
            raise ModelError(f"{name} is a {type(module).__name__}: convert the model before it is saved")
    if not layers and not halves:
        raise ModelError(f"nothing in this {type(model).__name__} is quantized; quantize it, then save it")
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor
    record = {
        "format": MARK,
        "version": VERSION,
        "model": type(model).__name__,
        "layers": {name: record_of(layer) for name, layer in layers.items()},
        "halves": {name: str(dtype).removeprefix("torch.") for name, dtype in halves.items()},
        "tied": tied,
    }
    return record, tensors


def _config(model: nn.Module) -> dict[str, Any] | None:
    """The ``config.json`` of a model that is transformers' own; its layers' names would not fit any other."""
    known: Any = model
    config = getattr(known, "config", None)
    if config is None or not type(model).__module__.startswith("transformers."):
        return None
    told: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    told.pop("quantization_config", None)
    told["architectures"] = [type(model).__name__]
    table, head = known.get_input_embeddings(), known.get_output_embeddings()
    apart = head is not None and getattr(table, "weight", None) is not head.weight
    if told.get("tie_word_embeddings") and apart and not computes_with_tying(model):
        told["tie_word_embeddings"] = False
    return {**told, "quantization_config": {"quant_method": "adapterx", "version": VERSION}}


def _own_files(folder: Path) -> set[str]:
    """Files that a save replaces.

    Raises:
        OptionError: weights that no save of ours wrote
    """
    if not folder.is_dir():
        return set()
    weights = {file.name for file in folder.iterdir() if file.suffix in (".safetensors", *PICKLED)}
    if weights and not (folder / RECORD).is_file():
        raise OptionError(f"{folder} holds {sorted(weights)[0]}, the weights of another model; give another folder")
    indices = {file.name for file in folder.iterdir() if file.name.endswith(".safetensors.index.json")}
    return weights | indices | {RECORD, CONFIG, GENERATION}


def _write_json(path: Path, told: Mapping[str, Any]) -> None:
    atomic_write(path, (json.dumps(told, indent=1, sort_keys=True) + "\n").encode())


# -- Reading -----------------------------------------------------------------------------------------------------------


def _load_own(folder: Path, model: nn.Module | None) -> nn.Module:
    path = folder / RECORD
    records, halves, tied = _read_record(path)
    files = read_tensor_files(folder)
    parts = {f"{name}.{part}" for name, record in records.items() for part in record["parts"]}
    floats = {name: stored for name, stored in files.tensors.items() if name not in parts}
    shapes = {name: (record["shape"][0], record["shape"][1]) for name, record in records.items()}
    contents = Contents(shapes, halves, floats, tied)
    if model is None:
        if not (folder / CONFIG).is_file():
            raise FormatError(f"{folder}: not a model of transformers; load(folder, model) fills a model that you make")
        model = empty_model(json_file(folder / CONFIG), where=folder / CONFIG, tensors=len(files.tensors))
        take_generation(model, folder / GENERATION)
    check_fit(model, contents, where=folder)
    layers = {name: stored_layer(files, name, record) for name, record in records.items()}
    fill(model, contents, layers=layers, floats={name: files.read(name) for name in floats})
    return model


def _read_record(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, torch.dtype], dict[str, str]]:
    told = json_file(path)
    if told.get("format") != MARK or told.get("version") != VERSION or type(told["version"]) is not int:
        version, mark = told.get("version"), told.get("format")
        raise FormatError(f"{path}: expected {MARK!r} version {VERSION}, got {mark!r:.40} version {version!r:.40}")
    if told.keys() != _FIELDS or not all(isinstance(told[key], dict) for key in ("layers", "halves", "tied")):
        raise FormatError(f"{path}: expected the objects layers, halves and tied; {_ADVICE}")
    faults = Faults(str(path))
    records = {}
    for name, record in told["layers"].items():
        try:
            records[name] = check_record(record)
        except ValueError as cause:
            faults.add(name, str(cause))
    for name, dtype in told["halves"].items():
        if not isinstance(dtype, str) or dtype not in _HALVES:
            faults.add(name, f"half precision is {dtype!r:.40}, expected one of {', '.join(_HALVES)}")
    for name, source in told["tied"].items():
        if not isinstance(source, str):
            faults.add(name, f"said to be the same as {source!r:.40}, expected a name")
    faults.refuse("not a sound record of a quantized model", advice=_ADVICE)
    return records, {name: _HALVES[dtype] for name, dtype in told["halves"].items()}, told["tied"]
