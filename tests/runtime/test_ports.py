"""What is fed, and what it costs."""

import numpy as np

from adapterx.runtime.inference import ort_values
from adapterx.runtime.ports import graph_inputs, port_arrays, port_names
from tests.runtime.chain import NAMES, Chain, adapter_of


def test_optional_ports_that_an_adapter_says_nothing_of_are_not_fed():
    adapter = adapter_of(ranks={NAMES[3]: 2})
    for port in ("input", "packed"):
        manifest = Chain(port=port).manifest()
        assert port_arrays(None, manifest) == {}
        assert set(port_arrays(adapter, manifest)) == {f"{NAMES[3]}.lora_A.weight", f"{NAMES[3]}.lora_B.weight"}
        assert set(port_arrays(adapter, Chain(port=port, optional=False).manifest())) == graph_inputs(manifest)


def test_what_is_fed_is_the_adapters_own_memory_down_to_onnx_runtime():
    adapter = adapter_of()
    for name, value in ort_values(port_arrays(adapter, Chain().manifest())).items():
        assert value.data_ptr() == dict(adapter.tensors())[name].ctypes.data


def test_members_of_a_pack_are_stacked_in_its_order_and_padded_to_its_largest_rank():
    adapter = adapter_of(ranks={NAMES[0]: 1, NAMES[2]: 4})
    stacked = port_arrays(adapter, Chain(port="packed").manifest())["q_proj.lora_A.weight.packed"].reshape(3, 4, 8)
    assert np.array_equal(stacked[0, :1], adapter.sites[NAMES[0]].a)
    assert np.array_equal(stacked[2], adapter.sites[NAMES[2]].a)
    assert not stacked[0, 1:].any()
    assert not stacked[1].any()


def test_the_names_of_ports_cover_files_packs_and_mask():
    names = port_names(Chain(port="packed").manifest())
    assert {"adapter_mask", "q_proj.lora_B.weight.packed", f"{NAMES[0]}.lora_A.weight"} <= names
    assert "x" not in names
    assert graph_inputs(Chain(port="external").manifest()) == frozenset()
