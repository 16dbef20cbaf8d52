"""Dispatch: which function a method's layers are quantized by, and what can be seen to be wrong before any is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapterx.errors import ModelError, OptionError
from adapterx.quant.autoround import AutoRound, autoround
from adapterx.quant.awq import AWQ, awq
from adapterx.quant.blocks import Block
from adapterx.quant.dynamic import DynamicInt8, dynamic_int8
from adapterx.quant.float8 import Float8, float8, float8_static
from adapterx.quant.gptq import GPTQ, gptq
from adapterx.quant.hqq import HQQ, hqq
from adapterx.quant.linear import as_quantized, is_linear, linear_weight
from adapterx.quant.mixed_precision import HalfPrecision, half
from adapterx.quant.mx import MX, mx
from adapterx.quant.rtn import RTN, rtn
from adapterx.quant.scheme import Scheme
from adapterx.quant.smoothquant import SmoothQuant, smoothquant
from adapterx.quant.static import StaticInt8, static_int8
from adapterx.quant.teq import TEQ, teq
from adapterx.quant.weight import QuantWeight

OfBlock = Callable[[Block, Mapping[str, Any]], Mapping[str, QuantWeight]]

_OF_WEIGHT: dict[type, Callable[..., QuantWeight]] = {
    RTN: rtn,
    HQQ: hqq,
    DynamicInt8: dynamic_int8,
    MX: mx,
    Float8: float8,
}
_OF_BLOCK: dict[type, OfBlock] = {
    GPTQ: gptq,
    AWQ: awq,
    SmoothQuant: smoothquant,
    TEQ: teq,
    AutoRound: autoround,
    StaticInt8: static_int8,
    Float8: float8_static,
}


def needs_data(method: Any) -> bool:
    """Whether ``method`` looks at calibration data."""
    if isinstance(method, Float8):
        return method.activation == "static"
    return type(method) in _OF_BLOCK


def weight_by(weight: torch.Tensor, method: Any, *, name: str) -> QuantWeight:
    """``weight`` ``[N, K]`` by a method that needs no data.

    Raises:
        OptionError: one that does
    """
    if type(method) not in _OF_WEIGHT or needs_data(method):
        raise OptionError(f"{name}: {type(method).__name__} needs calibration data; RTN and HQQ do not")
    return _OF_WEIGHT[type(method)](weight, method, name=name)


def layer_by(module: nn.Module, method: Any, *, name: str) -> nn.Module:
    """What takes the place of ``module`` by a method that needs no data."""
    if isinstance(method, HalfPrecision):
        return half(module, method, name=name)
    return as_quantized(module, weight_by(linear_weight(module), method, name=name))


def by_kind(layers: Mapping[str, Any]) -> Iterator[tuple[OfBlock, dict[str, Any]]]:
    """The methods that need data, by the function that takes them."""
    for kind, function in _OF_BLOCK.items():
        some = {name: method for name, method in layers.items() if type(method) is kind and needs_data(method)}
        if some:
            yield function, some


def check_layers(model: nn.Module, methods: Mapping[str, Any]) -> None:
    """See to it that every layer can be quantized, before the first one is.

    Raises:
        ModelError: weights that are NaN or infinite
        OptionError: groups that do not fit; all such layers are named
    """
    infinite: list[str] = []
    misfit: list[str] = []
    for name, method in methods.items():
        module = model.get_submodule(name)
        weight = linear_weight(module) if is_linear(module) else module.weight
        assert isinstance(weight, torch.Tensor), "every layer with a method has a weight"
        wrong = int((~torch.isfinite(weight.detach())).sum())
        if wrong:
            infinite.append(f"{name} ({wrong} of {weight.numel()})")
        scheme = getattr(method, "scheme", None)
        if isinstance(scheme, Scheme):
            with _gathered(misfit):
                scheme.groups_of(weight.shape[1], name=name)
    if infinite:
        raise ModelError(f"weights are NaN or infinite: {_some(infinite)}; mend the checkpoint first")
    if misfit:
        raise OptionError(_some(misfit))


@contextlib.contextmanager
def _gathered(faults: list[str]) -> Iterator[None]:
    try:
        yield
    except OptionError as wrong:
        faults.append(str(wrong))


def _some(faults: Sequence[str]) -> str:
    return "; ".join(faults[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
