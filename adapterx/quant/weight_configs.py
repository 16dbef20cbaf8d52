"""Configs of the methods that quantize weights only. Fields and defaults are Neural Compressor's."""

from __future__ import annotations

from typing import Any, ClassVar

from adapterx.errors import OptionError
from adapterx.quant.codebook import FORMATS
from adapterx.quant.config_fields import ANY, FLAG, LAYERS, Rule, integer, number, one_of, option
from adapterx.quant.gptq import GPTQ
from adapterx.quant.hqq import HQQ
from adapterx.quant.layer_config import LayerConfig
from adapterx.quant.rtn import RTN
from adapterx.quant.scheme import DoubleScheme, Scheme

KEEP = "fp32"
_INTEGERS = ("int", *(f"int{bits}" for bits in range(2, 9)))
_TABLES = {"fp4_e2m1_bnb": "fp4", **{name: name for name in FORMATS}}
_TABLES |= {name.replace("float8", "fp8"): name for name in FORMATS if name.startswith("float8")}

BITS = integer(1, 8)
GROUP = integer(1, also=[-1])
INT = one_of(*_INTEGERS, KEEP)
DTYPE = one_of(*_INTEGERS, *_TABLES, KEEP)
# Weights are read from the model that is given, never from a checkpoint: it may hold a merged adapter.
NO_PATH = Rule(lambda v: v == "", "'': the weights in memory are what is quantized")


def scheme_of(config: Any) -> Scheme | None:
    """The scheme that the fields ask for; None for ``dtype="fp32"``. A dtype with a width of its own decides ``bits``.

    Raises:
        OptionError: fields that contradict each other
    """
    faultless(config)
    if config.dtype == KEEP:
        return None
    integers = config.dtype in _INTEGERS
    double = getattr(config, "use_double_quant", False)
    return Scheme(
        bits=int(config.dtype[3:] or config.bits) if integers else 4,
        group_size=config.group_size,
        symmetric=getattr(config, "use_sym", not integers),
        format="int" if integers else _TABLES[config.dtype],
        full_range=getattr(config, "use_full_range", False),
        mse=getattr(config, "use_mse_search", False),
        double=DoubleScheme(
            bits=config.double_quant_bits,
            group_size=config.double_quant_group_size,
            symmetric=config.double_quant_use_sym,
        )
        if double
        else None,
    )


def faultless(config: LayerConfig) -> None:
    """See to it that the fields of ``config`` go together.

    Raises:
        OptionError: all that do not
    """
    faults = config.problems()
    if faults:
        raise OptionError(f"{type(config).__name__}: " + "; ".join(faults))


def range_problems(config: Any) -> list[str]:
    """Fields about the range of integers that would mean nothing."""
    if not config.use_full_range or config.dtype == KEEP or isinstance(config.dtype, list):
        return []
    if config.dtype not in _INTEGERS:
        return [f"use_full_range=True means nothing for dtype={config.dtype!r}"]
    return [] if config.use_sym else ["use_full_range=True needs use_sym=True: an asymmetric range is always full"]


class RTNConfig(LayerConfig):
    """Round to nearest (`adapterx.quant.rtn.RTN`)."""

    name: ClassVar[str] = "rtn"
    priority: ClassVar[int] = 80

    dtype: str = option(default="int", rule=DTYPE)
    bits: int = option(default=4, rule=BITS)
    use_sym: bool = option(default=True, rule=FLAG)
    group_size: int = option(default=32, rule=GROUP)
    group_dim: int = option(default=1)
    use_full_range: bool = option(default=False, rule=FLAG)
    use_mse_search: bool = option(default=False, rule=FLAG)
    use_layer_wise: bool = option(default=True, rule=ANY)
    model_path: str = option(default="", rule=NO_PATH)
    use_double_quant: bool = option(default=False, rule=FLAG)
    double_quant_dtype: str = option(default="int")
    double_quant_bits: int = option(default=8, rule=integer(2, 8))
    double_quant_use_sym: bool = option(default=False, rule=FLAG)
    double_quant_group_size: int = option(default=256, rule=integer(1))
    quant_lm_head: bool = option(default=False, rule=FLAG)
    white_list: Any = option(default="*", rule=LAYERS)

    def problems(self) -> list[str]:
        """Lists, and a full range of what has none."""
        return super().problems() + range_problems(self)

    def method(self) -> RTN | None:
        """`RTN`, or None for ``dtype="fp32"``."""
        scheme = scheme_of(self)
        return None if scheme is None else RTN(scheme)


class GPTQConfig(LayerConfig):
    """GPTQ (`adapterx.quant.gptq.GPTQ`)."""

    name: ClassVar[str] = "gptq"
    priority: ClassVar[int] = 90

    dtype: str = option(default="int", rule=DTYPE)
    bits: int = option(default=4, rule=BITS)
    use_sym: bool = option(default=True, rule=FLAG)
    group_size: int = option(default=32, rule=GROUP)
    use_mse_search: bool = option(default=False, rule=FLAG)
    use_layer_wise: bool = option(default=False, rule=ANY)
    use_block_wise: bool = option(default=False, rule=ANY)
    model_path: str = option(default="", rule=NO_PATH)
    use_double_quant: bool = option(default=False, rule=FLAG)
    double_quant_dtype: str = option(default="int")
    double_quant_bits: int = option(default=8, rule=integer(2, 8))
    double_quant_use_sym: bool = option(default=False, rule=FLAG)
    double_quant_group_size: int = option(default=256, rule=integer(1))
    act_order: bool = option(default=False, rule=FLAG)
    hybrid_order: bool = option(default=False, rule=FLAG)
    fp8_aware: bool = option(default=False)
    percdamp: float = option(default=0.01, rule=number(1e-9, 1e9))
    block_size: int = option(default=2048, rule=integer(1))
    static_groups: bool = option(default=False, rule=FLAG)
    true_sequential: bool = option(default=False, rule=FLAG)
    quant_lm_head: bool = option(default=False, rule=FLAG)
    white_list: Any = option(default="*", rule=LAYERS)

    def method(self) -> GPTQ | None:
        """`GPTQ`, or None for ``dtype="fp32"``."""
        scheme = scheme_of(self)
        if scheme is None:
            return None
        return GPTQ(
            scheme,
            act_order=self.act_order,
            static_groups=self.static_groups,
            hybrid_order=self.hybrid_order,
            true_sequential=self.true_sequential,
            percdamp=self.percdamp,
            block_size=self.block_size,
        )


class HQQConfig(LayerConfig):
    """HQQ (`adapterx.quant.hqq.HQQ`). Zero points are float, or with ``quant_zero`` of 256 values a layer."""

    name: ClassVar[str] = "hqq"
    priority: ClassVar[int] = 75

    dtype: str = option(default="int", rule=INT)
    bits: int = option(default=4, rule=BITS)
    group_size: int = option(default=64, rule=GROUP)
    quant_zero: bool = option(default=True, rule=FLAG)
    quant_scale: bool = option(default=False, rule=FLAG)
    scale_quant_group_size: int = option(default=128, rule=integer(1))
    quant_lm_head: bool = option(default=False, rule=FLAG)
    white_list: Any = option(default="*", rule=LAYERS)

    def method(self) -> HQQ | None:
        """`HQQ`, or None for ``dtype="fp32"``."""
        scheme = scheme_of(self)
        if scheme is None:
            return None
        return HQQ(
            scheme,
            quant_zero=self.quant_zero,
            quant_scale=self.quant_scale,
            scale_group=self.scale_quant_group_size,
        )
