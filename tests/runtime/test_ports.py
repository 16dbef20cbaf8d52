"""What is fed, and what it costs."""

import dataclasses

import numpy as np
import pytest

from adapterx.manifest import Pack
from adapterx.port_dtype import in_dtype
from adapterx.runtime.fit import fit
from adapterx.runtime.inference import ort_values
from adapterx.runtime.ports import graph_inputs, port_arrays, port_names, rounded
from adapterx.site import SiteTable
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


def narrow(dtype, port="input"):
    """The chain's manifest, with ports of another type than its activations."""
    manifest = Chain(port=port).manifest()
    sites = SiteTable(in_dtype(site, dtype) for site in manifest.sites)
    packs = manifest.packs
    if packs and dtype == "int8":
        packs = (*packs, Pack("q_proj.lora_scale.weight.packed", "lora_scale", packs[0].sites))
    return dataclasses.replace(manifest, sites=sites, packs=packs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_ports_get_what_the_adapter_was_fitted_to(dtype):
    manifest = narrow(dtype)
    fitting = fit(adapter_of(), manifest, name="it")
    arrays = port_arrays(fitting, manifest)
    assert {array.dtype.name for array in arrays.values()} == {dtype}
    assert arrays.keys() == graph_inputs(manifest)
    assert all(arrays[name] is array for name, array in fitting.tensors())


def test_codes_are_within_half_a_step_of_each_row_and_come_with_their_scales():
    adapter, manifest = adapter_of(), narrow("int8")
    fitting = fit(adapter, manifest, name="it")
    assert fitting is adapter, "in memory it stays what it is"
    arrays = port_arrays(fitting, manifest)
    assert arrays.keys() == graph_inputs(manifest) <= port_names(manifest)
    for name, change in adapter.sites.items():
        scale = arrays[f"{name}.lora_scale.weight"]
        assert (scale.dtype, scale.shape) == (np.float32, (change.rank, 2))
        for column, (side, exact) in enumerate((("lora_A", change.a), ("lora_B", change.b))):
            codes = arrays[f"{name}.{side}.weight"]
            assert codes.dtype == np.int8
            steps = scale[:, column : column + 1]
            assert (np.abs(codes * steps - exact) <= 0.5001 * steps).all()
            np.testing.assert_allclose(steps[:, 0], np.abs(exact).max(axis=1) / 127, rtol=1e-6)
    assert all(not array.flags.writeable for array in arrays.values())


def test_packed_codes_lie_as_packed_floats_do_with_scales_of_zero_where_a_member_has_less_rank():
    manifest = narrow("int8", "packed")
    adapter = adapter_of(ranks={NAMES[0]: 1, NAMES[2]: 4})
    arrays = port_arrays(adapter, manifest)
    alone = port_arrays(adapter, narrow("int8"))
    for side in ("lora_A", "lora_B", "lora_scale"):
        stacked = arrays[f"q_proj.{side}.weight.packed"].reshape(3, 4, -1)
        assert stacked.dtype == (np.float32 if side == "lora_scale" else np.int8)
        np.testing.assert_array_equal(stacked[2], alone[f"{NAMES[2]}.{side}.weight"])
        np.testing.assert_array_equal(stacked[0, :1], alone[f"{NAMES[0]}.{side}.weight"])
        assert not stacked[0, 1:].any()
        assert not stacked[1].any()


def test_where_nothing_is_optional_codes_and_scales_are_of_no_rows():
    manifest = dataclasses.replace(narrow("int8"), optional=False)
    arrays = port_arrays(None, manifest)
    assert arrays.keys() == graph_inputs(manifest)
    assert {len(array) for array in arrays.values()} == {0}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_rounded_is_what_ports_compute_with(dtype):
    adapter, manifest = adapter_of(), narrow(dtype)
    there = rounded(adapter, manifest)
    assert there != adapter
    assert {change.dtype.name for change in there.sites.values()} == {"float32"}
    before, after = (port_arrays(fit(one, manifest, name="it"), manifest) for one in (adapter, there))
    for name, array in before.items():
        np.testing.assert_allclose(after[name].astype(np.float64), array.astype(np.float64), rtol=1e-6, err_msg=name)
    assert rounded(adapter, Chain().manifest()) is adapter
