"""Configs of the methods that round inputs, too, or compute in half. Fields and defaults are Neural Compressor's."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import nn

from adapterx.quant.config_fields import ANY, FLAG, LAYERS, Rule, integer, number, one_of, option
from adapterx.quant.dynamic import DynamicInt8
from adapterx.quant.float8 import Float8
from adapterx.quant.layer_config import LayerConfig
from adapterx.quant.mixed_precision import HalfPrecision, takes_half
from adapterx.quant.mx import MX
from adapterx.quant.smoothquant import SmoothQuant
from adapterx.quant.static import StaticInt8
from adapterx.quant.weight import Output
from adapterx.quant.weight_configs import KEEP, faultless

_HALVES: dict[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_OUTPUTS: dict[str, Output | None] = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float32": None,
    "fp32": None,
}
_GRANULARITY = one_of("per_channel", "per_tensor")


def both_or_neither(config: Any) -> list[str]:
    """Weights that stay float with inputs that do not, or the other way round."""
    if (config.w_dtype == KEEP) == (config.act_dtype == KEEP):
        return []
    return [f"w_dtype={config.w_dtype!r} with act_dtype={config.act_dtype!r}: both are 'fp32', or neither"]


class INT8StaticQuantConfig(LayerConfig):
    """Weights and inputs in eight bits, with ranges from calibration (`adapterx.quant.static.StaticInt8`)."""

    name: ClassVar[str] = "static_quant"
    priority: ClassVar[int] = 0

    w_dtype: str = option(default="int8", rule=one_of("int8", KEEP))
    w_sym: bool = option(default=True, rule=FLAG)
    w_granularity: str = option(default="per_channel", rule=_GRANULARITY)
    w_algo: str = option(default="minmax")
    act_dtype: str = option(default="uint8", rule=one_of("uint8", "int8", KEEP))
    act_sym: bool = option(default=False, rule=FLAG)
    act_granularity: str = option(default="per_tensor")
    act_algo: str = option(default="minmax")
    excluded_precisions: Any = option(default=[])
    model_info: Any = option(default=None)
    white_list: Any = option(default="*", rule=LAYERS)

    def problems(self) -> list[str]:
        """Lists, and weights that stay float with inputs that do not."""
        return super().problems() or both_or_neither(self)

    def method(self) -> StaticInt8 | None:
        """`StaticInt8`, or None for ``"fp32"``."""
        faultless(self)
        if self.w_dtype == KEEP:
            return None
        return StaticInt8(
            per_channel=self.w_granularity == "per_channel",
            symmetric=self.w_sym,
            format="uint8" if self.act_dtype == "uint8" else "int8",
            activation_symmetric=self.act_sym,
        )


class SmoothQuantConfig(LayerConfig):
    """Int8 weights and inputs behind a scale that makes both easy (`adapterx.quant.smoothquant.SmoothQuant`).

    ``alpha="auto"`` tries ``alpha_min`` to ``alpha_max`` in steps of ``alpha_step``, by layer, or with ``do_blockwise``
    by block; all are tried, so ``init_alpha`` changes nothing. Layers that read one tensor always share their scale,
    which stays in front of them.
    """

    name: ClassVar[str] = "smooth_quant"
    priority: ClassVar[int] = 0

    w_dtype: str = option(default="int8", rule=one_of("int8", KEEP))
    w_sym: bool = option(default=True, rule=FLAG)
    w_granularity: str = option(default="per_channel", rule=_GRANULARITY)
    w_algo: str = option(default="minmax")
    act_dtype: str = option(default="uint8", rule=one_of("uint8", "int8", KEEP))
    act_sym: bool = option(default=False, rule=FLAG)
    act_granularity: str = option(default="per_tensor")
    act_algo: str = option(default="minmax")
    excluded_precisions: Any = option(default=[])
    alpha: float | Literal["auto"] = option(default=0.5, rule=number(0, 1, also=["auto"]))
    folding: bool = option(default=False)
    scale_sharing: bool = option(default=False, rule=ANY)
    init_alpha: float = option(default=0.5, rule=ANY)
    alpha_min: float = option(default=0.0, rule=number(0, 1))
    alpha_max: float = option(default=1.0, rule=number(0, 1))
    alpha_step: float = option(default=0.1, rule=number(1e-3, 1))
    shared_criterion: str = option(default="max")
    do_blockwise: bool = option(default=False, rule=FLAG)
    auto_alpha_args: Any = option(default=None)
    white_list: Any = option(default="*", rule=LAYERS)

    def problems(self) -> list[str]:
        """Lists, weights that stay float with inputs that do not, and a range of alphas that is empty."""
        lists = super().problems()
        if lists or self.alpha_min <= self.alpha_max:
            return lists or both_or_neither(self)
        return [f"alpha_min={self.alpha_min!r} is above alpha_max={self.alpha_max!r}"]

    def method(self) -> SmoothQuant | None:
        """`SmoothQuant`, or None for ``"fp32"``."""
        faultless(self)
        if self.w_dtype == KEEP:
            return None
        count = int((self.alpha_max - self.alpha_min) / self.alpha_step + 1e-6) + 1
        return SmoothQuant(
            alpha=self.alpha,
            alphas=tuple(min(round(self.alpha_min + step * self.alpha_step, 6), 1.0) for step in range(count)),
            blockwise=self.do_blockwise,
            format="uint8" if self.act_dtype == "uint8" else "int8",
            activation_symmetric=self.act_sym,
            per_channel=self.w_granularity == "per_channel",
            symmetric=self.w_sym,
        )


class DynamicQuantConfig(LayerConfig):
    """Weights in eight bits, and inputs too, on a grid found at each call (`adapterx.quant.dynamic.DynamicInt8`).

    ``act_algo`` says how calibration finds ranges; here nothing is calibrated, and its values mean the same. So do the
    two ``act_dtype``s: a grid that is found anew is symmetric or not, whatever its codes are called.
    """

    name: ClassVar[str] = "pt2e_dynamic_quant"
    priority: ClassVar[int] = 0

    w_dtype: str = option(default="int8", rule=one_of("int8", KEEP))
    w_sym: bool = option(default=True, rule=FLAG)
    w_granularity: str = option(default="per_tensor", rule=_GRANULARITY)
    w_algo: str = option(default="minmax")
    act_dtype: str = option(default="uint8", rule=one_of("uint8", "int8", KEEP))
    act_sym: bool = option(default=False, rule=FLAG)
    act_granularity: str = option(default="per_tensor", rule=one_of("per_tensor", "per_token"))
    act_algo: str = option(default="kl", rule=one_of("kl", "minmax"))
    white_list: Any = option(default="*", rule=LAYERS)

    def problems(self) -> list[str]:
        """Lists, and weights that stay float with inputs that do not."""
        return super().problems() or both_or_neither(self)

    def method(self) -> DynamicInt8 | None:
        """`DynamicInt8`, or None for ``"fp32"``."""
        faultless(self)
        if self.w_dtype == KEEP:
            return None
        return DynamicInt8(
            per_channel=self.w_granularity == "per_channel",
            symmetric=self.w_sym,
            per="token" if self.act_granularity == "per_token" else "tensor",
            activation_symmetric=self.act_sym,
        )


_MX = {
    "int8": "mxint8",
    "int4": "mxint4",
    "int2": "mxint2",
    "fp8_e5m2": "mxfp8_e5m2",
    "fp8_e4m3": "mxfp8_e4m3",
    "fp6_e3m2": "mxfp6_e3m2",
    "fp6_e2m3": "mxfp6_e2m3",
    "fp4": "mxfp4",
}
_FLOATS = ("float32", KEEP)


class MXQuantConfig(LayerConfig):
    """Blocks that share a power of two (`adapterx.quant.mx.MX`). Every linear layer, the head too.

    ``weight_only`` leaves inputs as they are; ``out_dtype`` is what results are rounded to in either case (Neural
    Compressor rounds weights, bias and inputs to it first). With "float32" for weights and inputs a layer stays float.
    """

    name: ClassVar[str] = "mx_quant"
    priority: ClassVar[int] = 0

    w_dtype: str = option(default="int8", rule=one_of(*_MX, *_FLOATS))
    act_dtype: str = option(default="int8", rule=one_of(*_MX, *_FLOATS))
    out_dtype: str = option(default="bfloat16", rule=one_of("bfloat16", "float16", "float32"))
    blocksize: int = option(default=32, rule=integer(1))
    round_method: Literal["nearest", "dither", "floor", "even"] = option(
        default="nearest", rule=one_of("nearest", "dither", "floor", "even")
    )
    weight_only: bool = option(default=False, rule=FLAG)
    white_list: Any = option(default="*", rule=LAYERS)

    def problems(self) -> list[str]:
        """Lists, and float weights with rounded inputs."""
        lists = super().problems()
        if not lists and self.w_dtype in _FLOATS and self.act_dtype not in _FLOATS and not self.weight_only:
            return [f"w_dtype={self.w_dtype!r} with act_dtype={self.act_dtype!r} is not implemented"]
        return lists

    def method(self) -> MX | None:
        """`MX`, or None for float weights."""
        faultless(self)
        if self.w_dtype in _FLOATS:
            return None
        rounds_inputs = not self.weight_only and self.act_dtype not in _FLOATS
        return MX(
            _MX[self.w_dtype],
            _MX[self.act_dtype] if rounds_inputs else None,
            block=self.blocksize,
            rounding=self.round_method,
            output=_OUTPUTS[self.out_dtype],
        )


_FP8_TYPES = ("Linear", "Conv1D")
_SCALING: dict[str, Literal["arbitrary", "power_of_two", "unit"]] = {
    "maxabs_hw": "arbitrary",
    "maxabs_arbitrary": "arbitrary",
    "maxabs_pow2": "power_of_two",
    "unit_scale": "unit",
}
_LISTS = Rule(
    lambda v: (
        isinstance(v, dict) and set(v) <= {"names", "types"} and all(isinstance(n, str) for n in v.get("names", ()))
    ),
    "a dict of 'names' and 'types'",
    listed=True,
)


class FP8Config(LayerConfig):
    """Weights and inputs as E4M3 or E5M2 (`adapterx.quant.float8.Float8`).

    ``scale_method="maxabs_hw"`` is the scales that the hardware has: CPUs and GPUs have all, so it is
    "maxabs_arbitrary". ``blocklist`` and ``allowlist`` are parts of names, and names of classes. Quantize and
    dequantize are always both there (``use_qdq``, ``fake_quant``, ``scale_format`` change nothing), and what is
    measured is kept in memory. Ours besides: ``activation``, where "tensor" and "token" need no calibration.
    """

    name: ClassVar[str] = "fp8_quant"
    priority: ClassVar[int] = 0

    dump_stats_path: str = option(default="./hqt_output/measure")
    fp8_config: str = option(default="E4M3", rule=one_of("E4M3", "E5M2"))
    hp_dtype: str = option(default="bf16", rule=one_of("bf16", "fp16", "fp32"))
    blocklist: Any = option(default={"names": [], "types": ()}, rule=_LISTS)
    allowlist: Any = option(default={"names": [], "types": _FP8_TYPES}, rule=_LISTS)
    mode: str = option(default="AUTO")
    scale_method: str = option(default="maxabs_hw", rule=one_of(*_SCALING))
    scale_params: Any = option(default={})
    observer: str = option(default="maxabs")
    mod_dict: Any = option(default={})
    measure_exclude: str = option(default="OUTPUT")
    fake_quant: bool = option(default=False, rule=ANY)
    use_qdq: bool = option(default=False, rule=ANY)
    scale_format: str = option(default="scalar", rule=ANY)
    measure_on_hpu: bool = option(default=True, rule=ANY)
    white_list: Any = option(default="*", rule=LAYERS)
    activation: Literal["static", "tensor", "token"] | None = option(
        default="static", rule=one_of("static", "tensor", "token", None)
    )

    def leaves(self, name: str, module: nn.Module) -> bool:
        """Whether the block list or the allow list keeps the module in float."""
        kind = type(module).__name__
        blocked = any(part in name for part in self.blocklist.get("names", ())) or kind in _names(self.blocklist)
        allowed = self.allowlist.get("names", ())
        return blocked or (bool(allowed) and not any(p in name for p in allowed)) or kind not in _names(self.allowlist)

    def method(self) -> Float8:
        """`Float8`."""
        faultless(self)
        return Float8(
            "float8_e4m3fn" if self.fp8_config == "E4M3" else "float8_e5m2",
            activation=self.activation,
            scaling=_SCALING[self.scale_method],
            output=_OUTPUTS[self.hp_dtype],
        )


def _names(lists: dict[str, Any]) -> list[str]:
    types = lists.get("types", _FP8_TYPES)
    return [kind if isinstance(kind, str) else kind.__name__ for kind in types]


class MixedPrecisionConfig(LayerConfig):
    """Linear layers and convolutions in half (`adapterx.quant.mixed_precision.HalfPrecision`)."""

    name: ClassVar[str] = "mixed_precision"
    priority: ClassVar[int] = 0

    dtype: str = option(default="fp16", rule=one_of(*_HALVES, KEEP))
    white_list: Any = option(default="*", rule=LAYERS)

    def takes(self, module: nn.Module) -> bool:
        """Linear layers, and convolutions of one to three dimensions."""
        return takes_half(module)

    def method(self) -> HalfPrecision | None:
        """`HalfPrecision`, or None for "fp32"."""
        faultless(self)
        return None if self.dtype == KEEP else HalfPrecision(_HALVES[self.dtype])


class StaticQuantConfig:
    """`INT8StaticQuantConfig`, or with ``fp8_config`` an `FP8Config`: never an object of its own."""

    def __new__(cls, *args: Any, **fields: Any) -> INT8StaticQuantConfig | FP8Config:  # type: ignore[misc]
        """The config that the fields belong to."""
        return (FP8Config if "fp8_config" in fields else INT8StaticQuantConfig)(*args, **fields)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> INT8StaticQuantConfig | FP8Config:
        """The same, from a dict."""
        fields = config_dict.get("global", config_dict)
        return (FP8Config if "fp8_config" in fields else INT8StaticQuantConfig).from_dict(config_dict)
