"""TorchAO's names for three schemes, which there do not run on CPUs or do not export, and here do both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from adapterx.errors import ModelError
from adapterx.quant.dispatch import check_layers, layer_by
from adapterx.quant.dynamic import DynamicInt8
from adapterx.quant.linear import is_linear
from adapterx.quant.originals import restored
from adapterx.quant.rtn import RTN
from adapterx.quant.scheme import Scheme
from adapterx.quant.storage import mark_quantized


@dataclasses.dataclass(frozen=True, slots=True)
class Int4WeightOnly:
    """Weights in four bits with zero points, by groups of ``group_size``."""

    group_size: int = 128

    def method(self) -> RTN:
        """Round to nearest, asymmetric."""
        return RTN(Scheme(bits=4, group_size=self.group_size, symmetric=False))


@dataclasses.dataclass(frozen=True, slots=True)
class Int8WeightOnly:
    """Weights in eight bits, symmetric, by groups of ``group_size``; None is a whole row."""

    group_size: int | None = None

    def method(self) -> RTN:
        """Round to nearest, symmetric."""
        return RTN(Scheme(bits=8, group_size=-1 if self.group_size is None else self.group_size))


@dataclasses.dataclass(frozen=True, slots=True)
class Int8DynamicActivationInt8Weight:
    """Weights in eight bits by row, and inputs in eight bits by token, both symmetric."""

    def method(self) -> DynamicInt8:
        """Dynamic int8 by token."""
        return DynamicInt8(per="token", activation_symmetric=True)


Named = Int4WeightOnly | Int8WeightOnly | Int8DynamicActivationInt8Weight


def quantize_(model: nn.Module, config: Named, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> None:
    """Quantize linear layers of ``model`` in place, as ``torchao.quantization.quantize_`` does.

    A layer that a group does not fit is an error; torchao leaves it in float without a word. After an error the model
    is as it was.

    Args:
        model: in float
        config: one of the three schemes
        filter_fn: ``filter_fn(module, name)``, whether to quantize the layer; all linear layers by default

    Raises:
        ModelError: no layer to quantize, or weights that are NaN or infinite
        OptionError: groups that do not fit

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 8))
        >>> quantize_(model, Int4WeightOnly(group_size=32))
        >>> model[0]
        QuantLinear(in_features=64, out_features=8, 4 bits, group=32)
    """
    method = config.method()
    names = [n for n, m in model.named_modules() if is_linear(m) and (filter_fn is None or filter_fn(m, n))]
    if not names:
        raise ModelError(f"{type(model).__name__} has no linear layer that filter_fn lets through")
    check_layers(model, dict.fromkeys(names, method))
    with restored(model) as originals:
        for name in names:
            originals.untie(name)
            originals.replace(name, layer_by(model.get_submodule(name), method, name=name))
    mark_quantized(model)
