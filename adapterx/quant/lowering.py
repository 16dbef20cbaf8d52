"""Lowering: what a quantized layer is while its model goes to ONNX, without a code or a scale being changed.

Layers are exchanged for the time of an export and come back after it, so that nothing about the export is kept in the
model or anywhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from adapterx.quant.linear import QuantLinear, replace
from adapterx.quant.lowered_input import rounded_input
from adapterx.quant.lowered_integer import integer_product
from adapterx.quant.lowered_product import Lowering, Product, weight_product
from adapterx.quant.weight import QuantWeight

Tensor = torch.Tensor


def product_of(quantized: QuantWeight, lowering: Lowering) -> Product:
    """``x`` times ``quantized``, its rounded inputs included, but neither ``pre_scale`` nor ``order``."""
    if (whole := integer_product(quantized)) is not None:
        return whole
    product = weight_product(quantized, lowering)
    activation = quantized.activation
    if activation is None:
        return product
    eights = activation.format in ("int8", "uint8") and activation.per in ("token", "tensor")
    if eights and lowering.level == 4 and product.became.startswith("MatMulNBits"):
        # The kernel itself rounds inputs to eight bits, on a finer grid than the one asked for.
        return dataclasses.replace(product, became=f"{product.became}, inputs by block")
    return dataclasses.replace(
        product,
        became=f"{product.became}, inputs {activation.format} by {activation.per}",
        apply=lambda x, held: product.apply(rounded_input(x, activation), held),
        rounds=True,
    )


class LoweredLinear(nn.Module):
    """A `QuantLinear` as the exporter sees it: constants under the layer's name, and operators over them."""

    product: Product
    was: str

    def __init__(self, layer: QuantLinear, lowering: Lowering) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        quantized = layer.quantized
        self.product = product_of(quantized, lowering)
        self.names = tuple(self.product.tensors)
        for name, tensor in self.product.tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("nothing", torch.full((1, 1), torch.nan), persistent=False)
        # Adapters read what is above a `pre_scale`: ones say where that is.
        ones = torch.ones(quantized.shape[1]) if self.product.rounds and quantized.order is None else None
        self.register_buffer("pre_scale", ones if quantized.pre_scale is None else quantized.pre_scale)
        self.register_buffer("order", quantized.order)
        self.bias, self.output = layer.bias, layer.output
        self.was = layer.extra_repr().partition(", ")[2].partition(", ")[2]

    @property
    def weight(self) -> Tensor:
        """Of the right shape, and nothing more: DoRA asks for it, and then for its norm, which is known."""
        return self.get_buffer("nothing").expand(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` -> ``[..., N]``, computed in float32."""
        wide = x.to(torch.float32)
        pre_scale, order = self.get_buffer("pre_scale"), self.get_buffer("order")
        if pre_scale is not None:
            wide = wide * pre_scale
        if order is not None:
            wide = torch.onnx.ops.symbolic(
                "Gather", [wide, order], {"axis": -1}, dtype=wide.dtype, shape=wide.shape, version=13
            )
        y = self.product.apply(wide, {name: self.get_buffer(name) for name in self.names})
        y = y if self.bias is None else y + self.bias.to(torch.float32)
        return (y if self.output is None else y.to(getattr(torch, self.output))).to(x.dtype)


@contextlib.contextmanager
def lowered(model: nn.Module, lowering: Lowering) -> Iterator[dict[str, LoweredLinear]]:
    """Within it, every `QuantLinear` of ``model`` is a `LoweredLinear`; gives them by name."""
    layers = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantLinear)
    ]
    made: dict[int, LoweredLinear] = {}
    found: dict[str, LoweredLinear] = {}
    try:
        for name, layer in layers:
            found[name] = made.setdefault(id(layer), LoweredLinear(layer, lowering))
            replace(model, name, found[name])
        yield found
    finally:
        for name, layer in layers:
            replace(model, name, layer)
