"""The zoo: models by real exporters, each against PyTorch with the exported adapter, two different ones, and none."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import pytest

from adapterx.errors import AdapterxError, NoAdaptersFound
from adapterx.formats import load_adapter
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.runtime.session import AdapterSession
from adapterx.verify import verify_extraction
from tests.zoo import CASES, build

POSITIVE = [
    name
    for name, case in CASES.items()
    if case.kind == "lora" and not case.quantized and not case.negative and not case.unsupported
]
RUNNING = [name for name in POSITIVE if CASES[name].runs_on_ort]
NEGATIVE = [name for name, case in CASES.items() if case.negative]
UNSUPPORTED = [name for name, case in CASES.items() if case.unsupported]


def exported_adapter(name, built):
    """What has to be given: to name anonymous branches, and to tell which sites lie in other files of a set."""
    return built.adapters["a"] if CASES[name].needs_adapter or CASES[name].file else None


def assert_outputs(got, want, atol, what):
    assert [np.shape(one) for one in got] == [np.shape(other) for other in want], what
    for one, other in zip(got, want, strict=True):
        error = np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).max(initial=0)
        assert error <= atol, f"{what}: {error:.1e} > {atol:.0e}"


def assert_checker_passes(path):
    """Of operators that ONNX Runtime keeps in the standard domain, onnx knows nothing; everything else it checks."""
    model = onnx.load(path)
    for node in model.graph.node:
        node.domain = "com.microsoft" if node.op_type == "SimplifiedLayerNormalization" else node.domain
    model.opset_import.add(domain="com.microsoft", version=1)
    onnx.checker.check_model(model)


@pytest.mark.parametrize("name", POSITIVE)
def test_every_site_is_found_with_its_name_rank_scale_and_shape(name):
    built = build(name)
    sites = find_sites(built.model, adapter=exported_adapter(name, built))
    rows = [(s.name, s.rank, f"{s.scale:.3g}", s.d_in, s.d_out) for s in sites]
    assert sorted(rows) == sorted((t.name, t.rank, f"{t.scale:.3g}", t.d_in, t.d_out) for t in built.truth)
    if not CASES[name].needs_adapter:
        assert sorted(s.adapter for s in sites) == sorted(t.adapter for t in built.truth)


@pytest.mark.parametrize("name", RUNNING)
def test_the_extracted_model_is_pytorch_with_every_adapter_and_with_none(name, tmp_path):
    built = build(name)
    out = extract_adapters(built.model, tmp_path, make_inputs=True, adapter=exported_adapter(name, built))
    assert_checker_passes(out.model_path)
    session = AdapterSession(out.model_path, adapters={"exported": out.adapter})
    assert_outputs(session.run(None, built.feeds, adapter="exported"), built.expected["a"], CASES[name].atol, name)
    assert_outputs(session.run(None, built.feeds), built.expected["base"], CASES[name].atol, f"{name} without adapter")
    different = [adapter for adapter in built.adapters if adapter != "a" and adapter in built.expected]
    assert different or "adalora" in name, "a round trip alone proves little"
    for adapter in different:
        session.load_adapter("different", built.adapters[adapter])
        got = session.run(None, built.feeds, adapter="different")
        assert_outputs(got, built.expected[adapter], CASES[name].atol, f"{name} with {adapter}")


# Each case in one of the two other modes; the mode does not depend on where the graph came from.
@pytest.mark.parametrize(("name", "packed"), [(name, i % 2 == 0) for i, name in enumerate(RUNNING)])
def test_verification_passes_on_the_packed_or_the_external_extraction(name, packed, tmp_path):
    built = build(name)
    exported = exported_adapter(name, built)
    out = extract_adapters(built.model, tmp_path, make_inputs=packed, pack_inputs=packed, adapter=exported)
    verification = verify_extraction(built.model, out.model_path, adapter=exported, feeds=built.feeds)
    assert verification.passed, [row for row in verification.rows if not row.passed]


@pytest.mark.parametrize("name", [name for name in POSITIVE if not CASES[name].runs_on_ort])
def test_what_onnx_runtime_cannot_run_is_right_in_onnxs_reference_evaluator(name, tmp_path):
    built = build(name)
    out = extract_adapters(built.model, tmp_path, make_inputs=True)
    evaluator = onnx.reference.ReferenceEvaluator(onnx.load(out.model_path))
    for adapter, want in built.expected.items():
        tensors = {} if adapter == "base" else dict(load_adapter(built.adapters[adapter]).tensors())
        defaults = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out.model_path).graph.initializer}
        inputs = {i.name for i in onnx.load(out.model_path).graph.input}
        feeds = {n: v for n, v in defaults.items() if n in inputs} | dict(built.feeds) | tensors
        assert_outputs(evaluator.run(None, feeds), want, CASES[name].atol, f"{name} with {adapter}")


@pytest.mark.parametrize("name", NEGATIVE)
def test_a_model_without_adapters_has_none_to_take(name, tmp_path):
    with pytest.raises(NoAdaptersFound, match="looked at"):
        extract_adapters(build(name).model, tmp_path / "out", make_inputs=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_kind_that_cannot_be_taken_whole_is_refused_and_nothing_is_written(name, tmp_path):
    with pytest.raises(AdapterxError) as error:
        extract_adapters(build(name).model, tmp_path / "out", make_inputs=True)
    assert len(str(error.value)) > 60
    assert not (tmp_path / "out").exists()
