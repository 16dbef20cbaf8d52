"""The signature of an exported model: its inputs and outputs by name, which of their sizes are free, and its cache.

Names are those that optimum and onnxruntime-genai use: ``input_ids``, ``attention_mask``, ``position_ids``,
``past_key_values.N.key``, ``present.N.key``, ``logits``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapterx.errors import FeedError, OptionError

Tensor = torch.Tensor
Axes = dict[str, dict[int, str]]

# torch.export takes a size of 0 or 1 for a constant, so examples have more of everything; all differ.
_BATCH, _SEQUENCE, _PAST = 2, 7, 3


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Signature:
    """How a model is called to be exported.

    Args:
        module: takes tensors in the order of ``inputs``, returns a tuple of tensors in that of ``outputs``
        prefix: what ``module`` puts before the names of the model's own parameters
        inputs: example tensors by name
        outputs: names
        axes: of each input and output, names of free dimensions
    """

    module: nn.Module
    prefix: str
    inputs: Mapping[str, Tensor]
    outputs: Sequence[str]
    axes: Axes


class Called(nn.Module):
    """A model that takes its inputs in order, and gives the tensors of its output as a tuple."""

    def __init__(self, model: nn.Module, names: Sequence[str] | None, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.constants = model, names, constants

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The model's tensors, in the order in which it returns them."""
        if self.names is None:
            return tuple(_tensors(self.model(*tensors, **self.constants)).values())
        return tuple(_tensors(self.model(**dict(zip(self.names, tensors, strict=True)), **self.constants)).values())


class Decoding(nn.Module):
    """A causal language model with its cache as tensors: keys and values of each layer, before and after."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Logits, then keys and values of each layer, the new ones behind the past ones."""
        past = tensors[len(self.names) :]
        out = self.model(**dict(zip(self.names, tensors, strict=False)), past_key_values=_cache(past), use_cache=True)
        return out.logits, *_parts(out.past_key_values)


def signature_of(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    kv_cache: bool = False,
    dynamic: bool | Mapping[str, Mapping[int, str]] = True,
) -> Signature:
    """How to call ``model``: from ``example_inputs``, or from what a transformers configuration says.

    Args:
        model: not called but once, for the names of its outputs
        example_inputs: one batch, or None
        kv_cache: with a cache of keys and values
        dynamic: free dimensions by name; True is the batch and the sequence, False is none

    Raises:
        FeedError: no inputs given, and nothing that says what they are
        OptionError: a cache asked of a model that keeps none
    """
    given = _given(example_inputs) if example_inputs is not None else _told(model)
    signature = _decoding(model) if kv_cache else _called(model, given)
    if dynamic is True:
        return signature
    axes = {} if dynamic is False else {name: dict(sizes) for name, sizes in dynamic.items()}
    unknown = axes.keys() - {*signature.inputs, *signature.outputs}
    if unknown:
        known = [*signature.inputs, *signature.outputs]
        raise OptionError(f"dynamic names {', '.join(sorted(unknown))}; the model has {', '.join(known)}")
    return dataclasses.replace(signature, axes=axes)


def _called(model: nn.Module, given: Mapping[str, Tensor] | tuple[Tensor, ...]) -> Signature:
    parameters = inspect.signature(model.forward).parameters
    constants: dict[str, Any] = {}
    if hasattr(model, "config") and _keeps_cache(model):
        constants["use_cache"] = False
    if isinstance(given, Mapping):
        named, names = dict(given), list(given)
    else:
        names = [name for name, one in parameters.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        names += [f"input_{place}" for place in range(len(names), len(given))]
        named = dict(zip(names, given, strict=False))
    module = Called(model, list(named) if isinstance(given, Mapping) else None, constants)
    with torch.no_grad():
        arguments = named if isinstance(given, Mapping) else {}
        found = _tensors(model(*(() if arguments else named.values()), **arguments, **constants))
    text = "input_ids" in named
    rows = {tensor.shape[0] for tensor in named.values() if tensor.dim()}
    # What has not as many rows as the batch has none of its rows.
    axes = {
        name: _axes(tensor, text=text)
        for name, tensor in (*named.items(), *found.items())
        if name in named or (tensor.dim() and tensor.shape[0] in rows)
    }
    return Signature(module, "model.", named, tuple(found), axes)


def _decoding(model: nn.Module) -> Signature:
    if not _keeps_cache(model):
        raise OptionError(
            f"kv_cache=True needs a causal language model of transformers; {type(model).__name__} keeps no cache"
        )
    total = _PAST + _SEQUENCE
    inputs = {
        "input_ids": _ids(model),
        "attention_mask": torch.ones(_BATCH, total, dtype=torch.int64),
        "position_ids": torch.arange(_PAST, total).repeat(_BATCH, 1),
    }
    if "position_ids" not in inspect.signature(_innermost(model).forward).parameters:
        del inputs["position_ids"]
    names = tuple(inputs)
    with torch.no_grad():
        first = model(input_ids=_ids(model)[:, :_PAST], use_cache=True)
    parts = _parts(first.past_key_values)
    axes: Axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    axes["attention_mask"][1] = "total"
    axes["logits"] = {0: "batch", 1: "sequence"}
    present = []
    for place, tensor in enumerate(parts):
        layer, kind = divmod(place, 2)
        name = f"{layer}.{('key', 'value')[kind]}"
        inputs[f"past_key_values.{name}"] = tensor.detach()
        axes[f"past_key_values.{name}"] = {0: "batch", 2: "past"}
        axes[f"present.{name}"] = {0: "batch", 2: "total"}
        present.append(f"present.{name}")
    return Signature(Decoding(model, names), "model.", inputs, ("logits", *present), axes)


def _given(example: Any) -> Mapping[str, Tensor] | tuple[Tensor, ...]:
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, Mapping):
        inputs = {name: value for name, value in example.items() if value is not None}
    else:
        inputs = {str(place): value for place, value in enumerate(example)}
    odd = [name for name, value in inputs.items() if not isinstance(value, Tensor)]
    if odd or not inputs:
        raise FeedError(f"example_inputs has to hold tensors; {', '.join(odd) or 'it is empty'}")
    return inputs if isinstance(example, Mapping) else tuple(inputs.values())


def _told(model: nn.Module) -> Mapping[str, Tensor]:
    """Inputs of a text model, by its configuration."""
    parameters = inspect.signature(_innermost(model).forward).parameters
    if not hasattr(model, "config") or "input_ids" not in parameters:
        raise FeedError(
            f"{type(model).__name__} does not say what its inputs are; give one batch as example_inputs, a tensor, a "
            f"tuple, or a dict by the names of forward's parameters"
        )
    inputs = {"input_ids": _ids(model), "attention_mask": torch.ones(_BATCH, _SEQUENCE, dtype=torch.int64)}
    if getattr(model.config, "type_vocab_size", 0) and "token_type_ids" in parameters:
        inputs["token_type_ids"] = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
    return {name: tensor for name, tensor in inputs.items() if name in parameters}


def _ids(model: Any) -> Tensor:
    words = int(model.config.get_text_config().vocab_size)
    return torch.arange(1, _BATCH * _SEQUENCE + 1).remainder(words).reshape(_BATCH, _SEQUENCE)


def _keeps_cache(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    parameters = inspect.signature(_innermost(model).forward).parameters
    return hasattr(config, "use_cache") and "past_key_values" in parameters and "use_cache" in parameters


def _innermost(model: nn.Module) -> nn.Module:
    """What PEFT wrapped: a wrapper's ``forward`` takes anything."""
    found = getattr(model, "get_base_model", None)
    return found() if callable(found) else model


def _axes(tensor: Tensor, *, text: bool) -> dict[int, str]:
    if tensor.dim() == 0:
        return {}
    tokens = tensor.dim() > 1 and tensor.shape[:2] == (_BATCH, _SEQUENCE) if text else tensor.dim() == 3
    return {0: "batch", 1: "sequence"} if tokens else {0: "batch"}


def _tensors(result: Any) -> dict[str, Tensor]:
    """The tensors of what a model returned, by name; caches are left out."""
    if isinstance(result, Tensor):
        return {"output": result}
    items = result.items() if isinstance(result, Mapping) else ((f"output_{i}", one) for i, one in enumerate(result))
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def _cache(parts: Sequence[Tensor]) -> Any:
    from transformers import DynamicCache  # noqa: PLC0415 - of the model's own package

    cache = DynamicCache()
    for layer in range(len(parts) // 2):
        cache.update(parts[2 * layer], parts[2 * layer + 1], layer)
    return cache


def _parts(cache: Any) -> list[Tensor]:
    """Keys and values of each layer, in turn."""
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]
