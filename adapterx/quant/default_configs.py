"""Default configs: Neural Compressor's helpers for configs that are known to be good, by their known names.

``processor_type`` ("client" or "server") decides ``use_layer_wise`` there, which here changes nothing.
"""

from __future__ import annotations

from typing import Literal

from adapterx.errors import OptionError, nearest
from adapterx.quant.configs import (
    AnyConfig,
    AutoRoundConfig,
    AWQConfig,
    DynamicQuantConfig,
    FP8Config,
    GPTQConfig,
    HQQConfig,
    INT8StaticQuantConfig,
    LayerConfig,
    MixedPrecisionConfig,
    MXQuantConfig,
    RTNConfig,
    SmoothQuantConfig,
    TEQConfig,
)

Processor = Literal["client", "server"] | None
_DOUBLE = {
    "BNB_NF4": {
        "dtype": "nf4",
        "bits": 4,
        "group_size": 32,
        "use_double_quant": True,
        "double_quant_bits": 8,
        "double_quant_use_sym": False,
        "double_quant_group_size": 256,
    },
    "GGML_TYPE_Q4_K": {
        "dtype": "int",
        "bits": 4,
        "use_sym": False,
        "group_size": 32,
        "use_double_quant": True,
        "double_quant_bits": 6,
        "double_quant_use_sym": True,
        "double_quant_group_size": 8,
    },
}


def get_default_rtn_config(processor_type: Processor = None) -> RTNConfig:
    """`RTNConfig()`; ``use_layer_wise`` on a client, where memory is short."""
    return RTNConfig(use_layer_wise=_is_client(processor_type))


def get_default_gptq_config(processor_type: Processor = None) -> GPTQConfig:
    """`GPTQConfig()`; ``use_layer_wise`` on a client, where memory is short."""
    return GPTQConfig(use_layer_wise=_is_client(processor_type))


def get_default_awq_config() -> AWQConfig:
    """`AWQConfig()`."""
    return AWQConfig()


def get_default_teq_config() -> TEQConfig:
    """`TEQConfig()`."""
    return TEQConfig()


def get_default_hqq_config() -> HQQConfig:
    """`HQQConfig()`."""
    return HQQConfig()


def get_default_AutoRound_config(processor_type: Processor = None) -> AutoRoundConfig:  # noqa: N802 - its known name
    """`AutoRoundConfig()`; ``use_layer_wise`` on a client, where memory is short."""
    return AutoRoundConfig(use_layer_wise=_is_client(processor_type))


def get_default_sq_config() -> SmoothQuantConfig:
    """`SmoothQuantConfig()`."""
    return SmoothQuantConfig()


def get_default_static_config() -> INT8StaticQuantConfig:
    """`INT8StaticQuantConfig()`."""
    return INT8StaticQuantConfig()


def get_default_dynamic_config() -> DynamicQuantConfig:
    """`DynamicQuantConfig()`."""
    return DynamicQuantConfig()


def get_default_mx_config() -> MXQuantConfig:
    """`MXQuantConfig()`."""
    return MXQuantConfig()


def get_default_fp8_config() -> FP8Config:
    """`FP8Config()`."""
    return FP8Config()


def get_default_mixed_precision_config() -> MixedPrecisionConfig:
    """`MixedPrecisionConfig()`."""
    return MixedPrecisionConfig()


def get_default_double_quant_config(type: str = "BNB_NF4") -> RTNConfig:
    """Round to nearest with quantized scales, as bitsandbytes' NF4 or GGML's Q4_K has them.

    Raises:
        OptionError: neither of the two
    """
    if type not in _DOUBLE:
        raise OptionError(f"type={type!r}: expected one of {', '.join(_DOUBLE)}{nearest(type, _DOUBLE)}")
    return RTNConfig.from_dict(_DOUBLE[type])


def get_rtn_double_quant_config_set() -> list[RTNConfig]:
    """The two configs of `get_default_double_quant_config`."""
    return [get_default_double_quant_config(name) for name in _DOUBLE]


def get_woq_tuning_config() -> list[AnyConfig]:
    """Weight-only configs for `autotune`, asymmetric and by 32: RTN, AutoRound, GPTQ, AWQ."""
    return [
        RTNConfig(use_sym=False, group_size=32),
        AutoRoundConfig(use_sym=False, group_size=32, seqlen=2048),
        GPTQConfig(use_sym=False, group_size=32),
        AWQConfig(use_sym=False, group_size=32),
    ]


def get_all_config_set() -> list[LayerConfig]:
    """One default config of each method, the most exact first."""
    kinds: list[type[LayerConfig]] = [GPTQConfig, RTNConfig, HQQConfig, AWQConfig, TEQConfig, AutoRoundConfig]
    others: list[type[LayerConfig]] = [
        INT8StaticQuantConfig,
        SmoothQuantConfig,
        DynamicQuantConfig,
        MXQuantConfig,
        FP8Config,
    ]
    ordered: list[type[LayerConfig]] = [MixedPrecisionConfig, *sorted(kinds, key=lambda kind: -kind.priority), *others]
    return [kind() for kind in ordered]


def _is_client(processor: Processor) -> bool:
    if processor is not None and processor.lower() not in ("client", "server"):
        raise OptionError(f"processor_type={processor!r}: expected 'client' or 'server'")
    return processor is not None and processor.lower() == "client"
