"""Configs of the methods that quantize weights only. Fields and defaults are Neural Compressor's."""

from __future__ import annotations

from typing import Any, ClassVar

from adapterx.errors import OptionError
from adapterx.quant.codebook import FORMATS
from adapterx.quant.config_fields import ANY, FLAG, LAYERS, Rule, integer, one_of, option
from adapterx.quant.layer_config import LayerConfig
from adapterx.quant.rtn import RTN
from adapterx.quant.scheme import DoubleScheme, Scheme

KEEP = "fp32"
_INTEGERS = ("int", *(f"int{bits}" for bits in range(2, 9)))
_TABLES = {"fp4_e2m1_bnb": "fp4", **{name: name for name in FORMATS}}
_TABLES |= {name.replace("float8", "fp8"): name for name in FORMATS if name.startswith("float8")}

_BITS = integer(1, 8)
_GROUP = integer(1, also=[-1])
_INT = one_of(*_INTEGERS, KEEP)
_ANY_DTYPE = one_of(*_INTEGERS, *_TABLES, KEEP)
# Weights are read from the model that is given, never from a checkpoint: it may hold a merged adapter.
_NO_PATH = Rule(lambda v: v == "", "'': the weights in memory are what is quantized")
_MAP = Rule(lambda v: isinstance(v, dict), "a dict of a producer's name and those of its consumers", listed=True)


def scheme_of(config: Any) -> Scheme | None:
    """The scheme that the fields ask for; None for ``dtype="fp32"``. A dtype with a width of its own decides ``bits``.

    Raises:
        OptionError: fields that contradict each other
    """
    faults = config.problems()
    if faults:
        raise OptionError(f"{type(config).__name__}: " + "; ".join(faults))
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

    dtype: str = option("int", _ANY_DTYPE)
    bits: int = option(4, _BITS)
    use_sym: bool = option(True, FLAG)
    group_size: int = option(32, _GROUP)
    group_dim: int = option(1)
    use_full_range: bool = option(False, FLAG)
    use_mse_search: bool = option(False, FLAG)
    use_layer_wise: bool = option(True, ANY)
    model_path: str = option("", _NO_PATH)
    use_double_quant: bool = option(False, FLAG)
    double_quant_dtype: str = option("int")
    double_quant_bits: int = option(8, integer(2, 8))
    double_quant_use_sym: bool = option(False, FLAG)
    double_quant_group_size: int = option(256, integer(1))
    quant_lm_head: bool = option(False, FLAG)
    white_list: Any = option("*", LAYERS)

    def problems(self) -> list[str]:
        """Lists, and a full range of what has none."""
        return super().problems() + range_problems(self)

    def method(self) -> RTN | None:
        """`RTN`, or None for ``dtype="fp32"``."""
        scheme = scheme_of(self)
        return None if scheme is None else RTN(scheme)
