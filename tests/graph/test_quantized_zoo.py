"""The zoo's quantized files, against ONNX Runtime on the same quantized base with other adapters in float."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from adapterx.errors import ModelError
from adapterx.formats import load_adapter
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.runtime.session import AdapterSession
from adapterx.verify import verify_extraction
from tests.graph.quantizers import quantized
from tests.zoo import CASES, build

STATIC_TOO = "ts_bert_int8_static_all"
QUANTIZED = [name for name, case in CASES.items() if case.quantized and name != STATIC_TOO]
# Sums in another order; where activations are rounded to 8 bits next, a last bit can move one of them by a step.
EXACT, STEP = 2e-5, 2e-2


def given(name, built):
    return built.adapters["a"] if CASES[name].needs_adapter else None


def rounds_activations(name):
    return any(words in CASES[name].quantized for words in ("int8", "level_4", "qdq"))


def error(got, want):
    assert [one.shape for one in got] == [other.shape for other in want]
    return max(float(np.abs(one - other).max(initial=0)) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("name", [*QUANTIZED, STATIC_TOO])
def test_every_site_of_a_quantized_export_is_found(name):
    built = build(name)
    rows = [
        (s.name, s.rank, f"{s.scale:.3g}", s.d_in, s.d_out) for s in find_sites(built.model, adapter=given(name, built))
    ]
    assert sorted(rows) == sorted((t.name, t.rank, f"{t.scale:.3g}", t.d_in, t.d_out) for t in built.truth)


@pytest.mark.parametrize("name", QUANTIZED)
def test_other_adapters_on_a_quantized_base_are_as_if_baked_in_and_none_is_the_base(name, tmp_path):
    built = build(name)
    out = extract_adapters(built.model, tmp_path, make_inputs=True, adapter=given(name, built))
    session = AdapterSession(out.model_path)
    base = session.run(None, built.feeds)
    atol = STEP if rounds_activations(name) else EXACT
    assert error(base, built.expected["base"]) <= atol
    if built.base_model is not None and not CASES[name].note:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        alone = ort.InferenceSession(str(built.base_model), options).run(None, built.feeds)
        assert error(base, alone) == 0.0
    for other in ("b", "c"):
        session.load_adapter(other, built.adapters[other])
        got = session.run(None, built.feeds, adapter=other)
        assert error(got, built.expected[other]) <= atol, other
        assert error(got, built.expected["a"]) > 10 * EXACT


@pytest.mark.parametrize("name", [name for name in QUANTIZED if dict(CASES[name].options).get("adapter_too")])
def test_verification_passes_on_an_adapter_that_was_quantized_too(name, tmp_path):
    built = build(name)
    out = extract_adapters(built.model, tmp_path, adapter=given(name, built))
    verification = verify_extraction(built.model, out.model_path, adapter=given(name, built), feeds=built.feeds)
    assert verification.passed, [row for row in verification.rows if not row.passed]


def test_static_ranges_around_the_adapter_are_refused_and_on_request_kept(tmp_path):
    built = build(STATIC_TOO)
    with pytest.raises(ModelError, match="measured with the exported adapter, at 8 of its places"):
        extract_adapters(built.model, tmp_path / "out", make_inputs=True)
    out = extract_adapters(built.model, tmp_path / "out", make_inputs=True, static_qdq="allow")
    assert len(out.notes) == len(out.sites)
    session = AdapterSession(out.model_path, {"b": built.adapters["b"]})
    kept = error(session.run(None, built.feeds, adapter="b"), built.expected["b"])
    apart = error(built.expected["a"], built.expected["b"])
    assert kept < apart / 2, f"{kept} of {apart}"


def test_a_module_of_which_a_quantizer_took_one_call_and_left_another_is_one_site(tmp_path):
    built = build("ts_repeated")
    model = quantized("int4", onnx.load(built.model), tmp_path / "model.onnx")
    out = extract_adapters(model, tmp_path / "float", make_inputs=True)
    assert sorted(out.sites.names) == sorted(row.name for row in built.truth)
    # Where a call kept the adapter's own numbers, these are the exported ones.
    exported = load_adapter(built.adapters["a"])
    assert np.array_equal(out.adapter.sites["block"].a, exported.sites["block"].a)
    assert verify_extraction(model, out.model_path, feeds=built.feeds).passed
    with pytest.raises(ModelError, match="only some calls are stored as codes"):
        extract_adapters(model, tmp_path / "kept", quantized="keep")
