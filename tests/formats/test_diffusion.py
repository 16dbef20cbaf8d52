"""LoRA files of diffusion models mean to us what they mean to the tools that write them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import adapterx as ax
from adapterx.adapter import MAGNITUDE, SHIFT
from adapterx.flattened import diffusers_spelling
from adapterx.formats import load_adapter, save_adapter
from tests.formats.files import safetensors_of

ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def normal(*shape: int, seed: int = 0, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def half_pairs(module: str, down: str, up: str, rank: int = 2, d_in: int = 6, d_out: int = 5) -> dict[str, np.ndarray]:
    return {f"{module}.{down}.weight": normal(rank, d_in), f"{module}.{up}.weight": normal(d_out, rank, seed=1)}


def kohya(module: str, alpha: float | None = None, **sizes: int) -> dict[str, np.ndarray]:
    told = {} if alpha is None else {f"{module}.alpha": np.asarray(alpha, np.float32)}
    return half_pairs(module, "lora_down", "lora_up", **sizes) | told


def loaded(tmp_path: Path, arrays: dict, metadata: dict | None = None) -> ax.Adapter:
    # The suffix says nothing.
    path = tmp_path / "a.npz"
    path.write_bytes(safetensors_of(arrays, metadata))
    return load_adapter(path)


def delta(site: ax.LowRank) -> np.ndarray:
    return (site.b.T @ site.a.reshape(site.rank, -1)).reshape(site.d_out, *site.a.shape[1:])


def expected(d_in: int = 6, d_out: int = 5, rank: int = 2) -> np.ndarray:
    return normal(d_out, rank, seed=1) @ normal(rank, d_in)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1), (2, 1), (1, 0.5), (-3, -1.5)])
def test_kohya_scales_by_alpha_over_rank_and_by_1_where_there_is_no_alpha(tmp_path: Path, alpha, scale) -> None:
    adapter = loaded(tmp_path, kohya(f"lora_unet_{ATTENTION}", alpha) | kohya("lora_te_x", 8, rank=4))
    assert (adapter.metadata["format"], list(adapter.sites)) == ("kohya", ["lora_te_x", f"lora_unet_{ATTENTION}"])
    np.testing.assert_allclose(delta(adapter.sites[f"lora_unet_{ATTENTION}"]), scale * expected(), rtol=1e-6)
    np.testing.assert_allclose(delta(adapter.sites["lora_te_x"]), 2 * expected(rank=4), rtol=1e-6)


@pytest.mark.parametrize(
    "alpha", [np.asarray(4.0), np.asarray(4), np.asarray([4], np.int32), np.asarray(4, np.float16)]
)
def test_alpha_may_be_a_number_of_any_type(tmp_path: Path, alpha: np.ndarray) -> None:
    codes = {"int64": "I64", "float64": "F64", "int32": "I32", "float16": "F16"}
    arrays = kohya("lora_te1_x")
    content = safetensors_of(arrays | {"lora_te1_x.alpha": alpha.astype(np.float32)})
    old, new = np.float32(alpha.reshape(-1)[0]).tobytes(), alpha.tobytes()
    header, data = (
        json.loads(content[8 : 8 + content[0] + 256 * content[1]]),
        content[8 + content[0] + 256 * content[1] :],
    )
    header["lora_te1_x.alpha"] |= {"dtype": codes[alpha.dtype.name], "shape": list(alpha.shape)}
    begin = header["lora_te1_x.alpha"]["data_offsets"][0]
    header["lora_te1_x.alpha"]["data_offsets"] = [begin, begin + len(new)]
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data.removesuffix(old) + new)
    np.testing.assert_allclose(delta(load_adapter(tmp_path / "a.safetensors").sites["lora_te1_x"]), 2 * expected())


def test_a_convolution_has_its_kernel_in_front_or_in_the_middle(tmp_path: Path) -> None:
    down, up = normal(2, 4, 3, 3), normal(5, 2, 1, 1)
    site = loaded(tmp_path, {"lora_unet_c.lora_down.weight": down, "lora_unet_c.lora_up.weight": up}).sites[
        "lora_unet_c"
    ]
    np.testing.assert_allclose(delta(site), np.einsum("or,rckl->ockl", up[:, :, 0, 0], down), rtol=1e-5, atol=1e-6)
    first, mid = normal(2, 4, 1, 1), normal(2, 2, 3, 3)
    names = {"lora_down": first, "lora_mid": mid, "lora_up": up}
    site = loaded(tmp_path, {f"lora_unet_c.{key}.weight": t for key, t in names.items()}).sites["lora_unet_c"]
    whole = np.einsum("or,rskl,sc->ockl", up[:, :, 0, 0], mid, first[:, :, 0, 0])
    np.testing.assert_allclose(delta(site), whole, rtol=1e-4, atol=1e-6)


def test_lycoris_kinds_become_matrices(tmp_path: Path) -> None:
    loha = {"hada_w1_a": normal(5, 2), "hada_w1_b": normal(2, 6), "hada_w2_a": normal(5, 2), "hada_w2_b": normal(2, 6)}
    lokr = {"lokr_w1": normal(2, 3), "lokr_w2_a": normal(4, 2), "lokr_w2_b": normal(2, 5), "alpha": np.float32(3)}
    whole = {"lokr_w1": normal(2, 3), "lokr_w2": normal(2, 2), "alpha": np.float32(1e6)}
    arrays = {
        f"lora_unet_{n}.{k}": np.asarray(t)
        for n, ts in {"ha": loha, "kr": lokr, "w": whole}.items()
        for k, t in ts.items()
    }
    sites = loaded(tmp_path, arrays | {"lora_unet_ha.alpha": np.asarray(1, np.float32)}).sites
    by_hand = (loha["hada_w1_a"] @ loha["hada_w1_b"]) * (loha["hada_w2_a"] @ loha["hada_w2_b"]) / 2
    np.testing.assert_allclose(delta(sites["lora_unet_ha"]), by_hand, rtol=1e-5, atol=1e-6)
    by_hand = 1.5 * np.kron(lokr["lokr_w1"], lokr["lokr_w2_a"] @ lokr["lokr_w2_b"])
    np.testing.assert_allclose(delta(sites["lora_unet_kr"]), by_hand, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(delta(sites["lora_unet_w"]), np.kron(whole["lokr_w1"], whole["lokr_w2"]), rtol=1e-6)


def test_a_dora_scale_is_the_length_of_each_output(tmp_path: Path) -> None:
    lengths = normal(5, 1, dtype=np.float32)
    site = loaded(tmp_path, kohya("lora_te2_x") | {"lora_te2_x.dora_scale": lengths}).sites["lora_te2_x"]
    np.testing.assert_array_equal(site.parts[MAGNITUDE], lengths.T)
    with pytest.raises(ax.UnsupportedAdapter, match=r"lora_te2_x: its dora_scale is \(1, 6\).*wd_on_out=False"):
        loaded(tmp_path, kohya("lora_te2_x") | {"lora_te2_x.dora_scale": normal(1, 6)})


DIFFUSERS = {
    "of today": (f"unet.{PATH}", "lora_A", "lora_B"),
    "before peft": (f"unet.{PATH}", "lora.down", "lora.up"),
    "with processors": (f"unet.{PATH.removesuffix('.to_q')}.processor.to_q_lora", "down", "up"),
    "a text encoder's of today": (f"text_encoder.{TEXT}", "lora_A", "lora_B"),
    "a text encoder's before peft": (f"text_encoder_2.{TEXT}", "lora_linear_layer.down", "lora_linear_layer.up"),
    "a text encoder's at first": (f"text_encoder.{TEXT.removesuffix('.q_proj')}.to_q_lora", "down", "up"),
    "others with dots": ("diffusion_model.blocks.0.self_attn.q", "lora_down", "lora_up"),
    "of a diffusion transformer": ("transformer.transformer_blocks.0.attn.to_q", "lora_A", "lora_B"),
}


@pytest.mark.parametrize(("module", "down", "up"), DIFFUSERS.values(), ids=DIFFUSERS)
def test_diffusers_names_of_all_times_are_read(tmp_path: Path, module: str, down: str, up: str) -> None:
    adapter = loaded(tmp_path, half_pairs(module, down, up), {"format": "pt"})
    sites = [module.replace(".processor", "").replace("to_q_lora", "to_q" if "unet" in module else "q_proj")]
    assert (adapter.metadata["format"], list(adapter.sites)) == ("diffusers", sites)
    np.testing.assert_allclose(delta(adapter.sites[sites[0]]), expected(), rtol=1e-6)


def test_to_out_of_a_processor_is_the_linear_layer_in_it(tmp_path: Path) -> None:
    arrays = {
        "unet.attn1.processor.to_out_lora.down.weight": normal(2, 6),
        "unet.attn1.processor.to_out_lora.up.weight": normal(5, 2),
    }
    assert list(loaded(tmp_path, arrays).sites) == ["unet.attn1.to_out.0"]


def test_metadata_of_diffusers_say_the_scale(tmp_path: Path) -> None:
    told = {
        "unet.r": 2, "unet.lora_alpha": 3, "unet.alpha_pattern": {"conv_out": 1}, "unet.use_rslora": False,
        "text_encoder.r": 4, "text_encoder.lora_alpha": 4, "text_encoder.use_rslora": True,
    }  # fmt: skip
    arrays = {
        **half_pairs(f"unet.{PATH}", "lora_A", "lora_B"), **half_pairs("unet.conv_out", "lora_A", "lora_B"),
        **half_pairs(f"text_encoder.{TEXT}", "lora_A", "lora_B", rank=4),
    }  # fmt: skip
    sites = loaded(tmp_path, arrays, {"lora_adapter_metadata": json.dumps(told)}).sites
    scales = {f"unet.{PATH}": 1.5, "unet.conv_out": 0.5}
    for name, scale in scales.items():
        np.testing.assert_allclose(delta(sites[name]), scale * expected(), rtol=1e-6)
    np.testing.assert_allclose(delta(sites[f"text_encoder.{TEXT}"]), 2 * expected(rank=4), rtol=1e-6)
    wrong = {"lora_adapter_metadata": json.dumps(told | {"unet.init_lora_weights": "pissa"})}
    with pytest.raises(ax.UnsupportedAdapter, match=r"unet\.init_lora_weights: 'pissa' changed the base"):
        loaded(tmp_path, arrays, wrong)
    with pytest.raises(ax.UnsupportedAdapter, match=r"say different scales, 2 and 1\.5"):
        loaded(
            tmp_path,
            arrays | {f"unet.{PATH}.alpha": np.asarray(4, np.float32)},
            {"lora_adapter_metadata": json.dumps(told)},
        )


def test_a_language_model_that_is_named_transformer_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ax.FormatError, match="whose scale is not known here"):
        loaded(tmp_path, half_pairs("transformer.h.0.attn.c_attn", "lora_A", "lora_B"))


@pytest.mark.parametrize(
    ("flat", "spelled"),
    [
        (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        ),
        ("input_blocks_8_0_in_layers_2", "down_blocks_2_resnets_1_conv1"),
        ("input_blocks_3_0_op", "down_blocks_0_downsamplers_0_conv"),
        ("middle_block_0_emb_layers_1", "mid_block_resnets_0_time_emb_proj"),
        ("middle_block_1_proj_in", "mid_block_attentions_0_proj_in"),
        ("middle_block_2_out_layers_3", "mid_block_resnets_1_conv2"),
        ("output_blocks_2_2_conv", "up_blocks_0_upsamplers_0_conv"),
        ("output_blocks_5_1_proj_out", "up_blocks_1_attentions_2_proj_out"),
        ("output_blocks_6_0_skip_connection", "up_blocks_2_resnets_0_conv_shortcut"),
        ("label_emb_0_2", "add_embedding_linear_2"),
        ("up_blocks_1_attentions_2_proj_out", "up_blocks_1_attentions_2_proj_out"),
    ],
)
def test_names_of_stabilitys_unet_are_those_of_diffusers(flat: str, spelled: str) -> None:
    assert diffusers_spelling(flat) == spelled


def pipeline(**parts: np.ndarray) -> ax.Adapter:
    """Ranks that differ, a convolution, and two models."""
    sites = {
        f"unet.{PATH}": (normal(2, 6), normal(2, 5)),
        "unet.conv_in": (normal(3, 4, 3, 3), normal(3, 5)),
        f"text_encoder.{TEXT}": (normal(4, 6), normal(4, 5)),
    }
    return ax.Adapter({name: ax.LowRank(a=a, b=b, parts=parts) for name, (a, b) in sites.items()})


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("parts", [{}, {MAGNITUDE: normal(1, 5)}], ids=["lora", "dora"])
def test_what_is_written_is_read_as_the_same_change(tmp_path: Path, format: str, parts: dict) -> None:
    adapter = pipeline(**parts)
    save_adapter(adapter, tmp_path / "a.safetensors", format=format)
    again = load_adapter(tmp_path / "a.safetensors")
    flat = {f"unet.{PATH}": f"lora_unet_{ATTENTION}", "unet.conv_in": "lora_unet_conv_in"}
    flat[f"text_encoder.{TEXT}"] = f"lora_te_{TEXT.replace('.', '_')}"
    assert again == (
        adapter if format == "diffusers" else ax.Adapter({flat[n]: site for n, site in adapter.sites.items()})
    )
    assert again.metadata["format"] == format


def test_a_model_of_a_pipeline_is_known_by_its_first_blocks(tmp_path: Path) -> None:
    sites = {PATH: pipeline().sites[f"unet.{PATH}"], TEXT: pipeline().sites[f"text_encoder.{TEXT}"]}
    save_adapter(ax.Adapter(sites), tmp_path / "a.safetensors", format="diffusers")
    assert list(load_adapter(tmp_path / "a.safetensors").sites) == [f"text_encoder.{TEXT}", f"unet.{PATH}"]


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_a_site_that_no_pipeline_has_is_refused_with_what_to_do(tmp_path: Path, format: str) -> None:
    adapter = ax.Adapter({"lm_head": ax.LowRank(a=normal(2, 6), b=normal(2, 5))})
    with pytest.raises(ax.FormatError, match=r"lm_head: nothing tells its model in a pipeline; name it .*unet\."):
        save_adapter(adapter, tmp_path / "a.safetensors", format=format)
    with pytest.raises(ax.FormatError, match=r"unet\.x: .*shift"):
        save_adapter(ax.Adapter({"unet.x": ax.LowRank.of_parts({SHIFT: normal(1, 5)})}), tmp_path / "a", format=format)
    assert not list(tmp_path.iterdir())


def test_a_diffusers_file_tells_what_peft_has_to_know_of_each_model(tmp_path: Path) -> None:
    import peft
    from peft.utils.other import get_pattern_key

    save_adapter(pipeline(), tmp_path / "a.safetensors", format="diffusers")
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    unet = {key.removeprefix("unet."): value for key, value in told.items() if key.startswith("unet.")}
    config = peft.LoraConfig(**unet)
    for site, rank in {PATH: 2, "conv_in": 3}.items():
        for patterns, otherwise in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha)):
            assert patterns.get(get_pattern_key(patterns, site), otherwise) == rank
    assert told["text_encoder.r"] == told["text_encoder.lora_alpha"] == 4
