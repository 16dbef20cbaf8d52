"""A case that would prove nothing is refused when it is built."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from adapterx.adapter import Array
from tests.zoo.case import Case, Facts, as_stored

# A swap that does the wrong thing must be told from rounding at a glance. Outputs are of the order of one, so that
# tolerances of 16-bit types leave less room: there, a gap of 2 is as far apart as adapters get.
SEPARATION, ENOUGH = 100.0, 2.0


def assert_apart(case: Case, facts: Facts, *, zero_b: bool) -> None:
    """Every two answers of torch differ by far more than the tolerance.

    Raises:
        AssertionError: they do not.
    """
    for one, other in itertools.combinations(facts.expected, 2):
        if zero_b and {one, other} == {"a", "base"}:
            continue
        gap = max(map(_distance, facts.expected[one], facts.expected[other]))
        least = min(SEPARATION * case.atol, ENOUGH)
        assert gap > least, f"{case.name}: {one} and {other} differ by {gap:.3g}, which is not over {least:.3g}"


def assert_reproduces(case: Case, path: Path, facts: Facts, label: str) -> None:
    """The exported file computes what torch does with adapter ``label``.

    Raises:
        AssertionError: it does not.
    """
    met = run_ort(str(path), facts.feeds) if case.runs_on_ort else _run_reference(path, facts)
    names = [o.name for o in onnx.load(path, load_external_data=False).graph.output]
    for name, got, expected in zip(names, met, facts.expected[label], strict=True):
        assert got.shape == expected.shape, f"{path.name}: {name} is {got.shape}, torch's is {expected.shape}"
        error = _distance(got, expected)
        assert error < case.atol, f"{case.name}: {name} of {path.name} differs from {label} by {error:.3g}"


def _distance(one: Array, other: Array) -> float:
    if one.shape != other.shape:
        return np.inf  # virtual tokens have outputs too
    apart = np.abs(as_stored(one).astype(np.float32) - as_stored(other).astype(np.float32))
    return float(apart.max(initial=0.0))


def run_ort(model: str | bytes, feeds: dict[str, Array]) -> list[Array]:
    """ONNX Runtime's answer."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def _run_reference(path: Path, facts: Facts) -> list[Array]:
    return list(ReferenceEvaluator(onnx.load(path)).run(None, facts.feeds))
