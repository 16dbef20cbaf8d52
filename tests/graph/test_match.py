"""Branches without names get those of the adapter that was exported: by value, by shape, or not at all."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import MismatchError
from adapterx.graph.extract import extract_adapters
from adapterx.graph.sites import find_sites
from adapterx.manifest import KEY, Manifest
from tests.graph.text_models import Layer, text_model

SQUARE = (Layer("model.layers.0.q", 6, 6, 2, 2.0), Layer("model.layers.1.q", 6, 6, 2, 0.5))
WIDE, NARROW = Layer("model.up", 6, 8, 2, 1.5), Layer("model.down", 8, 6, 2, 1.5)


def anonymous(model, keep=()):
    """The model with the weights' names gone, but for layers in ``keep``; its adapter, by the layers' names."""
    proto = onnx.ModelProto.FromString(model.proto.SerializeToString())
    weights = [tensor.name for tensor in proto.graph.initializer if "lora" in tensor.name]
    plain = {name: f"k{i}" for i, name in enumerate(weights) if not any(layer in name for layer in keep)}
    for tensor in proto.graph.initializer:
        tensor.name = plain.get(tensor.name, tensor.name)
    for node in proto.graph.node:
        node.input[:] = [plain.get(name, name) for name in node.input]
    return proto, {name: LowRank(a=a, b=b) for name, (a, b) in model.exported().items()}


def noisy(low_rank, size, *, sides="ab"):
    """``low_rank`` with the first element of ``sides`` moved by ``size`` of the largest."""
    arrays = {"a": low_rank.a.copy(), "b": low_rank.b.copy()}
    for side in sides:
        arrays[side][0, 0] += np.float32(size) * np.abs(arrays[side]).max()
    return LowRank(**arrays)


def rows(sites):
    return [(site.name, site.name_source) for site in sites]


def test_branches_of_one_shape_are_told_apart_by_value_scale_included():
    proto, sites = anonymous(text_model(SQUARE))
    found = find_sites(proto, adapter=Adapter(dict(reversed(sites.items()))))
    assert rows(found) == [(layer.name, "adapter_values") for layer in SQUARE]
    assert [site.scale for site in found] == [2.0, 0.5]


def test_what_rounding_moves_is_the_same_value_and_what_a_percent_moves_is_another():
    proto, sites = anonymous(text_model(SQUARE))
    rounded = {name: noisy(one, 5e-6) for name, one in sites.items()}
    assert len(find_sites(proto, adapter=Adapter(rounded))) == 2
    for sides in ("a", "b"):
        other = {name: noisy(one, 1e-2, sides=sides) for name, one in sites.items()}
        with pytest.raises(MismatchError, match="no branch has its values"):
            find_sites(proto, adapter=Adapter(other))


def test_an_adapter_in_half_precision_is_the_same_to_half_precision():
    proto, sites = anonymous(text_model(SQUARE))
    half = {name: LowRank(a=one.a.astype(np.float16), b=one.b.astype(np.float16)) for name, one in sites.items()}
    assert rows(find_sites(proto, adapter=Adapter(half))) == [(layer.name, "adapter_values") for layer in SQUARE]


def test_tiny_values_are_compared_by_their_own_size():
    proto, sites = anonymous(text_model(SQUARE))
    tensors = {t.name: t for t in proto.graph.initializer}
    for name in ("k0", "k1", "k2", "k3"):
        small = onnx.numpy_helper.to_array(tensors[name]) * np.float32(1e-6)
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(small, name))
    tiny = {name: LowRank(a=one.a * np.float32(1e-6), b=one.b * np.float32(1e-6)) for name, one in sites.items()}
    assert rows(find_sites(proto, adapter=Adapter(tiny))) == [(layer.name, "adapter_values") for layer in SQUARE]


def test_another_adapter_names_by_shape_where_one_branch_and_one_site_have_it():
    proto, sites = anonymous(text_model((WIDE, NARROW)))
    other = {name: noisy(one, 0.5) for name, one in sites.items()}
    assert rows(find_sites(proto, adapter=Adapter(other))) == [
        ("model.up", "adapter_shapes"), ("model.down", "adapter_shapes"),
    ]  # fmt: skip


def test_another_rank_is_no_hindrance_to_a_name_by_shape():
    proto, _ = anonymous(text_model((WIDE, NARROW)))
    _, sites = anonymous(text_model((Layer("model.up", 6, 8, 3, 1.5), Layer("model.down", 8, 6, 3, 1.5))))
    assert rows(find_sites(proto, adapter=Adapter(sites))) == [
        ("model.up", "adapter_shapes"), ("model.down", "adapter_shapes"),
    ]  # fmt: skip


def test_one_site_of_a_shape_and_two_branches_are_not_guessed():
    proto, sites = anonymous(text_model(SQUARE))
    with pytest.raises(MismatchError, match="6 -> 2 -> 6") as error:
        find_sites(proto, adapter=Adapter({"model.layers.0.q": noisy(sites["model.layers.0.q"], 0.5)}))
    assert "Several of one shape" in str(error.value)


def test_sites_that_could_be_mixed_up_are_refused_although_others_are_certain():
    layers = (*SQUARE, Layer("model.layers.2.up", 6, 8, 2, 1.5))
    proto, sites = anonymous(text_model(layers))
    for name in ("model.layers.0.q", "model.layers.1.q"):
        sites[name] = noisy(sites[name], 0.5)
    with pytest.raises(MismatchError, match=r"^2 sites of the given adapter"):
        find_sites(proto, adapter=Adapter(sites))


def test_two_sites_of_a_shape_and_one_branch_are_not_guessed():
    proto, sites = anonymous(text_model(SQUARE[:1]))
    other = noisy(sites["model.layers.0.q"], 0.5)
    with pytest.raises(MismatchError, match="2 sites of the given adapter"):
        find_sites(proto, adapter=Adapter({"model.layers.0.q": other, "model.layers.1.q": other}))


def test_equal_sites_are_not_told_apart_by_value():
    proto, sites = anonymous(text_model(SQUARE[:1]))
    same = sites["model.layers.0.q"]
    with pytest.raises(MismatchError, match="2 sites of the given adapter"):
        find_sites(proto, adapter=Adapter({"model.layers.0.q": same, "model.layers.1.q": same}))


def test_a_site_that_has_its_name_is_not_given_to_another_branch():
    proto, sites = anonymous(text_model(SQUARE), keep=["model.layers.0.q"])
    found = find_sites(proto, adapter=Adapter(sites))
    assert rows(found) == [("model.layers.0.q", "initializer"), ("model.layers.1.q", "adapter_values")]
    taken = Adapter({"model.layers.0.q": sites["model.layers.1.q"]})
    assert rows(find_sites(proto, adapter=taken)) == [("model.layers.0.q", "initializer")]


def test_a_value_match_leaves_its_site_to_no_shape_match():
    layers = (SQUARE[0], SQUARE[1])
    proto, sites = anonymous(text_model(layers))
    one = Adapter({"model.layers.0.q": sites["model.layers.0.q"]})
    assert rows(find_sites(proto, adapter=one)) == [("model.layers.0.q", "adapter_values")]


def test_sites_of_other_files_of_the_export_are_passed_over_and_noted(tmp_path):
    proto, sites = anonymous(text_model((WIDE,)))
    elsewhere = LowRank(a=np.ones((2, 5), np.float32), b=np.ones((2, 5), np.float32))
    adapter = Adapter({**sites, "decoder.q": elsewhere}, {"base_model": "some/checkpoint"})
    out = extract_adapters(proto, tmp_path, make_inputs=True, adapter=adapter)
    assert out.sites.names == ["model.up"]
    manifest = Manifest.loads(onnx.load(out.model_path).metadata_props[0].value, where=KEY)
    assert (manifest.elsewhere, manifest.base_model) == (("decoder.q",), "some/checkpoint")


def test_an_adapter_of_which_nothing_is_there_is_refused():
    proto, _ = anonymous(text_model((WIDE,)))
    elsewhere = LowRank(a=np.ones((2, 5), np.float32), b=np.ones((2, 5), np.float32))
    with pytest.raises(MismatchError, match=r"decoder\.q: 5 -> 2 -> 5, no branch has its values"):
        find_sites(proto, adapter=Adapter({"decoder.q": elsewhere}))


@pytest.mark.parametrize("given", ["encoder.model.up", "up"])
def test_a_name_that_differs_by_leading_parts_becomes_the_adapters(given):
    model = text_model((WIDE,))
    _, sites = anonymous(model)
    assert find_sites(model.proto, adapter=Adapter({given: sites["model.up"]})).names == [given]


def test_a_name_that_only_ends_in_the_same_letters_is_another():
    model = text_model((WIDE,))
    _, sites = anonymous(model)
    with pytest.raises(MismatchError, match=r"supermodel\.up"):
        find_sites(model.proto, adapter=Adapter({"supermodel.up": sites["model.up"]}))


@pytest.mark.parametrize("shape", [(8, 6), (6, 7)])
def test_a_name_with_the_same_end_and_other_widths_is_another(shape):
    """`up` of one model is not `mlp.up` of an adapter for another."""
    a, b = (np.ones((2, width), np.float32) for width in shape)
    with pytest.raises(MismatchError, match=r"encoder\.model\.up"):
        find_sites(text_model((WIDE,)).proto, adapter=Adapter({"encoder.model.up": LowRank(a=a, b=b)}))


def test_of_several_names_with_the_same_end_the_one_of_equal_values_is_taken():
    model = text_model((WIDE,))
    _, sites = anonymous(model)
    both = {"decoder.model.up": noisy(sites["model.up"], 0.5), "encoder.model.up": sites["model.up"]}
    assert find_sites(model.proto, adapter=Adapter(both)).names == ["encoder.model.up"]
