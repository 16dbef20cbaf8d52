"""The table of cases: data only."""

from __future__ import annotations

from tests.zoo.case import Case, Lora
from tests.zoo.kind_cases import KINDS
from tests.zoo.quantized_cases import QUANTIZED

LLAMA_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA_SOME = ("q_proj", "v_proj", "down_proj")
GPT2 = ("c_attn", "c_proj", "c_fc")
MLP = ("fc1", "fc2", "head")
DROPOUT = (("lora_dropout", 0.1),)
PATTERNS = (("rank_pattern", {"v_proj": 6, "layers.1.mlp.down_proj": 2}), ("alpha_pattern", {"q_proj": 12}))
HALF, BRAIN = 2e-2, 0.15
TWO = "a is both at once; default and style are each alone"
REPEATED = "one module, two places in the graph"

BERT = ("query", "value", "output.dense")
SOME = Lora(LLAMA_SOME)

LLAMA_TORCHSCRIPT = (
    Case("ts_llama", "llama", Lora(LLAMA_ALL), with_base=True),
    Case("ts_llama_no_folding", "llama", SOME, options=(("do_constant_folding", False),)),
    Case("ts_llama_initializers_as_inputs", "llama", SOME, options=(("keep_initializers_as_inputs", True),)),
    Case("ts_llama_ort_basic", source="ts_llama", post=("ort_basic",)),
    Case("ts_llama_ort_extended", source="ts_llama", post=("ort_extended",)),
    Case("ts_llama_no_folding_ort_extended", source="ts_llama_no_folding", post=("ort_extended",)),
    Case("ts_llama_onnxscript", source="ts_llama", post=("onnxscript_optimize",)),
    Case("ts_llama_zero_b", "llama", Lora(LLAMA_ALL, zero_b=True)),
    Case("ts_llama_zero_b_ort_basic", source="ts_llama_zero_b", post=("ort_basic",)),
    Case("ts_llama_task_type", "llama", Lora(LLAMA_SOME, task_type="CAUSAL_LM")),
    Case("ts_llama_bare", "llama", SOME, wrap=""),
    Case("ts_llama_bare_task_type", "llama", Lora(LLAMA_SOME, task_type="CAUSAL_LM"), wrap=""),
    Case("ts_llama_nested", "llama", SOME, wrap="net.inner"),
    Case("ts_llama_style", "llama", Lora(LLAMA_SOME, name="style")),
    Case("ts_llama_v_1", "llama", Lora(LLAMA_SOME, name="v_1"), note="scopes are v_1 and v_1_1"),
    Case("ts_llama_two_active", "llama", Lora(LLAMA_SOME, also=("style",)), note=TWO),
    Case("ts_llama_dropout", "llama", Lora(LLAMA_SOME, extra=DROPOUT), options=(("training", True),)),
    Case("ts_llama_unit_scale", "llama", Lora(LLAMA_SOME, alpha=4)),
    Case("ts_llama_rslora", "llama", Lora(LLAMA_SOME, extra=(("use_rslora", True),))),
    Case("ts_llama_patterns", "llama", Lora(LLAMA_SOME, extra=PATTERNS, extra_c=())),
    Case("ts_llama_lm_head", "llama_tied", Lora(("q_proj", "lm_head")), note="embedding tied to lm_head"),
    Case("ts_llama_half", "llama", Lora(LLAMA_SOME, half=True), dtype="float16", atol=HALF),
    Case("ts_llama_half_base", "llama", SOME, dtype="float16", atol=HALF),
    Case("ts_llama_half_base_ort_basic", source="ts_llama_half_base", post=("ort_basic",), atol=HALF),
    Case("ts_llama_rank_1", "llama", Lora(LLAMA_SOME, r=1, alpha=2)),
    Case("ts_phi3", "phi3", Lora(("qkv_proj", "o_proj", "gate_up_proj")), with_base=True),
)

LLAMA_DYNAMO = (
    Case("dy_llama", "llama", Lora(LLAMA_ALL), "dynamo", with_base=True),
    Case("dy_llama_unoptimized", "llama_short", SOME, "dynamo", options=(("optimize", False),)),
    Case("dy_llama_external", "llama_short", SOME, "dynamo", options=(("external_data", True),)),
    Case("dy_llama_stripped", source="dy_llama", post=("strip_metadata",), needs_adapter=True),
    Case("dy_llama_ort_basic", source="dy_llama", post=("ort_basic",), needs_adapter=True),
    Case("dy_llama_ort_extended", source="dy_llama", post=("ort_extended",), needs_adapter=True),
    Case("dy_llama_zero_b", "llama", Lora(LLAMA_ALL, zero_b=True), "dynamo"),
    Case("dy_llama_zero_b_stripped", source="dy_llama_zero_b", post=("strip_metadata",), needs_adapter=True),
    Case("dy_llama_unoptimized_ort_basic", source="dy_llama_unoptimized", post=("ort_basic",), needs_adapter=True),
    Case("dy_llama_bare", "llama_short", SOME, "dynamo", wrap=""),
    Case("dy_llama_nested", "llama_short", SOME, "dynamo", wrap="net.inner"),
    Case("dy_llama_v_1", "llama_short", Lora(LLAMA_SOME, name="v_1", task_type="CAUSAL_LM"), "dynamo"),
    Case("dy_llama_two_active", "llama_short", Lora(LLAMA_SOME, also=("style",)), "dynamo", note=TWO),
    Case("dy_llama_dropout", "llama_short", Lora(LLAMA_SOME, extra=DROPOUT), "dynamo", options=(("training", True),)),
    Case("dy_llama_unit_scale", "llama_short", Lora(LLAMA_SOME, alpha=4), "dynamo"),
    Case("dy_llama_patterns", "llama", Lora(LLAMA_SOME, extra=PATTERNS, extra_c=()), "dynamo"),
    Case("dy_llama_lm_head", "llama_tied", Lora(("q_proj", "lm_head")), "dynamo"),
    Case("dy_llama_half", "llama_short", Lora(LLAMA_SOME, half=True), "dynamo", dtype="float16", atol=HALF),
    Case("dy_llama_half_base", "llama_short", SOME, "dynamo", dtype="float16", atol=HALF),
    Case("dy_llama_bf16_base", "llama_short", SOME, "dynamo", dtype="bfloat16", atol=BRAIN, runs_on_ort=False),
    Case("dy_phi3", "phi3", Lora(("qkv_proj", "o_proj", "gate_up_proj")), "dynamo", with_base=True),
)

T5 = Lora(("q", "v", "wo"), task_type="SEQ_2_SEQ_LM")
T5_TASK = ("task", "text2text-generation-with-past")
PREFIX = "node paths lack the leading encoder.; only the adapter's own names complete them"
SPLIT = "the adapter's packed site is split: q_proj, k_proj, v_proj hold slices of B of qkv_proj, and all of its A"
NEXT_TOKEN = (("past", 3), ("tokens", 1), ("use_cache", True))

DEPLOYED = (
    Case("optimum_llama", "llama", Lora(LLAMA_SOME, task_type="CAUSAL_LM"), "optimum_main",
         options=(("task", "text-generation-with-past"), ("past", 3)), with_base=True),
    Case("optimum_bert", "bert", Lora(BERT, task_type="FEATURE_EXTRACTION"), "optimum_model",
         options=(("task", "feature-extraction"),), with_base=True),
    Case("optimum_t5_encoder", "t5", T5, "optimum_model", (T5_TASK, ("tokens", 5)), file="encoder_model.onnx",
         needs_adapter=True, note=PREFIX),
    Case("optimum_t5_decoder", "t5", T5, "optimum_model", (T5_TASK,), file="decoder_model.onnx"),
    Case("optimum_t5_decoder_with_past", "t5", T5, "optimum_model", (T5_TASK, *NEXT_TOKEN),
         file="decoder_with_past_model.onnx"),
    Case("optimum_t5_merged_first", "t5", T5, "optimum_model", (T5_TASK,), file="decoder_model_merged.onnx"),
    Case("optimum_t5_merged_next", "t5", T5, "optimum_model", (T5_TASK, *NEXT_TOKEN),
         file="decoder_model_merged.onnx"),
    Case("genai_llama", "llama_wide", Lora(LLAMA_ALL, task_type="CAUSAL_LM"), "genai", with_base=True),
    Case("genai_phi3", "phi3_wide", Lora(("qkv_proj", "o_proj", "gate_up_proj"), task_type="CAUSAL_LM"), "genai",
         note=SPLIT, with_base=True),
)  # fmt: skip

OTHER_MODELS = (
    Case("ts_gpt2", "gpt2", Lora(GPT2, extra=(("fan_in_fan_out", True),)), with_base=True),
    Case("dy_gpt2", "gpt2", Lora(GPT2, extra=(("fan_in_fan_out", True),)), "dynamo"),
    Case("ts_gpt2_ort_extended", source="ts_gpt2", post=("ort_extended",)),
    Case("ts_bert", "bert", Lora(BERT, task_type="FEATURE_EXTRACTION"), with_base=True),
    Case("ts_bert_ort_transformers", source="ts_bert", post=("ort_transformers_bert",)),
    Case("ts_bert_float16", source="ts_bert", post=("float16",), atol=HALF),
    Case("ts_bert_classifier", "bert_classifier", Lora(("query", "pooler.dense", "classifier"))),
    Case("dy_bert_classifier", "bert_classifier", Lora(("query", "pooler.dense", "classifier")), "dynamo"),
    Case("ts_vit", "vit", Lora(("query", "value", "classifier")), with_base=True),
    Case("dy_vit", "vit", Lora(("query", "value", "classifier")), "dynamo"),
    Case("ts_mlp", "mlp", Lora(MLP), with_base=True),
    Case("dy_mlp", "mlp", Lora(MLP), "dynamo", with_base=True),
    Case("dy_mlp_rank_1", "mlp", Lora(MLP, r=1, alpha=2), "dynamo"),
    Case("ts_mlp_no_bias_ort_extended", source="ts_mlp_no_bias", post=("ort_extended",)),
    Case("ts_mlp_no_bias", "mlp_no_bias", Lora(MLP)),
    Case("dy_mlp_no_bias", "mlp_no_bias", Lora(MLP), "dynamo"),
    Case("dy_mlp_no_bias_ort_extended", source="dy_mlp_no_bias", post=("ort_extended",)),
    Case("ts_repeated", "repeated", Lora(("stem", "block")), note=REPEATED),
    Case("dy_repeated", "repeated", Lora(("stem", "block")), "dynamo", note=REPEATED),
    Case("ts_normed", "normed", Lora(("up", "down")), with_base=True),
    Case("ts_normed_ort_extended", source="ts_normed", post=("ort_extended",)),
    Case("dy_normed_ort_extended", source="dy_normed", post=("ort_extended",), needs_adapter=True),
    Case("dy_normed", "normed", Lora(("up", "down")), "dynamo", with_base=True),
    Case("ts_adalora", "mlp", Lora(MLP, kind="adalora")),
    Case("dy_adalora", "mlp", Lora(MLP, kind="adalora"), "dynamo"),
)

NOTHING = (
    Case("ts_plain", "mlp", negative=True),
    Case("dy_plain", "llama_short", None, "dynamo", negative=True),
    Case("ts_bottleneck", "bottleneck", negative=True),
    Case("dy_bottleneck", "bottleneck", None, "dynamo", negative=True),
    Case("dy_merged", "mlp", Lora(MLP), "dynamo", negative=True),
)

REFUSED = (
    Case("ts_oft", "mlp", Lora(MLP, kind="oft", extra=(("oft_block_size", 8), ("r", 0))), unsupported="OFT"),
    Case("ts_tokens", "llama_short", Lora(("embed_tokens",), kind="tokens", extra=(("token_indices", [20, 75]),)),
         unsupported="trainable tokens"),
)  # fmt: skip

TABLE = (*LLAMA_TORCHSCRIPT, *LLAMA_DYNAMO, *DEPLOYED, *OTHER_MODELS, *NOTHING, *REFUSED, *KINDS, *QUANTIZED)

CASES: dict[str, Case] = {case.name: case for case in TABLE}
assert len(CASES) == len(TABLE), "two cases of one name"
