"""The zoo's exports of every kind beside linear LoRA: found, extracted, and PyTorch with adapters that were not in."""

import pytest

from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.runtime.session import AdapterSession
from tests.graph.test_zoo import assert_checker_passes, assert_outputs, exported_adapter
from tests.zoo import CASES, build

# Whole modules, biases and prompts have no base in the graph, and are tested by themselves.
DONE = {case.kind for case in CASES.values()} - {"lora", "saved", "bias", "prompt", "prefix"}
KINDS = [name for name, case in CASES.items() if case.kind in DONE and not case.unsupported]
SEVERAL = [name for name in KINDS if CASES[name].lora and CASES[name].lora.also]
ALONE = [name for name in KINDS if name not in SEVERAL]
# Where the graph holds the product only, its rank is that of the product.
OF_ANOTHER_RANK = {"loha", "lokr", "ia3"}


@pytest.mark.parametrize("name", KINDS)
def test_every_site_of_every_kind_is_found_with_its_name_and_shape(name):
    built, case = build(name), CASES[name]
    sites = find_sites(built.model, adapter=exported_adapter(name, built))
    assert not sites.left
    assert sorted((s.name, s.d_in, s.d_out) for s in sites) == sorted((t.name, t.d_in, t.d_out) for t in built.truth)
    if case.kind not in OF_ANOTHER_RANK:
        assert sorted((s.name, s.rank) for s in sites) == sorted((t.name, t.rank) for t in built.truth)
    # (IA)3 as TorchScript exports it, and what lost its metadata, does not tell the adapter's name.
    assert {s.adapter for s in sites} <= {"", *(t.adapter for t in built.truth)}


@pytest.mark.parametrize("name", ALONE)
def test_the_extracted_model_is_pytorch_with_every_adapter_of_its_kind_and_with_none(name, tmp_path):
    built, case = build(name), CASES[name]
    out = extract_adapters(built.model, tmp_path, make_inputs=True, adapter=exported_adapter(name, built))
    assert_checker_passes(out.model_path)
    session = AdapterSession(out.model_path, adapters={"exported": out.adapter})
    assert_outputs(session.run(None, built.feeds, adapter="exported"), built.expected["a"], case.atol, name)
    assert_outputs(session.run(None, built.feeds), built.expected["base"], case.atol, f"{name} without adapter")
    assert set(built.adapters) == {"a", "b", "c"}, "a round trip alone proves little"
    for adapter in built.adapters:
        session.load_adapter("different", built.adapters[adapter])
        got = session.run(None, built.feeds, adapter="different")
        assert_outputs(got, built.expected[adapter], case.atol, f"{name} with {adapter}")


# Each case in one of the two other modes; the mode does not depend on where the graph came from.
@pytest.mark.parametrize(("name", "packed"), [(name, i % 2 == 0) for i, name in enumerate(ALONE)])
def test_ports_that_are_packed_or_external_take_every_kind(name, packed, tmp_path):
    built, case = build(name), CASES[name]
    exported = exported_adapter(name, built)
    out = extract_adapters(built.model, tmp_path, make_inputs=packed, pack_inputs=packed, adapter=exported)
    session = AdapterSession(out.model_path, adapters={key: built.adapters[key] for key in ("b", "c")})
    for adapter in ("b", "c"):
        got = session.run(None, built.feeds, adapter=adapter)
        assert_outputs(got, built.expected[adapter], case.atol, f"{name} with {adapter}")
    assert_outputs(session.run(None, built.feeds), built.expected["base"], case.atol, f"{name} without adapter")


@pytest.mark.parametrize("name", SEVERAL)
def test_each_of_several_active_adapters_is_extracted_by_its_name(name, tmp_path):
    built, case = build(name), CASES[name]
    out = extract_adapters(built.model, tmp_path, make_inputs=True)
    assert set(out.adapters) == {"default", "style"}
    session = AdapterSession(out.model_path, adapters={"a": out.adapter, **out.adapters})
    assert_outputs(session.run(None, built.feeds), built.expected["base"], case.atol, f"{name} without adapter")
    for adapter in ("a", "default", "style"):
        got = session.run(None, built.feeds, adapter=adapter)
        assert_outputs(got, built.expected[adapter], case.atol, f"{name} with {adapter}")
