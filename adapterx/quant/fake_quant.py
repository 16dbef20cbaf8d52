"""Fake quantization for training: weights and inputs are rounded in the forward pass, and gradients pass through
(Jacob et al., arXiv 1712.05877; Bengio et al., arXiv 1308.3432). What is trained is what `convert` freezes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adapterx.errors import ModelError, OptionError, nearest
from adapterx.quant.dispatch import check_layers, needs_data, weight_by
from adapterx.quant.layer_config import LayerConfig
from adapterx.quant.linear import QuantLinear, as_quantized, is_linear, linear_weight, replace
from adapterx.quant.mixed_precision import HalfPrecision
from adapterx.quant.mx import MX
from adapterx.quant.rounding import rounded

Tensor = torch.Tensor
_KNOWN = {"MXFP8": MX("mxfp8_e4m3", "mxfp8_e4m3"), "MXFP4": MX("mxfp4", "mxfp4")}
_HEADS = re.compile(r".*lm_head|.*output_layer|.*embed_out")


class FakeQuantLinear(nn.Linear):
    """A float linear layer that computes as the `QuantLinear` which `frozen` makes of it; its weight is trained.

    The gradient of a rounding is that of doing nothing.
    """

    def __init__(self, layer: nn.Module, method: Any, *, name: str = "a layer") -> None:
        nn.Module.__init__(self)
        weight, bias = linear_weight(layer), layer.bias
        self.out_features, self.in_features = weight.shape
        self.method, self.name = method, name
        # An nn.Linear's own parameters, so that optimizers which know them, and ties, keep them.
        own = layer.weight
        shared = isinstance(layer, nn.Linear) and isinstance(own, nn.Parameter)
        self.weight = own if shared and isinstance(own, nn.Parameter) else nn.Parameter(weight.contiguous())
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K]`` -> ``[..., N]``, in the dtype of ``input``."""
        quantized = weight_by(self.weight, self.method, name=self.name)
        weight = _through(self.weight, quantized.dequantized().to(self.weight.dtype))
        if quantized.activation is not None:
            input = _through(input, rounded(input, quantized.activation))
        y = nn.functional.linear(input, weight, self.bias)
        return y if quantized.output is None else y.to(getattr(torch, quantized.output)).to(y.dtype)

    def frozen(self) -> QuantLinear:
        """The layer with its weight as it is now, in codes."""
        return as_quantized(self, weight_by(self.weight.detach(), self.method, name=self.name))

    def extra_repr(self) -> str:
        """Shape and method, as they show in a printed model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.method}"


def prepare_qat(
    model: nn.Module, mapping: Mapping[type[nn.Module], Any] | None = None, inplace: bool = True
) -> nn.Module:
    """Make ready for quantization-aware training: train the model afterwards, then `convert` it.

    Args:
        model: in training mode
        mapping: class of layer -> "MXFP8", "MXFP4", a config such as ``RTNConfig(bits=4)``, or a method that needs no
            data; all linear layers as "MXFP8" by default. The head of a language model is left in float
        inplace: prepare ``model`` itself, else a copy

    Returns:
        The model, its linear layers trained as they will be.

    Raises:
        ModelError: a model in evaluation mode, or one without such layers
        OptionError: a method that does not exist, or that cannot be trained with
    """
    if not model.training:
        raise ModelError("the model is in evaluation mode; call model.train() before prepare_qat")
    methods = {kind: _method(given) for kind, given in ({nn.Linear: "MXFP8"} if mapping is None else mapping).items()}
    chosen = {
        name: next(method for kind, method in methods.items() if isinstance(module, kind))
        for name, module in model.named_modules()
        if is_linear(module) and isinstance(module, tuple(methods)) and not _HEADS.match(name)
    }
    if not chosen:
        kinds = ", ".join(kind.__name__ for kind in methods)
        raise ModelError(f"{type(model).__name__} has no layer to train for quantization; looked for {kinds}")
    check_layers(model, chosen)
    model = model if inplace else copy.deepcopy(model)
    for name, method in chosen.items():
        replace(model, name, FakeQuantLinear(model.get_submodule(name), method, name=name))
    return model


def fake_layers(model: nn.Module) -> dict[str, FakeQuantLinear]:
    """The layers of ``model`` that are trained for quantization, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FakeQuantLinear)}


def _through(x: Tensor, quantized: Tensor) -> Tensor:
    return x + (quantized - x).detach()


def _method(given: Any) -> Any:
    method = given.method() if isinstance(given, LayerConfig) else given
    if isinstance(given, str):
        if given not in _KNOWN:
            raise OptionError(
                f"mapping to {given!r}: expected {', '.join(_KNOWN)}, or a config{nearest(given, _KNOWN)}"
            )
        method = _KNOWN[given]
    if method is None or needs_data(method) or isinstance(method, HalfPrecision):
        raise OptionError(f"{given!r} cannot be trained with; methods that need no data can: MX, RTN, HQQ")
    return method
