"""Files of other tools: which way their matrices lie is read from the shapes."""

from pathlib import Path

import numpy as np
import pytest

from adapterx.errors import FormatError
from adapterx.formats import load_adapter, save_adapter
from adapterx.formats.tensor_table import TensorTable, low_ranks
from adapterx.limits import Limits
from tests.formats.files import matrices, one_site, pair, safetensors_of


def sites_of(arrays: dict[str, np.ndarray], **table: object) -> dict:
    return low_ranks(TensorTable("file", arrays, **table), Limits())  # type: ignore[arg-type]  # layout is a plain str


def test_matrices_with_the_rank_in_the_middle_are_turned() -> None:
    a, b = matrices(rank=2, d_in=4, d_out=3)
    site = sites_of(pair(a.T, b))["fc"]
    np.testing.assert_array_equal(site.a, a)
    np.testing.assert_array_equal(site.b, b)


def test_rank_first_wins_where_both_layouts_fit() -> None:
    a, b = matrices(rank=4, d_in=4, d_out=6)
    np.testing.assert_array_equal(sites_of(pair(a, b))["fc"].a, a)


def test_one_file_has_one_layout_so_a_square_site_follows_the_others() -> None:
    a, b = matrices(rank=2, d_in=4, d_out=3)
    square, wide = matrices(rank=4, d_in=4, d_out=6)
    sites = sites_of({**pair(a.T, b), **pair(square.T, wide, "square")})
    np.testing.assert_array_equal(sites["square"].a, square)


def test_a_file_of_ours_is_never_turned(tmp_path: Path) -> None:
    a, b = matrices(rank=2, d_in=4, d_out=3)
    (tmp_path / "a.safetensors").write_bytes(safetensors_of(pair(a.T, b), {"format": "adapterx"}))
    with pytest.raises(FormatError, match=r"fits only as \[d_in, r\] and \[r, d_out\], which this file does not use"):
        load_adapter(tmp_path / "a.safetensors")


def test_sites_that_lie_differently_are_named() -> None:
    a, b = matrices(rank=2, d_in=4, d_out=3)
    with pytest.raises(FormatError, match=r"second: it fits only as \[d_in, r\] and \[r, d_out\], which"):
        sites_of({**pair(a, b, "first"), **pair(a.T, b, "second")})


def test_names_of_other_exporters_are_understood() -> None:
    a, b = matrices()
    assert list(sites_of({"m.lora_A.MatMul.weight": a, "m.lora_B.MatMul.weight": b})) == ["m"]
    assert list(sites_of(pair(a, b, "base_model.model.encoder.q"))) == ["encoder.q"]


def test_a_prefixed_file_with_folded_scale_is_no_peft_file(tmp_path: Path) -> None:
    a, b = matrices(rank=2, d_in=4, d_out=3)
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_of(pair(a.T, b, "base_model.model.fc")))
    assert load_adapter(path) == one_site()


def test_onnx_adapter_files_of_ours_say_so(tmp_path: Path) -> None:
    adapter = one_site(rank=4, d_in=4, d_out=6)
    save_adapter(adapter, tmp_path / "a.onnx_adapter")
    assert load_adapter(tmp_path / "a.onnx_adapter") == adapter


def test_big_endian_fortran_and_unaligned_tensors_load_as_native_ones() -> None:
    a, b = matrices()
    crooked = np.frombuffer(b"x" + b.tobytes(), np.uint8)[1:].view(np.float32).reshape(b.shape)
    assert not crooked.flags.aligned
    site = sites_of(pair(np.asfortranarray(a).astype(">f4", order="K"), crooked.astype(">f4")))["fc"]
    np.testing.assert_array_equal(site.a, a)
    np.testing.assert_array_equal(site.b, b)
    np.testing.assert_array_equal(sites_of(pair(a, crooked))["fc"].b, b)
