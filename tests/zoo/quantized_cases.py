"""Cases of quantized graphs, made from float ones: the base alone quantized, or the adapter too. Data only."""

from __future__ import annotations

from tests.zoo.case import Case

TOO = (("adapter_too", True),)
ROUNDED = 2e-2
OWN_BASE = "base.onnx is the genai builder's own int4 file, in which q, k and v are one product"

QUANTIZED = (
    Case("ts_llama_int4", source="ts_llama", quantized="int4", with_base=True),
    Case("ts_llama_int4_all", source="ts_llama", quantized="int4", options=TOO),
    Case("ts_llama_int4_asymmetric", source="ts_llama", quantized="int4_asymmetric", with_base=True),
    Case("ts_llama_int4_asymmetric_all", source="ts_llama", quantized="int4_asymmetric", options=TOO),
    Case("ts_llama_int4_level_4", source="ts_llama", quantized="int4_level_4", atol=ROUNDED, with_base=True),
    Case("ts_llama_int4_gather", source="ts_llama", quantized="int4_gather", with_base=True),
    Case("ts_llama_int4_qdq", source="ts_llama", quantized="int4_qdq", atol=ROUNDED, with_base=True),
    Case("ts_llama_int4_qdq_all", source="ts_llama", quantized="int4_qdq", atol=ROUNDED, options=TOO),
    Case("ts_bert_int8_dynamic", source="ts_bert", quantized="int8_dynamic", atol=ROUNDED, with_base=True),
    Case("ts_bert_int8_dynamic_all", source="ts_bert", quantized="int8_dynamic", atol=ROUNDED, options=TOO),
    Case("ts_bert_int8_static", source="ts_bert", quantized="int8_static", atol=ROUNDED),
    Case("ts_bert_int8_static_all", source="ts_bert", quantized="int8_static", atol=ROUNDED, options=TOO),
    Case("dy_normed_int4", source="dy_normed", quantized="int4", with_base=True),
    Case("dy_normed_int4_all", source="dy_normed", quantized="int4", options=TOO, needs_adapter=True),
    Case("dy_normed_int4_qdq", source="dy_normed", quantized="int4_qdq", atol=ROUNDED, needs_adapter=True),
    Case("dy_normed_int8_dynamic", source="dy_normed", quantized="int8_dynamic", atol=ROUNDED),
    Case("dy_normed_int8_dynamic_all", source="dy_normed", quantized="int8_dynamic", atol=ROUNDED, options=TOO),
    Case("ts_mlp_int8_dynamic_all", source="ts_mlp", quantized="int8_dynamic", atol=ROUNDED, options=TOO),
    Case("genai_llama_int4_all", source="genai_llama", quantized="int4_level_4", export="genai", atol=ROUNDED,
         options=TOO),
    Case("genai_llama_int4", source="genai_llama", quantized="int4_level_4", export="genai", atol=ROUNDED,
         with_base=True, note=OWN_BASE),
    Case("genai_phi3_int4", source="genai_phi3", quantized="int4_level_4", export="genai", atol=ROUNDED,
         with_base=True, note=OWN_BASE),
)  # fmt: skip
