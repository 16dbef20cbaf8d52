"""make(case): export, and ask torch for the right answers."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from adapterx.adapter import Array
from tests.zoo import exporters, generation, models, peft_models, pipelines, post, proof, quantizers
from tests.zoo.case import Built, Case, Facts, TruthSite

# The genai builder splits what Phi-3 packs, and has a word of its own for attention.
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Options of a deployed case that tell what to feed, not how to export.
FEEDING = ("past", "tokens", "use_cache")
Run = Callable[[Any], list[Array]]


def make(case: Case, home: Path, source: tuple[Case, Built] | None) -> Facts:
    """Write ``model.onnx``, ``base.onnx`` where it is asked for, and ``adapters/`` of ``case`` into ``home``.

    Raises:
        AssertionError: an export differs from torch, or the adapters' outputs lie too near to each other.
    """
    torch.set_num_threads(1)
    with exporters.quiet():
        if source and case.quantized:
            facts = _quantized(case, home, *source)
        elif source:
            facts = _derived(case, home, source[1])
        else:
            facts = _exported(case, home)
    lora = source[0].lora if source else case.lora
    proof.assert_apart(case, facts, zero_b=bool(lora and lora.zero_b))
    if not dict(case.options).get("adapter_too"):
        proof.assert_reproduces(case, home / "model.onnx", facts, "a")
    if case.with_base:
        proof.assert_reproduces(case, home / "base.onnx", facts, "base")
    return facts


def _derived(case: Case, home: Path, source: Built) -> Facts:
    shutil.copytree(source.model.parent, home, dirs_exist_ok=True)
    for step in case.post:
        post.STEPS[step](home / "model.onnx")
    return Facts(source.feeds, source.expected, _named(case, source))


def _named(case: Case, source: Built) -> list[TruthSite]:
    return [row._replace(adapter="") for row in source.truth] if case.needs_adapter else source.truth


def _quantized(case: Case, home: Path, original: Case, source: Built) -> Facts:
    """``source`` quantized; the answers are ONNX Runtime's on the same base with each adapter in float.

    One exporter gives the tensors of all adapters the same names, so that another adapter is put into the quantized
    file by its own export. What differs between two exports is the adapter.
    """
    shutil.copytree(source.model.parent / "adapters", home / "adapters")
    quantize = quantizers.QUANTIZERS[case.quantized]
    weights = {"a": _weights(source.model)}
    for label in ("b", "c"):
        _write(original, home / f"{label}.onnx", label)
        weights[label] = _weights(home / f"{label}.onnx")
        (home / f"{label}.onnx").unlink()
    own = {name for name, value in weights["a"].items() if not np.array_equal(value, weights["b"][name])}
    reading = [node for node in onnx.load(source.model).graph.node if own.intersection(node.input)]
    nodes = [node.name for node in reading]
    if case.export != "genai":
        # The file goes on multiplying by a's scale; the genai builder alone puts scales into B.
        made = {name for node in reading for name in node.output}
        for name in {
            name for node in reading if made.intersection(node.input) for name in own.intersection(node.input)
        }:
            weights["c"][name] = weights["c"][name] * np.float32(_scale(original, "c") / _scale(original, "a"))
    weights["base"] = {name: np.zeros_like(weights["a"][name]) for name in own}
    in_float = quantize(source.model, nodes, source.feeds)
    expected = {
        label: _answered(in_float, {n: given[n] for n in own}, source.feeds) for label, given in weights.items()
    }
    whole = quantize(source.model, [], source.feeds) if dict(case.options).get("adapter_too") else in_float
    onnx.save(whole, home / "model.onnx")
    if case.with_base and case.export == "genai":
        _write(dataclasses.replace(original, options=(("dtype", "INT4"),)), home / "base.onnx", None)
    elif case.with_base:
        assert source.base_model
        onnx.save(quantize(source.base_model, [], source.feeds), home / "base.onnx")
    return Facts(source.feeds, expected, _named(case, source))


def _scale(case: Case, label: str) -> float:
    assert case.lora
    config = peft_models.config(case.lora, label)
    return float(config.lora_alpha / config.r)


def _weights(path: Path) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def _answered(model: onnx.ModelProto, weights: dict[str, Array], feeds: dict[str, Array]) -> list[Array]:
    """ONNX Runtime's answer with ``weights`` in place of the initializers of their names."""
    changed, met = onnx.ModelProto.FromString(model.SerializeToString()), set()
    for tensor in changed.graph.initializer:
        if tensor.name in weights:
            met.add(tensor.name)
            tensor.CopyFrom(onnx.numpy_helper.from_array(weights[tensor.name], tensor.name))
    assert met == set(weights), f"not in the quantized file: {sorted(set(weights) - met)}"
    return proof.run_ort(changed.SerializeToString(), feeds)


def _exported(case: Case, home: Path) -> Facts:
    if case.with_base or case.lora is None:
        _write(case, home / ("base.onnx" if case.lora else "model.onnx"), None)
    subject = _subject(case)
    if case.lora is None:
        return Facts(_arrays(subject), {"a": run_torch(subject.model, subject)}, [])
    _write(case, home / "model.onnx", "a")
    feeds, run = _asked(case, home, subject)
    expected, rows = _answers(case, home / "adapters", run)
    if case.export == "torchscript" and case.lora.kind == "adalora":
        # It multiplies in the module's own forward: no node bears the adapter's name.
        rows = [row._replace(adapter="") for row in rows]
    return Facts(feeds, expected, [] if case.negative or case.unsupported else _present_in(case, rows))


def _arrays(subject: models.Subject) -> dict[str, Array]:
    return {name: value.numpy() for name, value in subject.inputs.items()}


def _asked(case: Case, home: Path, subject: models.Subject) -> tuple[dict[str, Array], Run]:
    """Feeds for the file, and how to have torch's answer to them."""
    if case.export not in pipelines.PIPELINES:
        return _arrays(subject), lambda model: run_torch(model, subject)
    file = onnx.load(home / "model.onnx", load_external_data=False)
    config: Any = subject.model.config
    feeding = {name: value for name, value in case.options if name in FEEDING}
    feeds = generation.feeds_for(file, config, **{"past": 0, "tokens": 7, "use_cache": False, **feeding})

    def run(model: Any) -> list[Array]:
        if case.file.startswith("encoder"):
            return generation.run_encoder(model, feeds)
        return generation.run(model, feeds, [o.name for o in file.graph.output])

    return feeds, run


def _write(case: Case, path: Path, label: str | None) -> None:
    """Export the model with adapter ``label``, or alone."""
    subject, options = _subject(case), {name: value for name, value in case.options if name not in FEEDING}
    if case.export in pipelines.PIPELINES:
        _deploy(case, path, label, **options)
        return
    model: Any = subject.model
    if label:
        assert case.lora
        model = peft_models.attach(model, case.lora, label)
        model = model.merge_and_unload() if case.negative else model
    holder = exporters.held(model, case.wrap, tuple(subject.inputs))
    exporters.EXPORTERS[case.export](holder, subject, path, **options)


def _deploy(case: Case, path: Path, label: str | None, **options: Any) -> None:
    """By an exporter that reads an adapter from its folder and may write several files, of which one is the case."""
    with tempfile.TemporaryDirectory() as work:
        given, written = Path(work) / "given", Path(work) / "deployed"
        if label:
            assert case.lora
            adapted = peft_models.attach(_subject(case).model, case.lora, label)
            peft_models.save(adapted, given, name=case.lora.name)
        pipelines.PIPELINES[case.export](_subject(case), given if label else None, written, **options)
        if path.name == "model.onnx":
            for data in written.glob("*.data"):
                shutil.move(data, path.with_name(data.name))
            shutil.move(written / (case.file or "model.onnx"), path)
        else:
            # Beside model.onnx its data would bear the same name.
            onnx.save(onnx.load(written / (case.file or "model.onnx")), path)


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
