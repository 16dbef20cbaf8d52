"""A file for a whole pipeline gives each model its own, under the names that the model has."""

import numpy as np
import pytest

import adapterx as ax
from adapterx.pipeline import component, for_model
from adapterx.runtime.fit import fitted
from adapterx.site import AdapterSite

UNET = {"down_blocks.0.attn1.to_q": (4, 6), "mid_block.resnets.0.conv_1": (8, 3), "conv_in": (2, 2)}
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj": (5, 5), "text_model.encoder.layers.1.mlp.fc1": (5, 7)}
KOHYA = {"lora_unet_": UNET, "lora_te_": TEXT}


def change(shape: tuple[int, int] = (4, 6), rank: int = 2) -> ax.LowRank:
    d_in, d_out = shape
    return ax.LowRank(a=np.ones((rank, d_in), np.float32), b=np.ones((rank, d_out), np.float32))


def kohya(**models: dict) -> ax.Adapter:
    return ax.Adapter(
        {
            f"{prefix}_{name.replace('.', '_')}": change(shape)
            for prefix, m in models.items()
            for name, shape in m.items()
        }
    )


def diffusers(**models: dict) -> ax.Adapter:
    return ax.Adapter({f"{model}.{name}": change(shape) for model, m in models.items() for name, shape in m.items()})


@pytest.mark.parametrize("sites", [UNET, TEXT], ids=["unet", "text encoder"])
@pytest.mark.parametrize("adapter", [kohya(lora_unet=UNET, lora_te=TEXT), diffusers(unet=UNET, text_encoder=TEXT)])
def test_each_model_gets_its_own_and_is_told_of_the_rest(adapter: ax.Adapter, sites: dict) -> None:
    mine = for_model(adapter, sites)
    assert set(mine.sites) == set(sites)
    left = "text_encoder (2 sites)" if sites is UNET else "unet (3 sites)"
    assert mine.metadata == {"left_out": left}


@pytest.mark.parametrize("wrapper", ["unet.", "model.m.", ""])
@pytest.mark.parametrize("adapter", [kohya(lora_unet=UNET, lora_te=TEXT), diffusers(unet=UNET, text_encoder=TEXT)])
def test_parts_that_a_wrapper_put_in_front_are_no_matter(adapter: ax.Adapter, wrapper: str) -> None:
    sites = {wrapper + name: shape for name, shape in UNET.items()}
    assert set(for_model(adapter, sites).sites) == set(sites)


def test_parts_that_an_export_took_away_are_no_matter() -> None:
    sites = {name.removeprefix("text_model."): shape for name, shape in TEXT.items()}
    assert set(for_model(kohya(lora_te=TEXT), sites).sites) == set(sites)


def test_stabilitys_names_find_the_sites_of_diffusers() -> None:
    adapter = kohya(lora_unet={"input_blocks.4.1.proj_in": (4, 6)})
    assert list(for_model(adapter, {"down_blocks.1.attentions.0.proj_in": (4, 6)}).sites) == [
        "down_blocks.1.attentions.0.proj_in"
    ]


def test_two_text_encoders_are_told_apart_by_their_shapes() -> None:
    wide = dict.fromkeys(TEXT, (9, 9))
    for adapter in (kohya(lora_te1=TEXT, lora_te2=wide), diffusers(text_encoder=TEXT, text_encoder_2=wide)):
        assert {one.d_in for one in for_model(adapter, wide).sites.values()} == {9}
        assert {one.d_in for one in for_model(adapter, TEXT).sites.values()} == {5}
    twins = kohya(lora_te1=TEXT, lora_te2=TEXT)
    with pytest.raises(ax.MismatchError, match=r"text_encoder and text_encoder_2, and both fit .*component="):
        for_model(twins, TEXT)
    chosen = component(twins, "text_encoder_2")
    assert all(name.startswith("lora_te2_") for name in chosen.sites)
    assert set(for_model(chosen, TEXT).sites) == set(TEXT)
    with pytest.raises(ax.OptionError, match=r"changes for text_encoder, text_encoder_2; nearest is text_encoder"):
        component(twins, "text_encoder_3")


def test_a_name_that_two_sites_flatten_to_is_refused_with_both() -> None:
    with pytest.raises(ax.MismatchError, match=r"lora_unet_a_b may be a\.b or a_b of this model"):
        for_model(kohya(lora_unet={"a.b": (4, 6)}), {"a.b": (4, 6), "a_b": (4, 6)})


def test_two_names_for_one_site_are_refused_with_both() -> None:
    adapter = kohya(lora_unet={"input_blocks.0.0": (2, 2), "conv_in": (2, 2)})
    with pytest.raises(ax.MismatchError, match="lora_unet_conv_in and lora_unet_input_blocks_0_0 for conv_in"):
        for_model(adapter, UNET)


def test_a_graph_of_a_whole_pipeline_takes_all() -> None:
    adapter = diffusers(unet=UNET, text_encoder=TEXT)
    assert for_model(adapter, dict.fromkeys(adapter.sites)) is adapter


@pytest.mark.parametrize("names", [["transformer.h.0.attn", "transformer.h.1.attn"], ["unet.x", "lm_head"], ["fc"]])
def test_an_adapter_of_one_model_is_left_as_it_is(names: list[str]) -> None:
    adapter = ax.Adapter({name: change() for name in names})
    assert for_model(adapter, {"h.0.attn": (4, 6)}) is adapter


def site(name: str, kernel: tuple = (), d_in: int = 4) -> AdapterSite:
    op = "Conv" if kernel else "MatMul"
    return AdapterSite(name, "", "lora", op, d_in, 6, 2, 1.0, "float32", "initializer", "", kernel)


def test_a_file_of_kohya_fits_a_model_by_its_sites_and_a_site_that_is_missing_is_named() -> None:
    sites = [site("down_blocks.0.attn1.to_q"), site("down_blocks.0.attn1.to_k")]
    given = {"down_blocks.0.attn1.to_q": (4, 6)}
    assert list(fitted(kohya(lora_unet=given, lora_te=TEXT), sites).sites) == list(given)
    with pytest.raises(ax.MismatchError, match="lora_unet_down_blocks_0_attn1_to_v: no such site"):
        fitted(kohya(lora_unet=given | {"down_blocks.0.attn1.to_v": (4, 6)}), sites)
    with pytest.raises(ax.MismatchError, match="no such site"):
        fitted(kohya(lora_te=TEXT), sites)


def test_a_linear_layer_takes_a_convolution_of_width_1_and_the_other_way_round() -> None:
    flat = change()
    wide = ax.LowRank(a=flat.a.reshape(2, 4, 1, 1), b=flat.b)
    name = "down_blocks.0.attn1.to_q"
    linear = fitted(ax.Adapter({name: wide}), [site(name)]).sites[name]
    np.testing.assert_array_equal(linear.a, flat.a)
    assert fitted(ax.Adapter({name: flat}), [site(name, (1, 1))]).sites[name].a.shape == (2, 4, 1, 1)
    with pytest.raises(ax.MismatchError, match="kernel"):
        fitted(ax.Adapter({name: ax.LowRank(a=np.ones((2, 4, 3, 3), np.float32), b=flat.b)}), [site(name)])
