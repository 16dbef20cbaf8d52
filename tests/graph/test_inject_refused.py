"""What cannot be injected is refused before anything is written, with what to do."""

from __future__ import annotations

import re

import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import MismatchError, ModelError, OptionError
from adapterx.graph.inject import inject_adapters
from adapterx.graph.load import load_model
from adapterx.manifest import manifest_of
from tests.graph.base_models import D_OUT, PICTURES, ROWS, C, W, floats, proto, two_layers
from tests.zoo import build


def refused(error, said, tmp_path, model=None, **options):
    with pytest.raises(error, match=said):
        inject_adapters(model or two_layers(), tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists(), "nothing is written before an error"


def adapter(**sites):
    return Adapter({n.replace("__", "."): LowRank(a=floats(2, i), b=floats(2, o)) for n, (i, o) in sites.items()})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (adapter(fc1=(16, 24), fc2=(24, 9)), r"at 2 of 2 sites.*fc1: adapter is 16 -> 24, model is 32 -> 24.*24 -> 9"),
        (adapter(fc1=(32, 24), fc3=(24, 7)), r"fc3: no such module; nearest is model\.fc"),
        (adapter(other=(32, 24)), "other: no such module"),
        (Adapter({"fc1": LowRank(a=floats(2, 32, 3), b=floats(2, 24))}), r"kernel of \(3,\), model of \(\)"),
        (Adapter({"prompt": LowRank.of_parts({"prompt": floats(4, 32)})}), "virtual tokens stand beside no operation"),
        (Adapter(dict(adapter(fc1=(32, 24)).sites), {"base_fingerprint": "ab" * 32}), "fingerprint abab"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_base_is_refused_with_every_fault(given, said, tmp_path):
    refused(MismatchError, re.compile(said, re.DOTALL), tmp_path, adapter=given)


def test_sites_that_other_files_of_the_export_hold_are_noted_when_that_is_said(tmp_path):
    out = inject_adapters(two_layers(), tmp_path, adapter=adapter(fc1=(32, 24), fc3=(24, 7)), partial=True)
    assert out.sites.names == ["fc1"]
    assert manifest_of(load_model(out.model_path).metadata_props, where="it").elsewhere == ("fc3",)
    refused(MismatchError, "other: no such module", tmp_path, adapter=adapter(other=(32, 24)), partial=True)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, OptionError, "one of the two; got neither"),
        ({"targets": "fc1", "adapter": adapter(fc1=(32, 24))}, OptionError, "got both"),
        ({"targets": "fc1", "kinds": ["dorra"]}, OptionError, "got dorra; nearest is dora"),
        ({"targets": "fc1", "kinds": "lora"}, OptionError, "kinds is a list of"),
        ({"targets": "fc1", "kinds": ["prompt"]}, OptionError, "got prompt"),
        ({"targets": "fc1", "pack_inputs": True, "make_inputs": False}, OptionError, "needs make_inputs=True"),
        ({"targets": "fc9"}, ModelError, "no module of the model is meant by"),
    ],
)
def test_options_that_contradict_each_other_or_mean_nothing_are_refused(options, error, said, tmp_path):
    refused(error, said, tmp_path, **options)


def test_a_model_that_has_ports_or_an_adapter_already_is_refused(tmp_path):
    out = inject_adapters(two_layers(), tmp_path / "once", targets="fc1")
    refused(ModelError, "has ports for adapters already", tmp_path, model=out.model_path, targets="fc2")
    with pytest.raises(ModelError, match="into another folder"):
        inject_adapters(out.model_path, tmp_path / "once", targets="fc2")
    exported = build("ts_mlp").model
    refused(ModelError, "holds an adapter at 3 sites, the first at fc1; extract_adapters", tmp_path, model=exported,
            targets="fc1")  # fmt: skip


def test_a_convolution_with_a_normalization_folded_in_is_refused(tmp_path):
    """The adapter was trained in front of the normalization: what it adds would come out unscaled, silently."""
    names = {"w": "stem.conv.weight", "c": "stem.conv.weight_bias"}
    tensors = {"w": floats(D_OUT, 6, 3, 3), "c": C}
    model = proto("y = Conv(x, w, c)", tensors, inputs=PICTURES, outputs="float[n,24,h,w] y", names=names)
    change = Adapter({"stem.conv": LowRank(a=floats(2, 6, 3, 3), b=floats(2, D_OUT))})
    refused(MismatchError, "stem.conv: the module has a normalization folded", tmp_path, model=model, adapter=change)
    refused(ModelError, "'conv': stem.conv has a normalization folded", tmp_path, model=model, targets="conv")


def test_a_base_without_names_is_refused_with_what_to_do(tmp_path):
    model = proto("y = MatMul(x, w)", {"w": W})
    refused(ModelError, "nothing names the 1 base operations", tmp_path, model=model, targets="all-linear")


@pytest.mark.parametrize(
    ("body", "kinds", "said"),
    [
        ("m = MatMul(x, w)\ny = com.microsoft.BiasGelu(m, c)", ["dora"], "an optimizer moved its bias"),
        ("y = Gemm(x, w, r)", ["ia3"], "also adds something else"),
        ("q, s, z = DynamicQuantizeLinear(x)\nd = DequantizeLinear(q, s, z)\ny = MatMul(d, w)", ["ia3"], "reads codes"),
    ],
)
def test_gains_and_shifts_that_a_fused_graph_has_no_place_for_are_refused(body, kinds, said, tmp_path):
    tensors = {"w": W, **({"c": C} if "c)" in body else {})}
    model = proto(body, tensors, inputs=f"{ROWS}, float[n,24] r", outputs="float[n,24] y", names={"w": "fc.weight"})
    refused(MismatchError, said, tmp_path, model=model, targets="fc", kinds=kinds)
    inject_adapters(model, tmp_path / "lora", targets="fc")


def test_an_activation_that_has_no_operator_is_refused(tmp_path):
    body = 'y = com.microsoft.FusedGemm<activation="ThresholdedRelu", activation_alpha=1.0>(x, w)'
    model = proto(body, {"w": W}, inputs=ROWS, outputs="float[n,24] y", names={"w": "fc.weight"})
    refused(ModelError, "cannot be taken apart", tmp_path, model=model, targets="fc")
