"""Configs of the methods that search or learn: AWQ, TEQ, AutoRound. Fields and defaults are Neural Compressor's."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from adapterx.quant.autoround import AutoRound
from adapterx.quant.config_fields import ANY, FLAG, LAYERS, Rule, integer, number, one_of, option
from adapterx.quant.layer_config import LayerConfig
from adapterx.quant.scheme import Scheme
from adapterx.quant.weight_configs import KEEP, faultless

_MAP = Rule(lambda v: isinstance(v, dict), "a dict", listed=True)
_WEIGHT_ONLY = re.compile(r"W([2348])A16(?:G(\d+))?")
_SCHEME = Rule(
    lambda v: isinstance(v, str) and _WEIGHT_ONLY.fullmatch(v) is not None, "'W4A16', 'W2A16G64' and the like"
)


class AutoRoundConfig(LayerConfig):
    """AutoRound (`adapterx.quant.autoround.AutoRound`).

    ``scheme`` says what ``bits``, ``group_size`` and ``use_sym`` are where they are None. The data are what the user's
    loop shows, whatever ``nsamples``, ``seqlen`` and ``sampler`` say; scales are always float32.
    """

    name: ClassVar[str] = "autoround"
    priority: ClassVar[int] = 50

    bits: int | None = option(None, integer(1, 8, also=[None]))
    group_size: int | None = option(None, integer(1, also=[-1, None]))
    use_sym: bool | None = option(None, one_of(True, False, None))
    dtype: str | None = option(None, one_of(None, "int", KEEP))
    act_bits: int | None = option(None, one_of(None, 16, 32))
    act_group_size: int | None = option(None)
    act_sym: bool | None = option(None)
    act_dtype: str | None = option(None)
    act_dynamic: bool | None = option(None)
    super_bits: int | None = option(None)
    super_group_size: int | None = option(None)
    enable_full_range: bool = option(False, FLAG)
    batch_size: int = option(8, integer(1))
    amp: bool = option(True, ANY)
    lr_scheduler: Any = option(None)
    enable_quanted_input: bool = option(True)
    enable_minmax_tuning: bool = option(True, FLAG)
    lr: float | None = option(None, number(0, 1e3, also=[None]))
    minmax_lr: float | None = option(None, number(0, 1e3, also=[None]))
    low_gpu_mem_usage: bool = option(False, ANY)
    iters: int = option(200, integer(0))
    seqlen: int = option(2048, ANY)
    nsamples: int = option(128, ANY)
    sampler: str = option("rand", ANY)
    seed: int = option(42, integer(0))
    nblocks: int = option(1)
    gradient_accumulate_steps: int = option(1, integer(1))
    not_use_best_mse: bool = option(False)
    dynamic_max_gap: int = option(-1)
    scale_dtype: str = option("fp16", one_of("fp16", "bf16", "fp32"))
    use_layer_wise: bool = option(True, ANY)
    to_quant_block_names: Any = option(None)
    export_format: str = option("auto_round")
    enable_norm_bias_tuning: bool = option(False)
    enable_torch_compile: bool = option(False, ANY)
    scheme: str = option("W4A16", _SCHEME)
    device_map: Any = option(0, ANY)
    quant_nontext_module: bool = option(False)
    extra_data_dir: Any = option(None)
    processor: Any = option(None)
    image_processor: Any = option(None)
    template: Any = option(None)
    truncation: bool = option(False)
    quant_lm_head: bool = option(False, FLAG)
    enable_adam: bool = option(False)
    target_bits: Any = option(None)
    options: Any = option(("MXFP4", "MXFP8"))
    shared_layers: Any = option(None)
    ignore_scale_zp_bits: bool = option(False)
    auto_scheme_method: str = option("default")
    auto_scheme_device_map: Any = option(None)
    auto_scheme_batch_size: Any = option(None)
    output_dir: str = option("./tmp_auto_round")
    white_list: Any = option("*", LAYERS)

    def method(self) -> AutoRound | None:
        """`AutoRound`, or None for ``dtype="fp32"``."""
        faultless(self)
        if self.dtype == KEEP:
            return None
        found = _WEIGHT_ONLY.fullmatch(self.scheme)
        assert found is not None, "the field's rule holds"
        scheme = Scheme(
            bits=int(found[1]) if self.bits is None else self.bits,
            group_size=int(found[2] or 128) if self.group_size is None else self.group_size,
            symmetric=self.use_sym is not False,
            full_range=self.enable_full_range,
        )
        return AutoRound(
            scheme,
            iters=self.iters,
            lr=self.lr,
            minmax_lr=self.minmax_lr,
            batch_size=self.batch_size * self.gradient_accumulate_steps,
            tune_ranges=self.enable_minmax_tuning,
            seed=self.seed,
        )
