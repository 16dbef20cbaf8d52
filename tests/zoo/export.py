"""make(case): export, ask torch for the right answers, and refuse a case that would prove nothing."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from adapterx.adapter import Array
from tests.zoo import exporters, models, peft_models, post
from tests.zoo.case import Built, Case, Facts, Lora, as_stored

# A swap that does the wrong thing must be told from rounding at a glance.
SEPARATION = 100


def make(case: Case, home: Path, source: Built | None) -> Facts:
    """Write ``model.onnx`` and ``adapters/`` of ``case`` into ``home``.

    Raises:
        AssertionError: the export differs from torch, or the adapters' outputs lie too near to each other.
    """
    torch.set_num_threads(1)
    facts = _derived(case, home, source) if source else _exported(case, home)
    _assert_apart(case, facts)
    _assert_reproduces(case, home / "model.onnx", facts)
    return facts


def _derived(case: Case, home: Path, source: Built) -> Facts:
    shutil.copytree(source.model.parent, home, dirs_exist_ok=True)
    for step in case.post:
        post.STEPS[step](home / "model.onnx")
    unnamed = [row._replace(adapter="") for row in source.truth] if case.needs_adapter else source.truth
    return Facts(source.feeds, source.expected, [] if case.negative else unnamed)


def _exported(case: Case, home: Path) -> Facts:
    subject = models.MODELS[case.model]()
    export = exporters.EXPORTERS[case.export]
    names = tuple(subject.inputs)
    feeds = {name: value.numpy() for name, value in subject.inputs.items()}
    if case.with_base or case.lora is None:
        base_file = home / ("base.onnx" if case.lora else "model.onnx")
        export(exporters.held(subject.model, case.wrap, names), subject, base_file, **dict(case.options))
    if case.lora is None:
        return Facts(feeds, {"a": run_torch(subject.model, subject)}, [])
    lora, expected, rows = case.lora, {}, []
    for label in _labels(lora):
        adapted = adapted_model(case, label)
        expected[label] = run_torch(adapted, subject)
        for name in (lora.name, *lora.also):
            peft_models.save(
                adapted, home / "adapters" / (label if name == lora.name else f"{label}_{name}"), name=name
            )
        if label == "a":
            with adapted.disable_adapter():
                expected["base"] = run_torch(adapted, subject)
            rows = peft_models.truth(adapted)
            merged = adapted.merge_and_unload() if case.negative else adapted
            export(exporters.held(merged, case.wrap, names), subject, home / "model.onnx", **dict(case.options))
    return Facts(feeds, expected, [] if case.negative or case.unsupported else rows)


def _labels(lora: Lora) -> tuple[str, ...]:
    return ("a", "b", "c") if lora.kind == "lora" else ("a",)


def adapted_model(case: Case, label: str) -> Any:
    """A fresh model of ``case`` with adapter ``label``."""
    assert case.lora
    model = models.MODELS[case.model]().model.to(getattr(torch, case.dtype))
    return peft_models.attach(model, case.lora, label)


def run_torch(model: nn.Module, subject: models.Subject) -> list[Array]:
    """The exported outputs, bf16 as float32."""
    with torch.no_grad(), exporters.causal_mask_without_vmap():
        out = model(**subject.inputs)
    tensors = [out] if isinstance(out, torch.Tensor) else [out[name] for name in subject.outputs]
    return [(t.float() if t.dtype == torch.bfloat16 else t).numpy() for t in tensors]


def _assert_apart(case: Case, facts: Facts) -> None:
    zero_b = bool(case.lora and case.lora.zero_b)
    for one, other in itertools.combinations(facts.expected, 2):
        if zero_b and {one, other} == {"a", "base"}:
            continue
        gap = max(float(np.abs(x.astype(np.float32) - y.astype(np.float32)).max())
                  for x, y in zip(facts.expected[one], facts.expected[other], strict=True))  # fmt: skip
        assert gap > SEPARATION * case.atol, f"{case.name}: {one} and {other} differ by only {gap:.3g}"


def _assert_reproduces(case: Case, path: Path, facts: Facts) -> None:
    met = _run_ort(path, facts) if case.runs_on_ort else _run_reference(path, facts)
    for got, expected in zip(met, facts.expected["a"], strict=True):
        error = float(np.abs(as_stored(got).astype(np.float32) - expected.astype(np.float32)).max())
        assert error < case.atol, f"{case.name}: the exported file differs from torch by {error:.3g}"


def _run_ort(path: Path, facts: Facts) -> list[Array]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, facts.feeds))


def _run_reference(path: Path, facts: Facts) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    return list(ReferenceEvaluator(onnx.load(path)).run(None, facts.feeds))
