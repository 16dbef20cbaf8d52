"""Files of diffusion tools that are broken, or that mean what cannot be known."""

import json
from pathlib import Path

import numpy as np
import pytest

import adapterx as ax
from adapterx.formats import Limits, load_adapter
from tests.formats.files import safetensors_of

UNET, TEXT = "lora_unet_conv_in", "lora_te_text_model_encoder_layers_0_mlp_fc1"


def tensors(module: str, rank: int = 2, dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    down, up = random.normal(size=(rank, 6)).astype(dtype), random.normal(size=(5, rank)).astype(dtype)
    return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": np.asarray(2, dtype)}


def refused(tmp_path: Path, arrays: dict, *causes: str, metadata: dict | None = None, **options: object) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors_of(arrays, metadata))
    with pytest.raises(ax.FormatError) as caught:
        load_adapter(tmp_path / "a.safetensors", **options)
    for cause in ("a.safetensors", *causes):
        assert cause in str(caught.value), str(caught.value)


@pytest.mark.parametrize("half", ["lora_down", "lora_up"])
def test_half_a_pair_is_named_with_what_is_there(tmp_path: Path, half: str) -> None:
    arrays = tensors(UNET) | tensors(TEXT)
    del arrays[f"{TEXT}.{half}.weight"]
    other = "lora_up" if half == "lora_down" else "lora_down"
    cause = f"{TEXT}.{other}.weight: its other half, {TEXT}.{half}.weight, is missing"
    refused(tmp_path, arrays, "1 fault", cause)


@pytest.mark.parametrize(
    ("alpha", "cause"),
    [
        (np.asarray(np.nan, np.float32), "alpha is nan"),
        (np.asarray(np.inf, np.float32), "alpha is inf"),
        (np.asarray(0, np.float32), "alpha is 0, which kohya takes for the rank and others for nothing"),
        (np.ones(2, np.float32), "alpha must be one number; its shape is (2,)"),
    ],
)
@pytest.mark.parametrize("nonfinite", ["refuse", "allow"])
def test_an_alpha_that_is_no_scale_is_refused(tmp_path: Path, alpha: np.ndarray, cause: str, nonfinite: str) -> None:
    refused(tmp_path, tensors(UNET) | {f"{UNET}.alpha": alpha}, f"{UNET}: its {cause}", nonfinite=nonfinite)


def test_an_alpha_alone_changes_nothing_and_is_refused(tmp_path: Path) -> None:
    refused(
        tmp_path, tensors(UNET) | {f"{TEXT}.alpha": np.asarray(1, np.float32)}, f"{TEXT}: there is nothing but alpha"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_their_name_in_the_file(tmp_path: Path, value: float) -> None:
    arrays = tensors(UNET, dtype=np.float16)
    arrays[f"{UNET}.lora_up.weight"][1, 1] = value
    refused(tmp_path, arrays, f"{UNET}.lora_up.weight: 1 of 10 values are NaN or infinite")


@pytest.mark.parametrize(
    ("others", "two"),
    [
        (tensors("unet.conv_out"), f"{UNET} and unet.conv_out"),
        (tensors("conv_out"), f"{UNET} and conv_out"),
        ({"base_model.model.fc.lora_A.weight": np.ones((2, 6), np.float32)}, "base_model.model.fc.lora_A.weight"),
    ],
)
def test_two_dialects_in_one_file_are_refused_with_a_name_of_each(tmp_path: Path, others: dict, two: str) -> None:
    refused(tmp_path, tensors(UNET) | others, "names of two dialects", two)


@pytest.mark.parametrize("key", ["oft_blocks", "diff", "a1.weight", "lora_down.bias", "w_norm"])
def test_keys_of_kinds_that_are_not_known_are_named(tmp_path: Path, key: str) -> None:
    refused(tmp_path, tensors(UNET) | {f"{TEXT}.{key}": np.ones((2, 2), np.float32)}, f"{TEXT}.{key}: unknown kind")


def test_kinds_that_cannot_be_matrices_are_refused_with_the_reason(tmp_path: Path) -> None:
    loha = {f"{TEXT}.{key}": np.ones((2, 2), np.float32) for key in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_t1")}
    lokr = {f"{UNET}.{key}": np.ones((2, 2), np.float32) for key in ("lokr_w1", "lokr_w2_a")}
    refused(tmp_path, loha | lokr, "2 faults", f"{TEXT}: LoHa with hada_t1", f"{UNET}: its lokr_w2 is missing")


def test_two_spellings_of_one_tensor_are_refused(tmp_path: Path) -> None:
    arrays = tensors("unet.conv_in") | {"unet.conv_in.lora.down.weight": np.ones((2, 6), np.float32)}
    refused(tmp_path, arrays, "unet.conv_in.lora.down.weight: another name stands for lora_A.weight of unet.conv_in")


def test_ranks_and_types_that_differ_and_ranks_that_are_too_large_are_refused(tmp_path: Path) -> None:
    arrays = tensors(UNET) | tensors(TEXT, rank=3) | tensors("lora_te_x")
    arrays[f"{UNET}.lora_up.weight"] = np.ones((5, 3), np.float32)
    arrays["lora_te_x.lora_up.weight"] = np.ones((5, 2), np.float16)
    causes = (
        "3 faults",
        f"{UNET}: expected [r, d_in] and [d_out, r] of one rank",
        f"{TEXT}: its rank is over 2",
        "lora_te_x: its tensors have several",
    )
    refused(tmp_path, arrays, *causes, limits=Limits(rank=2))


def test_an_overflow_of_the_scale_is_refused(tmp_path: Path) -> None:
    arrays = tensors(UNET, dtype=np.float16) | {f"{UNET}.alpha": np.asarray(60000, np.float16)}
    refused(tmp_path, arrays | {f"{UNET}.lora_up.weight": np.full((5, 2), 30, np.float16)}, f"{UNET}: lora_B overflows")


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        ("[1]", "expected a JSON object"),
        (json.dumps({"unet.r": 2, "unet.lora_alpha": "much"}), "lora_alpha: expected a number"),
        (json.dumps({"unet.r": 3, "unet.lora_alpha": 2}), "unet.conv_in: its tensors have rank 2"),
        (
            json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "unet.new_math": True}),
            "unet.new_math: True changes the result",
        ),
    ],
)
def test_broken_metadata_of_diffusers_are_refused(tmp_path: Path, told: str, cause: str) -> None:
    arrays = {name: array for name, array in tensors("unet.conv_in").items() if not name.endswith("alpha")}
    refused(tmp_path, arrays, cause, metadata={"lora_adapter_metadata": told})


def test_too_many_tensors_are_refused(tmp_path: Path) -> None:
    many = tensors(UNET) | tensors(TEXT) | tensors("lora_te_x")
    # The header is counted first.
    refused(tmp_path, many, "at most 8 are read", limits=Limits(tensors=8))
