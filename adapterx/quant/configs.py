"""Configs: Neural Compressor's config classes by their known names, and its helpers for defaults."""

from __future__ import annotations

from adapterx.quant.activation_configs import (
    DynamicQuantConfig,
    FP8Config,
    INT8StaticQuantConfig,
    MixedPrecisionConfig,
    MXQuantConfig,
    SmoothQuantConfig,
    StaticQuantConfig,
)
from adapterx.quant.layer_config import AnyConfig, ComposedConfig, LayerConfig, as_config
from adapterx.quant.learned_configs import AutoRoundConfig, AWQConfig, TEQConfig
from adapterx.quant.weight_configs import GPTQConfig, HQQConfig, RTNConfig

__all__ = [
    "AWQConfig",
    "AnyConfig",
    "AutoRoundConfig",
    "ComposedConfig",
    "DynamicQuantConfig",
    "FP8Config",
    "GPTQConfig",
    "HQQConfig",
    "INT8StaticQuantConfig",
    "LayerConfig",
    "MXQuantConfig",
    "MixedPrecisionConfig",
    "RTNConfig",
    "SmoothQuantConfig",
    "StaticQuantConfig",
    "TEQConfig",
    "as_config",
]
