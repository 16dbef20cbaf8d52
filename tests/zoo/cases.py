"""The table of cases: data only."""

from __future__ import annotations

from tests.zoo.case import Case, Lora

LLAMA_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LLAMA_SOME = ("q_proj", "v_proj", "down_proj")
GPT2 = ("c_attn", "c_proj", "c_fc")
MLP = ("fc1", "fc2", "head")

TABLE = (
    Case("ts_llama", "llama", Lora(LLAMA_ALL), with_base=True),
    Case("dy_llama", "llama", Lora(LLAMA_ALL), "dynamo", with_base=True),
    Case("dy_llama_stripped", source="dy_llama", post=("strip_metadata",), needs_adapter=True),
    Case("ts_llama_zero_b", "llama", Lora(LLAMA_ALL, zero_b=True)),
    Case("dy_llama_zero_b", "llama", Lora(LLAMA_ALL, zero_b=True), "dynamo"),
    Case("ts_gpt2", "gpt2", Lora(GPT2, extra=(("fan_in_fan_out", True),))),
    Case("dy_gpt2", "gpt2", Lora(GPT2, extra=(("fan_in_fan_out", True),)), "dynamo"),
    Case("ts_mlp", "mlp", Lora(MLP), with_base=True),
    Case("dy_mlp", "mlp", Lora(MLP), "dynamo", with_base=True),
)

CASES: dict[str, Case] = {case.name: case for case in TABLE}
assert len(CASES) == len(TABLE), "two cases of one name"
