"""QuantLinear: a frozen `QuantWeight` where an ``nn.Linear`` was. Stock PEFT wraps it and trains on top."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from adapterx.errors import MismatchError, ModelError
from adapterx.quant.codebook import Rounding
from adapterx.quant.frozen_weight import FrozenWeight
from adapterx.quant.packing import pack, unpack
from adapterx.quant.rounding import rounded
from adapterx.quant.weight import Activation, DoubleScales, Output, Per, QuantWeight

Tensor = torch.Tensor


class QuantLinear(nn.Linear):
    """``y = act(x * pre_scale)[..., order] @ values.T + bias``, from a `QuantWeight`.

    ``weight`` is a property that dequantizes, so code that asks a linear layer for its weight works, and code that
    would write into it (merging, initialisations that change the base) would write into a temporary: assigning to it is
    an error, and `adapterx.quant.lora` gives PEFT a layer that merges by requantizing.

    Buffers: ``qweight`` uint8 ``[N, bytes]`` packed low bits first, ``scales`` float32 ``[N, G]``, and where there are
        such:
    ``qzeros`` (packed as the codes are, or float32), ``codebook``, ``pre_scale``, ``order``, ``act_scale``,
    ``act_zero``, ``scale_codes``, ``scale_scale``, ``scale_offset``. All stay as they are when the model is cast to
    another dtype: only ``compute_dtype``, in which the product is computed, follows.
    """

    compute_dtype: torch.dtype
    qweight: Tensor
    scales: Tensor | None
    qzeros: Tensor | None
    codebook: Tensor | None
    pre_scale: Tensor | None
    order: Tensor | None
    act_scale: Tensor | None
    act_zero: Tensor | None
    scale_codes: Tensor | None
    scale_scale: Tensor | None
    scale_offset: Tensor | None
    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self, quantized: QuantWeight, bias: Tensor | None = None, *, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.compute_dtype = compute_dtype
        self.bits, self.group, self.format = quantized.bits, quantized.group, quantized.format
        activation, double = quantized.activation, quantized.double
        self.activation_format = None if activation is None else activation.format
        self.activation_per: Per = "token" if activation is None else activation.per
        self.activation_group = 0 if activation is None else activation.group
        self.activation_rounding: Rounding = "even" if activation is None else activation.rounding
        self.output: Output | None = quantized.output
        self.double_bits, self.double_group = (0, 0) if double is None else (double.bits, double.group)
        zeros = quantized.zeros
        if zeros is not None and not zeros.is_floating_point():
            zeros = pack(zeros, self.bits)
        buffers: dict[str, Tensor | None] = {
            "qweight": pack(quantized.codes, self.bits),
            "scales": quantized.scales if double is None else None,
            "qzeros": zeros,
            "codebook": quantized.codebook,
            "pre_scale": quantized.pre_scale,
            "order": quantized.order,
            "act_scale": None if activation is None else activation.scale,
            "act_zero": None if activation is None else activation.zero,
            "scale_codes": None if double is None else double.codes,
            "scale_scale": None if double is None else double.scale,
            "scale_offset": None if double is None else double.offset,
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, None if tensor is None else tensor.contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone().to(compute_dtype), requires_grad=False)

    @property
    def quantized(self) -> QuantWeight:
        """The `QuantWeight` that this layer holds, codes unpacked."""
        double = None
        if self.scale_codes is not None and self.scale_scale is not None and self.scale_offset is not None:
            double = DoubleScales(
                codes=self.scale_codes,
                scale=self.scale_scale,
                offset=self.scale_offset,
                zero=2 ** (self.double_bits - 1),
                bits=self.double_bits,
                group=self.double_group,
            )
        scales = self.scales if double is None else double.values()
        assert scales is not None, "either the scales or their codes are kept"
        zeros = self.qzeros
        if zeros is not None and not zeros.is_floating_point():
            zeros = unpack(zeros, self.bits, scales.shape[1])
        activation = None
        if self.activation_format is not None:
            activation = Activation(
                format=self.activation_format,
                per=self.activation_per,
                scale=self.act_scale,
                zero=self.act_zero,
                group=self.activation_group,
                rounding=self.activation_rounding,
            )
        return QuantWeight(
            codes=unpack(self.qweight, self.bits, self.in_features),
            scales=scales,
            group=self.group,
            bits=self.bits,
            zeros=zeros,
            format=self.format,
            codebook=self.codebook,
            pre_scale=self.pre_scale,
            order=self.order,
            activation=activation,
            double=double,
            output=self.output,
        )

    @property
    def weight(self) -> Tensor:
        """``[N, K]`` in ``compute_dtype``: what the layer's own inputs are multiplied by.

        A new tensor at each call, which refuses to be written into.
        """
        return self.quantized.dequantized().to(self.compute_dtype).as_subclass(FrozenWeight)

    @weight.setter
    def weight(self, value: object) -> None:
        raise ModelError("a QuantLinear's weight is frozen; replace the layer: QuantLinear(rtn(weight, method), bias)")

    def forward(self, input: Tensor) -> Tensor:
        """``[..., K]`` -> ``[..., N]``, in the dtype of ``input``."""
        y = self._product(input)
        # The round trip exports as two Casts.
        return y if self.output is None else y.to(getattr(torch, self.output)).to(y.dtype)

    def _product(self, input: Tensor) -> Tensor:
        quantized = self.quantized
        if quantized.activation is None:
            return nn.functional.linear(input, quantized.dequantized().to(input.dtype), self._bias(input))
        if quantized.pre_scale is not None:
            input = input * quantized.pre_scale.to(input.dtype)
        if quantized.order is not None:
            input = input[..., quantized.order]
        input = rounded(input, quantized.activation)
        return nn.functional.linear(input, quantized.values().to(input.dtype), self._bias(input))

    def extra_repr(self) -> str:
        """Shape and format, as they show in a printed model."""
        grid = f"{self.bits} bits" if self.format == "int" else self.format
        act = (
            "" if self.activation_format is None else f", activation={self.activation_format} per {self.activation_per}"
        )
        out = "" if self.output is None else f", output={self.output}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {grid}, group={self.group}{act}{out}"

    def _bias(self, input: Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias.to(input.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        # Scales in half would be other scales: buffers follow to a device, never to a dtype.
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.qweight.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            now = self._buffers[name]
            if now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a float linear layer:

    An ``nn.Linear``, or transformers' ``Conv1D``, whose weight is ``[K, N]``.
    """
    return (isinstance(module, nn.Linear) and not isinstance(module, QuantLinear)) or _is_conv1d(module)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight ``[N, K]`` of a float linear layer, detached; ``Conv1D``'s is turned."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise MismatchError(f"{type(module).__name__} has no weight")
    return weight.detach().T if _is_conv1d(module) else weight.detach()


def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Put ``weight`` ``[N, K]`` into a float linear layer, in its own dtype."""
    linear_weight(module).copy_(weight)


def stored_weight(module: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` ``[N, K]`` as the float linear layer ``module`` keeps its own: in its dtype, ``Conv1D``'s turned."""
    return (weight.T if _is_conv1d(module) else weight).to(linear_weight(module).dtype)


def as_quantized(module: nn.Module, quantized: QuantWeight) -> QuantLinear:
    """The `QuantLinear` that takes the place of the float linear layer ``module``."""
    bias = module.bias
    layer = QuantLinear(
        quantized, bias if isinstance(bias, Tensor) else None, compute_dtype=linear_weight(module).dtype
    )
    return layer.train(module.training)


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` where the module called ``name`` is."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Every `QuantLinear` in ``model`` with its name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def _is_conv1d(module: nn.Module) -> bool:
    # By name: transformers is not needed to quantize a model that is not its own.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
