"""LoRA on quantized layers with PEFT: trained as on any linear layer, and merged by requantizing.

Stock ``get_peft_model`` works, too, but for merging: that is then refused (see `frozen_weight`).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from adapterx.errors import MissingDependency, ModelError, OptionError
from adapterx.quant.linear import QuantLinear
from adapterx.quant.requantized import requantized

try:
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as missing:
    raise MissingDependency("adapterx.quant.lora needs peft: pip install 'adapterx[train]'") from missing

Tensor = torch.Tensor

# Of PEFT's initialisations, those that leave the base as it is.
_HARMLESS = (True, False, None, "gaussian", "orthogonal", "eva")


class QuantLoraLinear(Linear):
    """PEFT's LoRA on a `QuantLinear`: merging dequantizes, adds and rounds again, and unmerging brings back the codes.

    A merged layer is off by the rounding of its change, which at 4 bits can be more than the change itself; exported
    unmerged, the adapter stays float and exact.
    """

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base's codes; several are added first and rounded once.

        Raises:
            ModelError: NaN or infinity in what would be merged, or a kind that is no plain sum
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        original = self._original()
        together = [*self.merged_adapters, *names]
        weight = self._with_adapters(original, together)
        bias = self._bias_with(original, together)
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"adapters {', '.join(names)} hold NaN or infinity; nothing was merged")
        merged = QuantLinear(requantized(weight, original.quantized), bias, compute_dtype=original.compute_dtype)
        # In a tuple, where torch sees no second module.
        self._before = (original,)
        self.base_layer = merged.train(original.training)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """The base as it was, code for code.

        Raises:
            ModelError: nothing is merged
        """
        if not self.merged_adapters:
            raise ModelError("no adapter is merged into this layer")
        self.base_layer = self._original()
        del self._before
        self.merged_adapters.clear()

    def _original(self) -> QuantLinear:
        held = self.__dict__.get("_before")
        layer = self.get_base_layer() if held is None else held[0]
        assert isinstance(layer, QuantLinear), "this class is made for no other"
        device: Any = self.get_base_layer().qweight.device
        return layer.to(device)

    def _with_adapters(self, original: QuantLinear, names: list[str]) -> Tensor:
        base = original.quantized.dequantized()
        weight = base
        for name in names:
            delta = self.get_delta_weight(name).detach().to(torch.float32)
            if name not in getattr(self, "lora_variant", {}):
                weight = weight + delta
            elif self.use_dora.get(name, False):
                magnitude: Any = self.lora_magnitude_vector[name]
                norm = magnitude.get_weight_norm(base, delta, scaling=1).detach()
                weight = (magnitude.weight.detach() / norm).unsqueeze(1) * (weight + delta)
            else:
                kind = type(self.lora_variant[name]).__name__
                raise ModelError(
                    f"adapter {name!r} is of a kind ({kind}) that is not merged into codes; unload it instead"
                )
        return weight

    def _bias_with(self, original: QuantLinear, names: list[str]) -> Tensor | None:
        factors: Any = self.lora_B
        added = [factors[name].bias.detach() * self.scaling[name] for name in names if self.lora_bias[name]]
        if not added:
            return original.bias
        zero = torch.zeros(original.out_features, device=original.qweight.device)
        return sum(added, zero if original.bias is None else original.bias.detach())


def lora_config(config: LoraConfig) -> LoraConfig:
    """``config`` itself, which from now on puts a `QuantLoraLinear` on every `QuantLinear`.

    PEFT does not save this; `load_lora` does it again.

    Raises:
        OptionError: an initialisation that changes the base's weights
    """
    if config.init_lora_weights not in _HARMLESS:
        raise OptionError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base's weights, and a quantized base has none "
            f"to change. Use True, 'gaussian', 'orthogonal' or 'eva'; or run it on the float model, and quantize then"
        )
    config._register_custom_module({QuantLinear: QuantLoraLinear})
    return config


def attach_lora(model: nn.Module, config: LoraConfig, *, adapter_name: str = "default") -> PeftModel:
    """``get_peft_model`` for a quantized model: adapters can be merged, and nothing can change the base in silence.

    Raises:
        OptionError: an initialisation that changes the base's weights (PiSSA, OLoRA, CorDA, LoftQ)
    """
    return get_peft_model(model, lora_config(config), adapter_name=adapter_name)


def load_lora(
    model: nn.Module, folder: str | os.PathLike[str], *, adapter_name: str = "default", trainable: bool = False
) -> PeftModel:
    """A PEFT adapter on a quantized model, as `attach_lora` would have put it there.

    Raises:
        OptionError: ``folder`` holds no LoRA adapter
    """
    config: Any = LoraConfig.from_pretrained(os.fspath(folder))
    if not isinstance(config, LoraConfig):
        raise OptionError(f"{os.fspath(folder)} holds {config.peft_type} of PEFT; only LoRA goes onto quantized layers")
    # Trained weights are read over whatever an initialisation would give.
    config.init_lora_weights = True
    return PeftModel.from_pretrained(
        model, os.fspath(folder), adapter_name=adapter_name, config=lora_config(config), is_trainable=trainable
    )
