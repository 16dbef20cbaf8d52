"""What quantizers append to the names of the nodes and tensors that they put in the place of others."""

from __future__ import annotations

import re

# onnxruntime.quantization writes: quantize_dynamic and quantize_static `_quantized`, `_scale`, `_zero_point`, `_quant`
# and `_DequantizeLinear`; the block-wise quantizers `_Q4`, `_DQ_Q4`, `_scales`, `_zero_points`, `_matmul_Q4`, and with
# other algorithms `_Q4G32`, `_scale`, `_zp`; that of bitsandbytes' types `_Bnb4` and `_absmax`.
_SUFFIX = re.compile(
    r"(?:_Transposed)?(?:_DQ)?_(?:(?:matmul_)?Q\d+(?:G-?\d+)?(?:_output(?:_transposed)?)?|quant(?:ized)?"
    r"|(?:De)?[qQ]uantizeLinear(?:_Output)?|scales?|zero_points?|zp|Bnb4|absmax)$"
)


def unquantized(name: str) -> str:
    """``name`` as it was before a quantizer took what bore it apart.

    Example:
        >>> unquantized("fc.lora_A.weight_Q4"), unquantized("/fc/lora_A/MatMul_quant"), unquantized("fc.weight")
        ('fc.lora_A.weight', '/fc/lora_A/MatMul', 'fc.weight')
    """
    return _SUFFIX.sub("", name)
