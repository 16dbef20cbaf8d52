"""Quantize in torch, run on ONNX Runtime. Needs the extra ``[quant]``.

The verbs are Neural Compressor's (`prepare`, `convert`, `quantize`, `autotune`, `save`, `load`); `export` goes to ONNX.
PEFT's layer for quantized bases is in `adapterx.quant.lora`, the readers of other libraries' checkpoints in
`adapterx.quant.interop`.
"""

from adapterx.errors import MissingDependency

try:
    import torch as _torch
except ImportError as missing:
    raise MissingDependency("adapterx.quant needs torch: pip install 'adapterx[quant]'") from missing

from adapterx.quant.configs import (
    AutoRoundConfig,
    AWQConfig,
    DynamicQuantConfig,
    FP8Config,
    GPTQConfig,
    HQQConfig,
    INT8StaticQuantConfig,
    MixedPrecisionConfig,
    MXQuantConfig,
    RTNConfig,
    SmoothQuantConfig,
    StaticQuantConfig,
    TEQConfig,
)
from adapterx.quant.default_configs import (
    get_all_config_set,
    get_default_AutoRound_config,
    get_default_awq_config,
    get_default_double_quant_config,
    get_default_dynamic_config,
    get_default_fp8_config,
    get_default_gptq_config,
    get_default_hqq_config,
    get_default_mixed_precision_config,
    get_default_mx_config,
    get_default_rtn_config,
    get_default_sq_config,
    get_default_static_config,
    get_default_teq_config,
    get_rtn_double_quant_config_set,
    get_woq_tuning_config,
)
from adapterx.quant.device import auto_detect_accelerator
from adapterx.quant.fake_quant import prepare_qat
from adapterx.quant.fold import Fold
from adapterx.quant.interop import read_quantized
from adapterx.quant.linear import QuantLinear
from adapterx.quant.onnx_export import export
from adapterx.quant.rebase import rebase_adapter
from adapterx.quant.storage import load, save
from adapterx.quant.torchao_names import Int4WeightOnly, Int8DynamicActivationInt8Weight, Int8WeightOnly, quantize_
from adapterx.quant.tuning import TuningConfig, autotune
from adapterx.quant.verbs import convert, prepare, quantize
from adapterx.quant.weight import QuantWeight

del _torch

__all__ = [
    "AWQConfig",
    "AutoRoundConfig",
    "DynamicQuantConfig",
    "FP8Config",
    "Fold",
    "GPTQConfig",
    "HQQConfig",
    "INT8StaticQuantConfig",
    "Int4WeightOnly",
    "Int8DynamicActivationInt8Weight",
    "Int8WeightOnly",
    "MXQuantConfig",
    "MixedPrecisionConfig",
    "QuantLinear",
    "QuantWeight",
    "RTNConfig",
    "SmoothQuantConfig",
    "StaticQuantConfig",
    "TEQConfig",
    "TuningConfig",
    "auto_detect_accelerator",
    "autotune",
    "convert",
    "export",
    "get_all_config_set",
    "get_default_AutoRound_config",
    "get_default_awq_config",
    "get_default_double_quant_config",
    "get_default_dynamic_config",
    "get_default_fp8_config",
    "get_default_gptq_config",
    "get_default_hqq_config",
    "get_default_mixed_precision_config",
    "get_default_mx_config",
    "get_default_rtn_config",
    "get_default_sq_config",
    "get_default_static_config",
    "get_default_teq_config",
    "get_rtn_double_quant_config_set",
    "get_woq_tuning_config",
    "load",
    "prepare",
    "prepare_qat",
    "quantize",
    "quantize_",
    "read_quantized",
    "rebase_adapter",
    "save",
]
