"""make(case): export, and ask torch for the right answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from adapterx.adapter import Array
from tests.zoo import exporters, generation, models, peft_models, pipelines, post, proof
from tests.zoo.case import Built, Case, Facts, TruthSite

# The genai builder splits what Phi-3 packs, and has a word of its own for attention.
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
Run = Callable[[Any], list[Array]]


def make(case: Case, home: Path, source: tuple[Case, Built] | None) -> Facts:
    """Write ``model.onnx`` and ``adapters/`` of ``case`` into ``home``.

    Raises:
        AssertionError: the export differs from torch, or the adapters' outputs lie too near to each other.
    """
    torch.set_num_threads(1)
    with exporters.quiet():
        if source:
            facts = _derived(case, home, source[1])
        elif case.export in pipelines.PIPELINES:
            facts = _deployed(case, home)
        else:
            facts = _exported(case, home)
    lora = source[0].lora if source else case.lora
    proof.assert_apart(case, facts, zero_b=bool(lora and lora.zero_b))
    proof.assert_reproduces(case, home / "model.onnx", facts)
    return facts


def _derived(case: Case, home: Path, source: Built) -> Facts:
    shutil.copytree(source.model.parent, home, dirs_exist_ok=True)
    for step in case.post:
        post.STEPS[step](home / "model.onnx")
    unnamed = [row._replace(adapter="") for row in source.truth] if case.needs_adapter else source.truth
    return Facts(source.feeds, source.expected, unnamed)


def _exported(case: Case, home: Path) -> Facts:
    subject = _subject(case)
    export, names = exporters.EXPORTERS[case.export], tuple(subject.inputs)
    options = dict(case.options)
    feeds = {name: value.numpy() for name, value in subject.inputs.items()}
    if case.with_base or case.lora is None:
        file = home / ("base.onnx" if case.lora else "model.onnx")
        export(exporters.held(subject.model, case.wrap, names), subject, file, **options)
    if case.lora is None:
        return Facts(feeds, {"a": run_torch(subject.model, subject)}, [])

    def run(model: nn.Module) -> list[Array]:
        return run_torch(model, subject)

    expected, rows = _answers(case, home / "adapters", run)
    adapted: Any = peft_models.attach(_subject(case).model, case.lora, "a")
    model = adapted.merge_and_unload() if case.negative else adapted
    export(exporters.held(model, case.wrap, names), subject, home / "model.onnx", **options)
    if case.export == "torchscript" and case.lora.kind == "adalora":
        # It multiplies in the module's own forward: no node bears the adapter's name.
        rows = [row._replace(adapter="") for row in rows]
    return Facts(feeds, expected, [] if case.negative or case.unsupported else rows)


def _deployed(case: Case, home: Path) -> Facts:
    """By an exporter that reads adapter "a" from its folder and may write several files, of which one is the case."""
    assert case.lora
    options = dict(case.options)
    feeding = {name: options.pop(name) for name in ("past", "tokens", "use_cache") if name in options}
    folder = home / "deployed"
    seeded = peft_models.attach(_subject(case).model, case.lora, "a")
    peft_models.save(seeded, home / "given", name=case.lora.name)
    pipelines.PIPELINES[case.export](_subject(case), home / "given", folder, **options)
    shutil.rmtree(home / "given")
    for data in folder.glob("*.data"):
        data.rename(home / data.name)
    (folder / (case.file or "model.onnx")).rename(home / "model.onnx")
    shutil.rmtree(folder)
    file = onnx.load(home / "model.onnx", load_external_data=False)
    feeds = generation.feeds_for(file, seeded.config, **{"past": 0, "tokens": 7, "use_cache": False, **feeding})

    def run(model: Any) -> list[Array]:
        if case.file.startswith("encoder"):
            return generation.run_encoder(model, feeds)
        return generation.run(model, feeds, [o.name for o in file.graph.output])

    expected, rows = _answers(case, home / "adapters", run)
    return Facts(feeds, expected, _present_in(case, rows))


def _answers(case: Case, adapters: Path, run: Run) -> tuple[dict[str, list[Array]], list[TruthSite]]:
    """torch's answers under every adapter and under none, the adapters as PEFT folders, the sites of "a"."""
    assert case.lora
    # Without PEFT: a disabled adapter leaves the biases that were trained with it.
    expected, rows = {"base": run(_subject(case).model)}, []
    for label in _labels(case):
        adapted = peft_models.attach(_subject(case).model, case.lora, label)
        expected[label] = run(adapted)
        peft_models.save(adapted, adapters / label, name=case.lora.name)
        if label == "a":
            rows = peft_models.truth(adapted)
            for name in (case.lora.name, *case.lora.also) if case.lora.also else ():
                adapted.set_adapter(name)
                expected[name] = run(adapted)
                peft_models.save(adapted, adapters / name, name=name)
    return expected, rows


def _labels(case: Case) -> tuple[str, ...]:
    assert case.lora
    # No reader of such adapters is asked for: enough to see how the graph is met.
    alone = case.unsupported or (case.kind == "lora" and case.lora.kind != "lora")
    return ("a",) if alone else ("a", "b", "c")


def _subject(case: Case) -> models.Subject:
    subject = models.MODELS[case.model]()
    subject.model.to(getattr(torch, case.dtype))
    return subject


def run_torch(model: nn.Module, subject: models.Subject) -> list[Array]:
    """The exported outputs, bf16 as float32."""
    with torch.no_grad(), exporters.causal_mask_without_vmap():
        out = model(**subject.inputs)
    tensors = [out] if isinstance(out, torch.Tensor) else [out[name] for name in subject.outputs]
    return [(t.float() if t.dtype == torch.bfloat16 else t).numpy() for t in tensors]


def _present_in(case: Case, rows: list[TruthSite]) -> list[TruthSite]:
    """The sites of a checkpoint that are in the file of this case."""
    if case.export == "genai":
        return [part for row in rows for part in _split(row, case)]
    if case.file.startswith("encoder"):
        return [row for row in rows if row.name.startswith("encoder.")]
    if not case.file:
        return rows
    # Keys and values of the encoder's states come from the cache there.
    cached = ("EncDecAttention.k", "EncDecAttention.v") if case.file == "decoder_with_past_model.onnx" else ()
    return [row for row in rows if not row.name.startswith("encoder.") and not row.name.endswith(cached or ("\0",))]


def _split(row: TruthSite, case: Case) -> list[TruthSite]:
    config: Any = _subject(case).model.config
    head = config.hidden_size // config.num_attention_heads
    widths = {"k_proj": head * config.num_key_value_heads, "v_proj": head * config.num_key_value_heads,
              "q_proj": config.hidden_size}  # fmt: skip
    path, _, last = row.name.rpartition(".")
    return [
        row._replace(
            name=f"{path}.{part}", adapter="", scale=1.0,
            d_out=widths.get(part, config.intermediate_size) if last in PACKED else row.d_out,
        )
        for part in PACKED.get(last, (last,))
    ]  # fmt: skip
