"""The whole way: a language model, AWQ in four bits, LoRA on top, ONNX, the adapter out again, and a mixed batch."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig

import adapterx as ax
from adapterx import quant
from adapterx.quant.lora import attach_lora
from tests.quant.tiny import VOCABULARY, llama

# Of a logit, in exact mode; perplexities are compared relatively.
CLOSE = 1e-3


def text(rows, *, seed):
    """Counting up, by a step that differs from row to row: something that a tiny model can learn."""
    chance = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, VOCABULARY, (rows, 1), generator=chance)
    steps = torch.randint(1, 4, (rows, 1), generator=chance)
    return (starts + steps * torch.arange(16)) % VOCABULARY


def perplexity(logits, ids):
    logits = torch.as_tensor(logits)[:, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def trained(model, ids, *, steps, lr):
    parts = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(parts, lr=lr)
    for step in range(steps):
        rows = ids.roll(step * 16, 0)[:16]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    """``(perplexities by step, PEFT model on the quantized base, Extraction)``."""
    folder, ids = tmp_path_factory.mktemp("way"), text(32, seed=1)
    base = trained(llama().train(), text(64, seed=0), steps=60, lr=1e-2)
    seen = {"float": perplexity(base(ids).logits.detach(), ids)}
    config = quant.AWQConfig(bits=4, group_size=32, use_sym=False)
    model = quant.quantize(base, config, run_fn=lambda prepared: [prepared(rows) for rows in text(16, seed=0).split(8)])
    seen["awq"] = perplexity(model(ids).logits.detach(), ids)
    torch.manual_seed(0)
    lora = attach_lora(model, LoraConfig("CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"))
    lora.add_adapter("other", LoraConfig("CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False))
    lora = trained(lora, text(64, seed=1), steps=30, lr=1e-2)
    seen["lora"] = perplexity(lora(ids).logits.detach(), ids)
    done = quant.export(lora, folder / "model.onnx", exact=True)
    assert len(done.layers) == 14
    return seen, lora, ax.extract_adapters(done.path, folder / "out", make_inputs=True)


def run(session, ids, **adapter):
    return session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}, **adapter)[
        0
    ]


def test_four_bits_cost_little_and_lora_on_top_learns(way):
    seen, _, _ = way
    assert seen["awq"] < seen["float"] * 1.1
    assert seen["lora"] < seen["awq"] * 0.95


def test_onnx_runtime_has_torchs_perplexity_with_the_adapter_and_without(way):
    seen, _, out = way
    session, ids = ax.AdapterSession(out.model_path, adapters={"ours": out.adapter_path}), text(32, seed=1)
    assert abs(perplexity(run(session, ids, adapter="ours"), ids) / seen["lora"] - 1) < CLOSE
    assert abs(perplexity(run(session, ids), ids) / seen["awq"] - 1) < CLOSE


def test_rows_of_a_mixed_batch_are_torchs_also_under_an_adapter_that_was_never_exported(way, tmp_path):
    _, lora, out = way
    lora.save_pretrained(tmp_path)
    session = ax.AdapterSession(out.model_path, adapters={"ours": out.adapter_path, "other": tmp_path / "other"})
    ids = text(3, seed=5)
    mixed = run(session, ids, adapters=["ours", "other", None])
    expected = []
    for row, name in zip(ids.split(1), ("default", "other", None), strict=True):
        lora.set_adapter(name or "default")
        with torch.no_grad():
            if name is None:
                with lora.disable_adapter():
                    expected.append(lora(input_ids=row).logits)
            else:
                expected.append(lora(input_ids=row).logits)
    lora.set_adapter("default")
    expected = torch.cat(expected).numpy()
    assert np.abs(mixed - expected).max() < CLOSE
    assert np.abs(mixed - run(session, ids)).max(axis=(1, 2))[:2].min() > 10 * CLOSE
