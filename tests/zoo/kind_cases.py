"""Cases of every adapter kind beside low rank on linears: data only. A row is exported by both of torch's exporters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from tests.zoo.case import Case, Lora

MLP, NORMED = ("fc1", "fc2", "head"), ("up", "down")
BIASED = (("lora_bias", True),)
WITH_BIASES = (("bias", "lora_only"),)
SAVED = (("modules_to_save", ["classifier"]),)
GROUPED = (("r", 6),)


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
        Case("conv", "pictures", Lora(("conv1", "conv2", "fc")), kind="conv"),
        Case("embedding", "llama_short", Lora(("embed_tokens", "q_proj")), kind="embedding"),
        Case("embedding_tied", "llama_tied", Lora(("embed_tokens", "q_proj")), kind="embedding"),
        Case("saved", "bert_classifier", Lora(("query", "value"), extra=SAVED), kind="saved"),
        Case("bias", "mlp", Lora(MLP, extra=WITH_BIASES), kind="bias"),
        Case("bias_normed", "normed", Lora(NORMED, extra=WITH_BIASES), kind="bias"),
    ),
)
