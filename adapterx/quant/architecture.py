"""A transformers model from its config alone, without weights, and tensors put into a model all at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from adapterx.errors import FormatError, MissingDependency
from adapterx.faults import Faults
from adapterx.quant.linear import QuantLinear, is_linear, linear_weight, replace
from adapterx.quant.mixed_precision import HalfPrecision, half, takes_half
from adapterx.quant.tensor_files import StoredTensor, json_file

Tensor = torch.Tensor
GENERATION = "generation_config.json"
_TABLES = (torch.ones, torch.zeros, torch.full, torch.arange, torch.rand, torch.randn)
# A causal mask of 16384 positions. A number with "layer" in its name that is as small as this need not count layers.
_MOST_ELEMENTS, _LAYERS = 1 << 28, 256
_ADVICE = "Nothing was changed. Give the model that was saved, or save it again."


class _EmptyOnMeta(TorchFunctionMode):
    """Weights without memory, everything else real: modules make their weights with ``torch.empty``, and tables that no
    checkpoint holds (rotary frequencies, masks) otherwise. Tables larger than any model's are refused.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _TABLES and _elements(args) > _MOST_ELEMENTS:
            raise ValueError(f"a table of {_elements(args):,} elements")
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _elements(args: tuple[Any, ...]) -> int:
    sizes = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
    return math.prod(size for size in sizes if type(size) is int)


def empty_model(config: Mapping[str, Any], *, where: Path, tensors: int) -> nn.Module:
    """The transformers model of ``config`` (a ``config.json``), its weights on the meta device.

    Only classes of the transformers package are built: code that a checkpoint brings along is never run.

    Args:
        config: as its file has it
        where: the file
        tensors: how many the checkpoint has; a config of more layers is refused before any is built

    Raises:
        FormatError: no config of a model that transformers has; names ``where``
        MissingDependency: transformers is not installed
    """
    try:
        import transformers  # noqa: PLC0415 - only models of transformers need it
    except ImportError as missing:
        raise MissingDependency("this model is built by transformers: pip install transformers") from missing

    kind, named = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise FormatError(f"{where}: transformers has no model_type {kind!r:.60}; pass model=, which is then filled")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    architecture = None if name is None else getattr(transformers, name, None)
    if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
        raise FormatError(f"{where}: transformers has no architecture {name!r:.60}; pass model=, which is then filled")
    _refuse_layers(config, tensors, where)
    told = {key: value for key, value in config.items() if key not in {"quantization_config", "auto_map"}}
    # What a wrong value breaks inside transformers is not foreseeable; nothing has been changed by then.
    try:
        with _EmptyOnMeta():
            model: nn.Module = architecture(transformers.CONFIG_MAPPING[kind].from_dict(told))
    except Exception as error:
        raise FormatError(f"{where}: {name} cannot be built of this config: {error}") from error
    return model.train(False)


def _refuse_layers(config: Mapping[str, Any], most: int, where: Path) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_layers(value, most, where)
        elif ("layer" in key or "block" in key) and type(value) is int and value > max(most, _LAYERS):
            raise FormatError(f"{where}: {key} is {value:,}, and the checkpoint has {most:,} tensors")


def take_generation(model: nn.Module, path: Path) -> None:
    """Give ``model`` the generation config at ``path``, where there is one.

    Raises:
        FormatError: transformers does not take it
    """
    held: Any = model
    if not path.is_file() or getattr(held, "generation_config", None) is None:
        return
    told = json_file(path)
    try:
        held.generation_config = type(held.generation_config).from_dict(told)
    except (TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"{path}: {error}; {_ADVICE}") from error


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint says that it holds, before any of it is read.

    Args:
        layers: shape ``(N, K)`` of the quantized layers by module name
        halves: dtype of the layers that compute in half, by module name
        floats: the other tensors, by name in the model
        tied: name of a tensor -> the name of the one that it is
    """

    layers: Mapping[str, tuple[int, int]]
    halves: Mapping[str, torch.dtype]
    floats: Mapping[str, StoredTensor]
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)


def check_fit(model: nn.Module, contents: Contents, *, where: Path) -> None:
    """Refuse ``contents`` that ``model`` has no place for, or that leave a place of it empty.

    Raises:
        FormatError: all that is wrong; names ``where``
    """
    faults = Faults(str(where))
    modules = dict(model.named_modules())
    for name, shape in contents.layers.items():
        if cause := _misfit(modules.get(name), shape):
            faults.add(name, cause)
    for name in contents.halves:
        module = modules.get(name)
        if module is None or not takes_half(module):
            faults.add(name, "the model has no layer there that computes in half")
    _check_floats(model, contents, faults)
    faults.refuse("does not fit the model", advice=_ADVICE)


def _misfit(module: nn.Module | None, shape: tuple[int, int]) -> str:
    if module is None:
        return "the model has no such layer"
    if isinstance(module, QuantLinear):
        return "the model's layer is quantized already; give the float model"
    if not is_linear(module):
        return f"the model's is a {type(module).__name__}, no linear layer"
    own = tuple(linear_weight(module).shape)
    return "" if own == shape else f"the model's is {own}, the file's {shape}"


def _check_floats(model: nn.Module, contents: Contents, faults: Faults) -> None:
    stored, tied = contents.floats, contents.tied
    own = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] not in contents.layers and isinstance(tensor, Tensor)
    }
    found = {id(own[name]) for name in (*stored, *tied) if name in own}
    for name, source in tied.items():
        if source not in stored:
            faults.add(name, f"said to be the same as {source[:200]}, which is not there")
    for name, tensor in own.items():
        shape = _shape_in(model, name, contents.halves) or tuple(tensor.shape)
        if id(tensor) not in found:
            faults.add(name, "missing")
        elif name in stored and stored[name].shape != shape:
            faults.add(name, f"the model's is {shape}, the file's {stored[name].shape}")
    for name in sorted((stored.keys() | tied.keys()) - own.keys()):
        faults.add(name, "the model has no such tensor")
    kept = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in kept:
            faults.add(
                name, "on the meta device in the model, and no file holds it; make the model without torch.device"
            )


def _shape_in(model: nn.Module, name: str, halves: Mapping[str, torch.dtype]) -> tuple[int, ...] | None:
    """The shape of a half layer's weight: where the model has a ``Conv1D``, the half layer's is turned."""
    layer, _, part = name.rpartition(".")
    module = model.get_submodule(layer) if layer in halves and part == "weight" else None
    return None if module is None or not is_linear(module) else tuple(linear_weight(module).shape)


def fill(
    model: nn.Module, contents: Contents, *, layers: Mapping[str, QuantLinear], floats: Mapping[str, Tensor]
) -> None:
    """Put everything into its place. After `check_fit` of the same ``contents`` nothing can fail.

    Parameters that are one under several names (tied embeddings) stay one where the file has one or equal ones.
    """
    for name, layer in layers.items():
        replace(model, name, layer.train(model.get_submodule(name).training))
    for name, dtype in contents.halves.items():
        module = model.get_submodule(name).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        replace(model, name, half(module, HalfPrecision(dtype), name=name))
    places = model.state_dict(keep_vars=True)
    placed: dict[int, Tensor] = {}
    for name, tensor in floats.items():
        old = places[name]
        before = placed.get(id(old))
        if before is not None and before.dtype == tensor.dtype and torch.equal(before, tensor):
            _assign(model, name, before)
            continue
        new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        placed.setdefault(id(old), new)
        _assign(model, name, new)
    for name, old in places.items():
        if name not in floats and id(old) in placed:
            _assign(model, name, placed[id(old)])
    now = model.state_dict(keep_vars=True)
    for name, source in contents.tied.items():
        _assign(model, name, now[source])


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    if last in module._parameters:
        module._parameters[last] = tensor  # type: ignore[assignment]
    else:
        module._buffers[last] = tensor
