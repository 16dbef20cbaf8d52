"""auto-round checkpoints (Cheng et al., arXiv 2309.05516): GPTQ's or AWQ's tensors under a config of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterx.errors import UnsupportedQuantization
from adapterx.quant.interop.awq import read_awq
from adapterx.quant.interop.gptq import InputsOf, gptq_layers
from adapterx.quant.interop.source import Source, Tensors


def read_auto_round(files: Tensors, config: Mapping[str, Any], inputs_of: InputsOf) -> Source:
    """The layers of an auto-round checkpoint, by its ``packing_format``.

    "auto_round" is GPTQ's packing with zero points as they are, "auto_round:auto_gptq" with zero points less one, and
    "auto_round:auto_awq" is AWQ's. Layers that ``extra_config`` leaves at 16 bits are floats.

    Raises:
        FormatError: tensors that do not belong together
        UnsupportedQuantization: another packing, another data type than integers, or quantized activations
    """
    form = config.get("packing_format", config.get("backend"))
    kind, act_bits = config.get("data_type", "int"), config.get("act_bits", 16)
    if kind not in ("int", "int_sym", "int_asym", "int_asym_dq"):
        raise UnsupportedQuantization(f"{files.folder}: auto-round's data_type={kind!r:.40}; integers can be held")
    if act_bits is not None and not (type(act_bits) is int and act_bits >= 16):
        raise UnsupportedQuantization(f"{files.folder}: auto-round's act_bits={act_bits!r:.40}; 16 can be held")
    match str(form).removeprefix("auto_round:"):
        case "auto_round":
            return gptq_layers(files, config, inputs_of, stores_zero_less_one=False)
        case "auto_gptq" | "gptq":
            return gptq_layers(files, config, inputs_of, stores_zero_less_one=True)
        case "auto_awq" | "awq":
            return read_awq(files, {"bits": config.get("bits", 4)})
    raise UnsupportedQuantization(
        f"{files.folder}: auto-round's packing_format={form!r:.60}; auto_round, auto_round:auto_gptq and "
        "auto_round:auto_awq can be held"
    )
