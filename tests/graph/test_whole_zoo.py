"""Heads, biases and prompts, which take the place of the base's: PyTorch with every adapter, and never without one."""

import pytest

from adapterx.adapter import PROMPT, WHOLE_BIAS, WHOLE_WEIGHT, Adapter, LowRank
from adapterx.errors import FeedError, MismatchError
from adapterx.formats import load_adapter
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.runtime.session import AdapterSession
from tests.graph.test_zoo import assert_checker_passes, assert_outputs
from tests.zoo import CASES, build

WHOLE = [name for name, case in CASES.items() if case.kind in {"saved", "bias", "prompt", "prefix"}]
PORTS = {"packed": {"make_inputs": True, "pack_inputs": True}, "external": {}}


def given(name, built):
    """Which biases were trained, only the exported adapter says."""
    return built.adapters["a"] if CASES[name].kind == "bias" or CASES[name].needs_adapter else None


def opened(name, folder, **options):
    built = build(name)
    out = extract_adapters(built.model, folder, adapter=given(name, built), **(options or {"make_inputs": True}))
    return built, out, AdapterSession(out.model_path)


def changed(path, part, change):
    """The adapter at ``path`` with every ``part`` of it changed."""
    adapter = load_adapter(path)
    return Adapter(
        {
            name: LowRank(a=one.a, b=one.b, parts={k: change(v) if k == part else v for k, v in one.parts.items()})
            for name, one in adapter.sites.items()
        }
    )


def without(path, part):
    adapter = load_adapter(path)
    return Adapter({name: one for name, one in adapter.sites.items() if part not in one.parts})


@pytest.mark.parametrize("name", WHOLE)
def test_every_site_is_found_with_its_name_and_shape(name):
    built = build(name)
    sites = find_sites(built.model, adapter=given(name, built))
    assert not sites.left
    # Of a prompt, the first is the number of its tokens.
    rows = [(s.name, s.adapter, s.rank if s.kind == "prompt" else s.d_in, s.d_out) for s in sites]
    assert sorted(rows) == sorted((t.name, t.adapter, t.d_in, t.d_out) for t in built.truth)


@pytest.mark.parametrize("name", WHOLE)
def test_the_extracted_model_is_pytorch_with_every_adapter_of_its_kind(name, tmp_path):
    built, out, session = opened(name, tmp_path)
    assert_checker_passes(out.model_path)
    session.load_adapter("exported", out.adapter_path)
    got = session.run(None, built.feeds, adapter="exported")
    assert_outputs(got, built.expected["a"], CASES[name].atol, f"{name} with its own file")
    for adapter in ("a", "b", "c"):
        session.load_adapter(adapter, built.adapters[adapter])
        got = session.run(None, built.feeds, adapter=adapter)
        assert_outputs(got, built.expected[adapter], CASES[name].atol, f"{name} with {adapter}")


@pytest.mark.parametrize(("name", "port"), [(name, list(PORTS)[i % 2]) for i, name in enumerate(WHOLE)])
def test_ports_that_are_packed_or_external_take_every_kind(name, port, tmp_path):
    built, _, session = opened(name, tmp_path, **PORTS[port])
    for adapter in ("b", "c"):
        session.load_adapter(adapter, built.adapters[adapter])
        got = session.run(None, built.feeds, adapter=adapter)
        assert_outputs(got, built.expected[adapter], CASES[name].atol, f"{name} with {adapter}")


@pytest.mark.parametrize(("name", "site"), [("ts_saved", "classifier"), ("ts_bias", "fc1"), ("dy_prompt", "prompt")])
@pytest.mark.parametrize("port", PORTS)
def test_without_an_adapter_there_is_nothing_to_run(name, site, port, tmp_path):
    built, _, session = opened(name, tmp_path, **PORTS[port])
    session.load_adapter("b", built.adapters["b"])
    with pytest.raises(FeedError, match=rf"no base to run: .*{site}.*loaded: b"):
        session.run(None, built.feeds)
    with pytest.raises(FeedError, match="no base to run"):
        session.bind()


def assert_refused(session, adapter, message):
    with pytest.raises(MismatchError, match=message):
        session.load_adapter("other", adapter)
    assert not session.adapters


def test_an_adapter_without_the_head_is_refused(tmp_path):
    built, _, session = opened("dy_saved", tmp_path)
    bare = without(built.adapters["b"], WHOLE_WEIGHT)
    assert_refused(session, bare, "classifier: adapter says nothing of it, and the model has no base there")


def test_a_head_of_other_classes_is_refused(tmp_path):
    built, _, session = opened("dy_saved", tmp_path)
    wider = changed(built.adapters["b"], WHOLE_WEIGHT, lambda weight: weight[:2])
    assert_refused(session, wider, r"classifier: adapter is 48 -> 2, model is 48 -> 3")


def test_a_prompt_of_another_length_is_refused(tmp_path):
    built, _, session = opened("ts_prompt", tmp_path)
    longer = changed(built.adapters["b"], PROMPT, lambda prompt: prompt.repeat(2, axis=0))
    assert_refused(session, longer, "prompt_encoder: adapter has 10 virtual tokens, model has 5")


def test_a_prompt_of_another_width_is_refused(tmp_path):
    built, _, session = opened("ts_prefix", tmp_path)
    narrow = changed(built.adapters["b"], PROMPT, lambda prompt: prompt[:, :24])
    assert_refused(session, narrow, "prompt_encoder: adapter is 0 -> 24, model is")


def test_a_heads_bias_of_another_width_is_refused(tmp_path):
    built, _, session = opened("ts_saved", tmp_path)
    narrow = changed(built.adapters["b"], WHOLE_BIAS, lambda bias: bias[:, :2])
    assert_refused(session, narrow, "classifier: adapter's whole_bias is for 2 features, model has 3")


def test_an_adapter_without_the_biases_that_were_taken_out_is_refused(tmp_path):
    built, _, session = opened("ts_bias", tmp_path)
    plain = {name: LowRank(a=one.a, b=one.b) for name, one in load_adapter(built.adapters["b"]).sites.items()}
    assert_refused(session, Adapter(plain), "fc1: adapter brings no shift, and the model has no base there")


def test_biases_that_nobody_spoke_of_at_extraction_are_refused_when_an_adapter_brings_them(tmp_path):
    built = build("ts_bias")
    session = AdapterSession(extract_adapters(built.model, tmp_path, make_inputs=True).model_path)
    assert_refused(session, built.adapters["b"], "adapter brings whole_bias, the model's site takes lora_A, lora_B")
