"""Adapters in int8 and int4: near the truth, and read back to the very numbers that the file says."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import adapterx as ax
from adapterx.adapter import SHIFT
from adapterx.formats import load_adapter, quantized, safetensors, save_adapter


def adapter(dtype: type = np.float32, d_in: int = 70, kernel: tuple = ()) -> ax.Adapter:
    random = np.random.default_rng(0)
    scales = np.asarray([1e-3, 1, 0, 30]).reshape(4, *[1] * (1 + len(kernel)))
    a, b = (random.normal(size=(4, d_in, *kernel)) * scales).astype(dtype), random.normal(size=(4, 33)).astype(dtype)
    parts = {SHIFT: random.normal(size=(1, 33)).astype(dtype)}
    return ax.Adapter(
        {"fc": ax.LowRank(a=a, b=b, parts=parts), "only": ax.LowRank.of_parts(parts)}, {"base_model": "m"}
    )


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("d_in", "kernel"), [(70, ()), (64, ()), (33, ()), (3, (3, 3))])
def test_a_file_gives_back_what_its_codes_say(tmp_path: Path, quantization, dtype, d_in, kernel) -> None:
    whole = adapter(dtype, d_in, kernel)
    save_adapter(whole, tmp_path / "q.safetensors", quantize=quantization)
    read = load_adapter(tmp_path / "q.safetensors")
    values = quantized.dequantized(*quantized.stored(whole, quantization), where="memory")
    assert {name: array.tobytes() for name, array in read.tensors()} == {n: v.tobytes() for n, v in values.items()}
    assert (read.metadata["base_model"], read.metadata["quantized"]) == ("m", quantization)
    site, true = read.sites["fc"], whole.sites["fc"]
    np.testing.assert_array_equal(site.parts[SHIFT], true.parts[SHIFT].astype(np.float32))
    greatest = {"int8": 127, "int4": 7}[quantization]
    for met, truth in ((site.a, true.a), (site.b, true.b)):
        assert met.shape == truth.shape
        rows = np.abs(truth.astype(np.float32)).reshape(4, -1)
        # Half a step of the row's own range, which is no less than that of any group in it.
        step = rows.max(axis=1) / greatest
        error = np.abs(met - truth.astype(np.float32)).reshape(4, -1)
        assert (error <= 0.5001 * step[:, None]).all()
        assert error.max() > 0


def test_the_file_holds_what_its_specification_says(tmp_path: Path) -> None:
    whole = adapter()
    for quantization in ("int8", "int4"):
        save_adapter(whole, tmp_path / f"{quantization}.safetensors", quantize=quantization)
    with safe_open(tmp_path / "int8.safetensors", "np") as file:
        codes, scale = file.get_tensor("fc.lora_B.weight"), file.get_tensor("fc.lora_B.weight.scale")
        assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (np.int8, (4, 33), np.float32, (4,))
        np.testing.assert_array_equal(load_adapter(tmp_path / "int8.safetensors").sites["fc"].b, codes * scale[:, None])
    with safe_open(tmp_path / "int4.safetensors", "np") as file:
        codes, scale = file.get_tensor("fc.lora_B.weight"), file.get_tensor("fc.lora_B.weight.scale")
        assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (np.uint8, (4, 17), np.float32, (4, 2))
        first = int(codes[1, 0] & 0xF)
        value = (first - 16 if first > 7 else first) * scale[1, 0]
        assert load_adapter(tmp_path / "int4.safetensors").sites["fc"].b[1, 0] == value


def test_a_quantized_file_is_small() -> None:
    sizes = []
    for quantization in (None, "int8", "int4"):
        tensors = dict(adapter(np.float16, 4096).tensors())
        if quantization:
            tensors, _ = quantized.stored(adapter(np.float16, 4096), quantization)
        sizes.append(sum(t.nbytes for name, t in tensors.items() if "lora_A" in name))
    assert sizes[1] / sizes[0] < 0.51
    assert sizes[2] / sizes[0] < 0.32


def test_what_was_read_is_written_as_floats_again(tmp_path: Path) -> None:
    save_adapter(adapter(), tmp_path / "q.safetensors", quantize="int8")
    read = load_adapter(tmp_path / "q.safetensors")
    save_adapter(read, tmp_path / "f.safetensors")
    assert load_adapter(tmp_path / "f.safetensors") == read


def test_what_codes_stand_for_gives_the_same_codes_again() -> None:
    rows = np.random.default_rng(3).normal(size=(400, 50)) * np.logspace(-30, 30, 400)[:, None]
    codes, scale = quantized.int8_codes(rows.astype(np.float32))
    again, near = quantized.int8_codes(codes * scale[:, None])
    np.testing.assert_array_equal(again, codes)
    np.testing.assert_allclose(near, scale, rtol=2e-7)
    assert set(np.abs(codes.astype(np.int32)).max(axis=1)) == {127}


def test_numbers_too_small_for_a_scale_become_zeros_and_never_wrap_around() -> None:
    rows = np.array([[2e-43, -2e-43], [1e-40, 5e-41], [0, 0]], np.float32)
    codes, scale = quantized.int8_codes(rows)
    assert not codes.any()
    assert not scale.any()
    assert quantized.int8_codes(np.zeros((0, 5), np.float32))[0].shape == (0, 5)


@pytest.mark.parametrize("suffix", [".npz", ".onnx_adapter", ""])
def test_other_formats_hold_floats_only(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ax.OptionError, match=r"stored in \.safetensors files of adapterx only"):
        save_adapter(adapter(), tmp_path / f"q{suffix}", quantize="int8")
    with pytest.raises(ax.OptionError, match=r"quantize='int5' is no option; .*nearest is int"):
        save_adapter(adapter(), tmp_path / "q.safetensors", quantize="int5")
    assert not list(tmp_path.iterdir())


BROKEN = {
    "another quantization": (lambda t, m: m.update(quantized="int3"), "its weights are 'int3'; int8 and int4 are read"),
    "no scale": (lambda t, m: t.pop("fc.lora_A.weight.scale"), "fc.lora_A.weight.scale is missing"),
    "scale too short": (
        lambda t, m: t.update({"fc.lora_A.weight.scale": np.ones(3, np.float32)}),
        "one scale for each of 4 ranks",
    ),
    "scale of halves": (
        lambda t, m: t.update({"fc.lora_A.weight.scale": np.ones(4, np.float16)}),
        "got int8 and float16",
    ),
    "scale NaN": (
        lambda t, m: t["fc.lora_A.weight.scale"].fill(np.nan),
        "fc.lora_A.weight: 280 of 280 values are NaN or infinite",
    ),
    "scale of nothing": (
        lambda t, m: t.update({"x.lora_A.weight.scale": np.ones(4, np.float32)}),
        "x.lora_A.weight.scale: unknown kind of tensor",
    ),
    "codes of bytes": (
        lambda t, m: t.update({"fc.lora_A.weight": np.ones((4, 70), np.uint8)}),
        "expected codes of int8",
    ),
}


@pytest.mark.parametrize(("change", "cause"), BROKEN.values(), ids=BROKEN)
def test_a_broken_quantized_file_is_refused(tmp_path: Path, change, cause: str) -> None:
    tensors, metadata = quantized.stored(adapter(), "int8")
    change(tensors, metadata)
    content = b"".join(safetensors.pieces(tensors.items(), metadata | {"format": "adapterx"}))
    (tmp_path / "q.safetensors").write_bytes(content)
    with pytest.raises(ax.FormatError) as caught:
        load_adapter(tmp_path / "q.safetensors")
    assert cause in str(caught.value)


@pytest.mark.parametrize("shape", ["7", "[4, 9]", "[4, -66]", "[4, 33, 0]", '["4", 33]', "[4, 32, 1000000000000000]"])
def test_a_shape_that_lies_is_refused(tmp_path: Path, shape: str) -> None:
    tensors, metadata = quantized.stored(adapter(), "int4")
    metadata |= {"quantized_shapes": f'{{"fc.lora_B.weight": {shape}}}', "format": "adapterx"}
    (tmp_path / "q.safetensors").write_bytes(b"".join(safetensors.pieces(tensors.items(), metadata)))
    with pytest.raises(ax.FormatError, match=r"fc\.lora_B\.weight: its shape .* does not fit \(4, 17\) bytes"):
        load_adapter(tmp_path / "q.safetensors")


def test_codes_in_a_file_that_does_not_speak_of_them_are_no_weights(tmp_path: Path) -> None:
    tensors, _ = quantized.stored(adapter(), "int8")
    (tmp_path / "q.safetensors").write_bytes(b"".join(safetensors.pieces(tensors.items(), {"format": "adapterx"})))
    with pytest.raises(ax.FormatError, match=r"fc\.lora_A\.weight: its element type is int8"):
        load_adapter(tmp_path / "q.safetensors")
