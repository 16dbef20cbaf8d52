"""Cases of every adapter kind beside low rank on linears: data only. A row is exported by both of torch's exporters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from tests.zoo.case import Case, Lora

MLP, NORMED = ("fc1", "fc2", "head"), ("up", "down")
BIASED = (("lora_bias", True),)
WITH_BIASES = (("bias", "lora_only"),)
SAVED = (("modules_to_save", ["classifier"]),)
GROUPED, GROUPED_C = (("r", 6),), (("r", 8), ("lora_alpha", 12))
SAVED_HEAD = (("modules_to_save", ["lm_head"]),)
LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
# As PEFT loads a saved prompt of any kind: no encoder, one tensor.
LOADED = (("inference_mode", True),)
BY_FOUR = (("decompose_factor", 4),)
PICTURES, SECOND_CONV = ("conv1", "conv2", "fc"), (("feedforward_modules", ["conv2"]),)
TWICE, FORWARD = ("stem", "block"), (("feedforward_modules", ["block"]),)
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TWO = "a is both at once; default and style are each alone"
SECOND = "the second DoRA's base is what the first made: the two are no sum"
REPEATED = "one module, two places in the graph"
SLICED = "the shared projections are as large as the largest module"


def _both(*cases: Case) -> Iterable[Case]:
    for case in cases:
        yield dataclasses.replace(case, name=f"ts_{case.name}")
        yield dataclasses.replace(case, name=f"dy_{case.name}", export="dynamo")


KINDS = (
    *_both(
        Case("dora", "mlp", Lora(MLP, kind="dora"), kind="dora"),
        Case("dora_normed", "normed", Lora(NORMED, kind="dora"), kind="dora"),
        Case("lora_bias", "mlp", Lora(MLP, extra=BIASED), kind="lora_bias"),
        Case("lora_bias_normed", "normed", Lora(NORMED, extra=BIASED), kind="lora_bias"),
        Case("ia3", "mlp", Lora(MLP, kind="ia3", extra=(("feedforward_modules", ["fc2"]),)), kind="ia3"),
        Case("ia3_normed", "normed", Lora(NORMED, kind="ia3", extra=(("feedforward_modules", ["down"]),)), kind="ia3"),
        Case("conv", "pictures", Lora(("conv1", "conv2", "fc")), kind="conv", with_base=True),
        Case("embedding", "llama_short", Lora(("embed_tokens", "q_proj")), kind="embedding"),
        Case("embedding_tied", "llama_tied", Lora(("embed_tokens", "q_proj")), kind="embedding"),
        Case("saved", "bert_classifier", Lora(("query", "value"), extra=SAVED), kind="saved"),
        Case("bias", "mlp", Lora(MLP, extra=WITH_BIASES), kind="bias"),
        Case("bias_normed", "normed", Lora(NORMED, extra=WITH_BIASES), kind="bias"),
        Case("dora_llama", "llama_short", Lora(("q_proj", "v_proj", "down_proj"), kind="dora"), kind="dora"),
        Case(
            "conv1d",
            "signals",
            Lora(("conv1", "conv2", "conv3"), extra=GROUPED, extra_c=GROUPED_C),
            kind="conv",
            with_base=True,
        ),
        Case("conv3d", "volumes", Lora(("conv1", "conv2")), kind="conv"),
        Case("vera", "llama_short", Lora(("q_proj", "o_proj"), kind="vera"), kind="vera"),
        Case("vera_mlp", "mlp", Lora(MLP, kind="vera"), kind="vera", note=SLICED),
        Case("loha", "mlp", Lora(MLP, kind="loha"), kind="loha"),
        Case("loha_normed", "normed", Lora(NORMED, kind="loha"), kind="loha"),
        Case("loha_two_active", "mlp", Lora(MLP, kind="loha", also=("style",)), kind="loha", note=TWO),
        Case("dora_two_active", "mlp", Lora(MLP, kind="dora", also=("style",)), unsupported=SECOND, kind="dora"),
        Case("dora_half", "llama_short", Lora(LLAMA, kind="dora"), dtype="float16", atol=2e-2, kind="dora"),
        Case("ia3_repeated", "repeated", Lora(TWICE, kind="ia3", extra=FORWARD), kind="ia3", note=REPEATED),
        Case("dora_repeated", "repeated", Lora(TWICE, kind="dora"), kind="dora", note=REPEATED),
        Case("vera_repeated", "repeated", Lora(TWICE, kind="vera"), kind="vera", note=REPEATED),
        Case("dora_conv", "pictures", Lora(PICTURES, kind="dora"), kind="dora"),
        Case("loha_conv", "pictures", Lora(PICTURES, kind="loha"), kind="loha"),
        Case("ia3_conv", "pictures", Lora(PICTURES, kind="ia3", extra=SECOND_CONV), kind="ia3"),
        Case("adalora_normed", "normed", Lora(NORMED, kind="adalora"), kind="adalora"),
        Case("prompt", "llama_short", Lora((), kind="prompt", task_type="CAUSAL_LM"), kind="prompt"),
        Case("prefix", "llama_short", Lora((), kind="prefix", task_type="CAUSAL_LM"), kind="prefix"),
        Case("prompt_loaded", "llama_short", Lora((), **LM, kind="prompt", extra=LOADED), kind="prompt"),
        Case("prefix_loaded", "llama_short", Lora((), **LM, kind="prefix", extra=LOADED), kind="prefix"),
        Case("conv_bias", "pictures", Lora(("conv1", "conv2"), name="style", extra=BIASED), kind="conv"),
        Case("conv_whole_bias", "pictures", Lora(("conv1", "fc"), extra=WITH_BIASES), kind="bias"),
        Case("embedding_head", "llama_tied", Lora(("embed_tokens", "lm_head"), name="style"), kind="embedding"),
        Case("saved_head", "llama_short", Lora(("q_proj",), **LM, extra=SAVED_HEAD), kind="saved"),
    ),
    Case("dy_lokr", "mlp", Lora(MLP, kind="lokr"), "dynamo", kind="lokr"),
    Case("dy_lokr_normed", "normed", Lora(NORMED, kind="lokr", extra=BY_FOUR), "dynamo", kind="lokr"),
    Case("dy_lokr_both", "mlp", Lora(MLP, r=2, kind="lokr", extra=(("decompose_both", True),)), "dynamo", kind="lokr"),
    Case("dy_lokr_conv", "pictures", Lora(PICTURES, kind="lokr"), "dynamo", kind="lokr"),
    Case("ts_dora_llama_ort_basic", source="ts_dora_llama", post=("ort_basic",), kind="dora"),
    Case("dy_dora_llama_ort_basic", source="dy_dora_llama", post=("ort_basic",), needs_adapter=True, kind="dora"),
    Case("dy_embedding_ort_basic", source="dy_embedding", post=("ort_basic",), needs_adapter=True, kind="embedding"),
    Case("dy_saved_head_ort_basic", source="dy_saved_head", post=("ort_basic",), needs_adapter=True, kind="saved"),
    Case("ts_loha_extended", source="ts_loha_normed", post=("ort_extended",), needs_adapter=True, kind="loha"),
    Case("dy_lokr_extended", source="dy_lokr_normed", post=("ort_extended",), needs_adapter=True, kind="lokr"),
    Case("dy_dora_normed_stripped", source="dy_dora_normed", post=("strip_metadata",), needs_adapter=True, kind="dora"),
    Case("dy_ia3_stripped", source="dy_ia3", post=("strip_metadata",), needs_adapter=True, kind="ia3"),
    Case("ts_prompt_ort_basic", source="ts_prompt_loaded", post=("ort_basic",), needs_adapter=True, kind="prompt"),
)
