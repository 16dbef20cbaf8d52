"""Configs of the methods that search or learn: AWQ, TEQ, AutoRound. Fields and defaults are Neural Compressor's."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from adapterx.quant.autoround import AutoRound
from adapterx.quant.awq import AWQ
from adapterx.quant.config_fields import ANY, FLAG, LAYERS, Rule, integer, number, one_of, option
from adapterx.quant.layer_config import LayerConfig
from adapterx.quant.scheme import Scheme
from adapterx.quant.teq import TEQ
from adapterx.quant.weight_configs import BITS, DTYPE, GROUP, INT, KEEP, NO_PATH, faultless, range_problems, scheme_of

_MAP = Rule(
    lambda v: isinstance(v, dict) and all(isinstance(names, list | tuple) for names in v.values()),
    "a dict of names, {producer: [consumers]}",
    listed=True,
)
_WEIGHT_ONLY = re.compile(r"W([2348])A16(?:G(\d+))?")
_SCHEME = Rule(
    lambda v: isinstance(v, str) and _WEIGHT_ONLY.fullmatch(v) is not None, "'W4A16', 'W2A16G64' and the like"
)


class AWQConfig(LayerConfig):
    """AWQ (`adapterx.quant.awq.AWQ`).

    ``absorb_layer_dict`` is ``{producer: [consumers]}`` for ``folding``; what it does not name is looked for.
    """

    name: ClassVar[str] = "awq"
    priority: ClassVar[int] = 70

    dtype: str = option(default="int", rule=DTYPE)
    bits: int = option(default=4, rule=BITS)
    use_sym: bool = option(default=True, rule=FLAG)
    group_size: int = option(default=32, rule=GROUP)
    group_dim: int = option(default=1)
    use_full_range: bool = option(default=False, rule=FLAG)
    use_mse_search: bool = option(default=False, rule=FLAG)
    use_layer_wise: bool = option(default=False, rule=ANY)
    model_path: str = option(default="", rule=NO_PATH)
    use_double_quant: bool = option(default=False, rule=FLAG)
    double_quant_dtype: str = option(default="int")
    double_quant_bits: int = option(default=8, rule=integer(2, 8))
    double_quant_use_sym: bool = option(default=True, rule=FLAG)
    double_quant_group_size: int = option(default=256, rule=integer(1))
    quant_lm_head: bool = option(default=False, rule=FLAG)
    use_auto_scale: bool = option(default=True, rule=FLAG)
    use_auto_clip: bool = option(default=True, rule=FLAG)
    folding: bool = option(default=False, rule=FLAG)
    absorb_layer_dict: Any = option(default={}, rule=_MAP)
    white_list: Any = option(default="*", rule=LAYERS)

    def problems(self) -> list[str]:
        """Lists, a full range of what has none, and producers without folding."""
        unused = ["absorb_layer_dict needs folding=True"] if self.absorb_layer_dict and self.folding is False else []
        return super().problems() + range_problems(self) + unused

    def method(self) -> AWQ | None:
        """`AWQ`, or None for ``dtype="fp32"``."""
        scheme = scheme_of(self)
        if scheme is None:
            return None
        return AWQ(
            scheme,
            auto_scale=self.use_auto_scale,
            auto_clip=self.use_auto_clip,
            folding=self.folding,
            absorb=self.absorb_layer_dict,
        )


class TEQConfig(LayerConfig):
    """TEQ (`adapterx.quant.teq.TEQ`).

    Scales are learnt block by block from what the user's loop shows, so no training loop is needed. They stay in front
    of their layers: ``folding`` is False by default, unlike in Neural Compressor, so that adapters see the same inputs.
    With ``absorb_to_layer``, ``{producer: [consumers]}``, only these consumers get a scale.
    """

    name: ClassVar[str] = "teq"
    priority: ClassVar[int] = 60

    dtype: str = option(default="int", rule=INT)
    bits: int = option(default=4, rule=BITS)
    use_sym: bool = option(default=True, rule=FLAG)
    group_size: int = option(default=32, rule=GROUP)
    group_dim: int = option(default=1)
    use_full_range: bool = option(default=False, rule=FLAG)
    use_mse_search: bool = option(default=False)
    use_layer_wise: bool = option(default=False, rule=ANY)
    use_double_quant: bool = option(default=False, rule=FLAG)
    double_quant_dtype: str = option(default="int")
    double_quant_bits: int = option(default=8, rule=integer(2, 8))
    double_quant_use_sym: bool = option(default=True, rule=FLAG)
    double_quant_group_size: int = option(default=256, rule=integer(1))
    quant_lm_head: bool = option(default=False, rule=FLAG)
    absorb_to_layer: Any = option(default={}, rule=_MAP)
    folding: bool = option(default=False, rule=FLAG)
    white_list: Any = option(default="*", rule=LAYERS)

    def problems(self) -> list[str]:
        """Lists, and a full range of what has none."""
        return super().problems() + range_problems(self)

    def method(self) -> TEQ | None:
        """`TEQ`, or None for ``dtype="fp32"``."""
        scheme = scheme_of(self)
        return None if scheme is None else TEQ(scheme, folding=self.folding, absorb=self.absorb_to_layer)


class AutoRoundConfig(LayerConfig):
    """AutoRound (`adapterx.quant.autoround.AutoRound`).

    ``scheme`` says what ``bits``, ``group_size`` and ``use_sym`` are where they are None. The data are what the user's
    loop shows, whatever ``nsamples``, ``seqlen`` and ``sampler`` say; scales are always float32.
    """

    name: ClassVar[str] = "autoround"
    priority: ClassVar[int] = 50

    bits: int | None = option(default=None, rule=integer(1, 8, also=[None]))
    group_size: int | None = option(default=None, rule=integer(1, also=[-1, None]))
    use_sym: bool | None = option(default=None, rule=one_of(True, False, None))
    dtype: str | None = option(default=None, rule=one_of(None, "int", KEEP))
    act_bits: int | None = option(default=None, rule=one_of(None, 16, 32))
    act_group_size: int | None = option(default=None)
    act_sym: bool | None = option(default=None)
    act_dtype: str | None = option(default=None)
    act_dynamic: bool | None = option(default=None)
    super_bits: int | None = option(default=None)
    super_group_size: int | None = option(default=None)
    enable_full_range: bool = option(default=False, rule=FLAG)
    batch_size: int = option(default=8, rule=integer(1))
    amp: bool = option(default=True, rule=ANY)
    lr_scheduler: Any = option(default=None)
    enable_quanted_input: bool = option(default=True)
    enable_minmax_tuning: bool = option(default=True, rule=FLAG)
    lr: float | None = option(default=None, rule=number(0, 1e3, also=[None]))
    minmax_lr: float | None = option(default=None, rule=number(0, 1e3, also=[None]))
    low_gpu_mem_usage: bool = option(default=False, rule=ANY)
    iters: int = option(default=200, rule=integer(0))
    seqlen: int = option(default=2048, rule=ANY)
    nsamples: int = option(default=128, rule=ANY)
    sampler: str = option(default="rand", rule=ANY)
    seed: int = option(default=42, rule=integer(0))
    nblocks: int = option(default=1)
    gradient_accumulate_steps: int = option(default=1, rule=integer(1))
    not_use_best_mse: bool = option(default=False)
    dynamic_max_gap: int = option(default=-1)
    scale_dtype: str = option(default="fp16", rule=one_of("fp16", "bf16", "fp32"))
    use_layer_wise: bool = option(default=True, rule=ANY)
    to_quant_block_names: Any = option(default=None)
    export_format: str = option(default="auto_round")
    enable_norm_bias_tuning: bool = option(default=False)
    enable_torch_compile: bool = option(default=False, rule=ANY)
    scheme: str = option(default="W4A16", rule=_SCHEME)
    device_map: Any = option(default=0, rule=ANY)
    quant_nontext_module: bool = option(default=False)
    extra_data_dir: Any = option(default=None)
    processor: Any = option(default=None)
    image_processor: Any = option(default=None)
    template: Any = option(default=None)
    truncation: bool = option(default=False)
    quant_lm_head: bool = option(default=False, rule=FLAG)
    enable_adam: bool = option(default=False)
    target_bits: Any = option(default=None)
    options: Any = option(default=("MXFP4", "MXFP8"))
    shared_layers: Any = option(default=None)
    ignore_scale_zp_bits: bool = option(default=False)
    auto_scheme_method: str = option(default="default")
    auto_scheme_device_map: Any = option(default=None)
    auto_scheme_batch_size: Any = option(default=None)
    output_dir: str = option(default="./tmp_auto_round")
    white_list: Any = option(default="*", rule=LAYERS)

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
