"""Ports of plain LoRA take every kind that comes down to two matrices, and refuse what brings more."""

import pytest

from adapterx.errors import MismatchError
from adapterx.graph.extract import extract_adapters
from adapterx.runtime.session import AdapterSession
from tests.graph.test_zoo import assert_outputs
from tests.zoo import CASES, build


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """The model ``mlp`` with the ports of the LoRA that was exported with it: fed, packed and external."""
    modes = {"fed": {"make_inputs": True}, "packed": {"make_inputs": True, "pack_inputs": True}, "external": {}}
    made = {}
    for name, options in modes.items():
        out = extract_adapters(build("ts_mlp").model, tmp_path_factory.mktemp(name), **options)
        made[name] = AdapterSession(out.model_path)
    return made


@pytest.mark.parametrize("mode", ["fed", "packed", "external"])
@pytest.mark.parametrize("name", ["ts_loha", "dy_lokr", "dy_lokr_both", "ts_vera_mlp", "ts_adalora"])
def test_adapters_of_two_matrices_run_on_the_ports_of_lora(name, mode, sessions):
    built = build(name)
    for adapter in built.adapters.keys() & built.expected.keys():
        sessions[mode].load_adapter(name, built.adapters[adapter])
        got = sessions[mode].run(None, built.feeds, adapter=name)
        assert_outputs(got, built.expected[adapter], CASES[name].atol, f"{name} {adapter}")


@pytest.mark.parametrize(("name", "brings"), [("ts_dora", "magnitude"), ("ts_ia3", "gain"), ("ts_lora_bias", "shift")])
def test_what_brings_more_than_two_matrices_is_refused_by_what_it_brings(name, brings, sessions):
    with pytest.raises(MismatchError, match=rf"fc1: adapter brings.*{brings}.*model's site takes lora_A, lora_B"):
        sessions["fed"].load_adapter("more", build(name).adapters["b"])
