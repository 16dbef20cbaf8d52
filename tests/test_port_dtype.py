"""Which element types ports can have, and what of an adapter they can hold."""

import ml_dtypes
import numpy as np
import pytest

from adapterx.adapter import GAIN, LORA_A, LORA_B, SHIFT, Adapter, LowRank
from adapterx.errors import MismatchError, OptionError
from adapterx.manifest import Manifest
from adapterx.port_dtype import cast_for, check, for_ports, in_dtype
from adapterx.site import LORA_SCALE, LOW_RANK, AdapterSite, SiteTable


def site(name="fc", *, dtype="float32", op="MatMul", kernel=(), ports=LOW_RANK):
    return AdapterSite(name, "", "lora", op, 4, 3, 2, 1.0, dtype, "structure", "", kernel, ports)


def change(value=1.0, dtype=np.float32, **parts):
    a, b = np.full((2, 4), value, dtype), np.full((2, 3), value, dtype)
    return LowRank(a=a, b=b, parts={name: np.full((1, 3), part, dtype) for name, part in parts.items()})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_only_the_matrices_of_linear_layers_change_their_type(dtype):
    linear = in_dtype(site(ports=(*LOW_RANK, GAIN)), dtype)
    assert (linear.dtype, linear.x_dtype, linear.dtype_of(LORA_B), linear.dtype_of(GAIN)) == (
        dtype, "float32", dtype, "float32",
    )  # fmt: skip
    for other in (site(op="Conv", kernel=(3,)), site(op="Gather"), site(ports=(GAIN, SHIFT))):
        assert in_dtype(other, dtype) is other


def test_the_type_of_the_activations_is_no_other_type():
    assert in_dtype(site(dtype="float16"), "float16") == site(dtype="float16")
    assert in_dtype(in_dtype(site(), "int8"), "float32") == site()
    assert in_dtype(site(), None).activations == ""


def test_codes_have_a_scale_for_each_row_of_both_matrices():
    codes = in_dtype(site(), "int8")
    assert codes.graph_ports == (LORA_A, LORA_B, LORA_SCALE)
    assert (codes.rows(LORA_SCALE), codes.width(LORA_SCALE), codes.dtype_of(LORA_SCALE)) == (2, (2,), "float32")
    assert codes.ports == site().ports


@pytest.mark.parametrize(
    ("given", "as_inputs", "said"),
    [("int4", True, "must be one of float32, float16, bfloat16, int8; got 'int4'; nearest is int8"),
     ("int8", False, "make_inputs=True: of initializers ONNX Runtime makes floats"),
     ("float64", True, "got 'float64'")],
)  # fmt: skip
def test_what_there_is_not_is_refused(given, as_inputs, said):
    with pytest.raises(OptionError, match=said):
        check(given, as_inputs=as_inputs)


@pytest.mark.parametrize("given", [None, "float32", "float16", "bfloat16"])
def test_floats_can_be_initializers_too(given):
    check(given, as_inputs=False)


@pytest.mark.parametrize(
    ("ports", "activations", "value", "said"),
    [("float16", "float32", 1e5, "infinite in the model's float16"),
     ("float32", "float16", 1e5, "infinite in the model's float16"),
     ("int8", "float16", 1e5, "infinite in the model's float16"),
     ("int8", "float32", np.nan, "NaN and infinity have no int8 codes"),
     ("int8", "float32", np.inf, "NaN and infinity have no int8 codes")],
)  # fmt: skip
def test_what_ports_or_activations_cannot_hold_is_told(ports, activations, value, said):
    assert said in cast_for(change(value), in_dtype(site(dtype=activations), ports))


@pytest.mark.parametrize(("ports", "value"), [("bfloat16", 1e5), ("int8", 1e5), ("float16", np.inf)])
def test_what_they_hold_is_taken(ports, value):
    assert isinstance(cast_for(change(value), in_dtype(site(), ports)), LowRank)


@pytest.mark.parametrize(
    ("ports", "parts", "fitted"),
    [("float16", {}, "float16"), ("bfloat16", {}, "bfloat16"), ("int8", {}, "float32"),
     ("float16", {GAIN: 2.0}, "float32"), ("int8", {GAIN: 2.0}, "float32")],
)  # fmt: skip
def test_in_memory_an_adapter_is_float_and_of_one_type(ports, parts, fitted):
    where = in_dtype(site(ports=(*LOW_RANK, *parts)), ports)
    for given in (np.float32, np.float16, ml_dtypes.bfloat16):
        assert cast_for(change(dtype=given, **parts), where).dtype == np.dtype(fitted)
    same = change(dtype=np.dtype(fitted), **parts)
    assert cast_for(same, where) is same


def test_every_site_whose_port_cannot_hold_the_adapter_is_named():
    sites = [in_dtype(site(name), "float16") for name in ("one", "two", "three")]
    adapter = Adapter({"one": change(1e6), "two": change(), "three": change(-1e6)})
    with pytest.raises(MismatchError, match=r"(?s)float16 at 2 of 3 sites:.*  one: finite.*  three: .*bfloat16 has"):
        for_ports(adapter, sites, "float16")


def test_a_manifest_says_both_types_and_an_older_one_says_one():
    half = in_dtype(site(), "int8")
    manifest = Manifest(SiteTable([half, site("old")]), "input", dynamic_rank=True, optional=True, fingerprint="")
    text = manifest.dumps()
    assert Manifest.loads(text, where="m").sites == [half, site("old")]
    before = text.replace(',"activations":""', "")
    assert before != text
    assert Manifest.loads(before, where="m").sites[1].x_dtype == "float32"
    assert "fc.lora_scale.weight" in manifest.tensor_names()["fc"]
