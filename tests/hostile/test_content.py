"""Sound files with contents that no adapter may have."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from adapterx.adapter import Adapter, LowRank
from adapterx.errors import FormatError
from adapterx.formats import Limits, load_adapter, safetensors, save_adapter
from adapterx.formats.file_bytes import FileBytes
from adapterx.formats.finite import all_finite, count_nonfinite
from adapterx.formats.tensor_table import TensorTable, low_ranks
from tests.formats.files import DTYPES, FORMATS, matrices, one_site, pair, peft_folder, safetensors_of


def refused(tmp_path: Path, arrays: dict[str, np.ndarray], cause: str) -> str:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(safetensors_of(arrays))
    with pytest.raises(FormatError, match=cause) as caught:
        load_adapter(path)
    assert "bad.safetensors" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_tensor_and_count(
    tmp_path: Path, suffix: str, dtype: np.dtype, value: float
) -> None:  # 50
    a, b = matrices(dtype=dtype)
    broken = b.copy()
    broken[1, 1:] = value
    path = tmp_path / f"a.{suffix}"
    save_adapter(Adapter({"fc": LowRank(a=a, b=broken)}), path)
    with pytest.raises(FormatError, match=r"fc\.lora_B\.weight: 2 of 6 values are NaN or infinite"):
        load_adapter(path)
    kept = load_adapter(path, nonfinite="allow").sites["fc"].b
    assert count_nonfinite(kept) == 2


@pytest.mark.parametrize("place", [0, 1, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, -1])
def test_no_place_in_a_large_file_escapes_the_check(tmp_path: Path, place: int) -> None:  # 50
    a, b = np.zeros((64, 4097), np.float32), np.zeros((64, 4097), np.float32)
    (a if place >= 0 else b).reshape(-1)[place] = np.nan
    name = "lora_A" if place >= 0 else "lora_B"
    refused(tmp_path, pair(a, b), rf"fc\.{name}\.weight: 1 of 262208 values")


def test_what_was_read_before_the_check_began_is_checked_too(tmp_path: Path) -> None:  # 50
    a, b = matrices()
    broken = a.copy()
    broken[0, 0] = np.nan
    (tmp_path / "a.safetensors").write_bytes(safetensors_of(pair(broken, b)))
    with FileBytes(tmp_path / "a.safetensors", Limits()) as file:
        file.head(file.size - 4)
        assert not safetensors.read(file, Limits()).finite


def test_every_half_pattern_is_judged_as_numpy_judges_it() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    for dtype in DTYPES[1:]:
        values = patterns.view(dtype)
        finite = np.isfinite(values.astype(np.float32))
        assert [all_finite(one) for one in values.reshape(-1, 1)] == finite.tolist()


def test_finite_values_whose_squares_overflow_are_finite() -> None:
    assert all_finite(np.array([3e38, -3e38], np.float32))
    assert not all_finite(np.array([3e38, np.inf], np.float32))


@pytest.mark.parametrize(("dtype", "value"), [("float16", 40_000), (np.float32, 3e38), (ml_dtypes.bfloat16, 3e38)])
def test_a_scale_that_overflows_is_refused_with_the_site(tmp_path: Path, dtype: object, value: float) -> None:  # 51
    a, b = np.ones((2, 4), dtype), np.full((3, 2), value, dtype)
    if np.dtype(dtype) == np.float32:
        b[0, 0] = 1
    folder = peft_folder(tmp_path / "p", {"lora_alpha": 8}, **pair(a, b))
    with pytest.raises(FormatError, match=r"fc: [56] values of lora_B overflow .* when the scale 4 is folded in"):
        load_adapter(folder)


def test_a_scale_is_folded_in_fp32(tmp_path: Path) -> None:
    a, b = np.ones((3, 4), np.float16), np.linspace(0.1, 1, 9, dtype=np.float16).reshape(3, 3)
    folder = peft_folder(tmp_path / "p", {"r": 3, "lora_alpha": 1}, **pair(a, b))
    expected = (b.astype(np.float32).T * np.float32(1 / 3)).astype(np.float16)
    np.testing.assert_array_equal(load_adapter(folder).sites["fc"].b, expected)


@pytest.mark.parametrize(("there", "missing"), [("lora_A", "lora_B"), ("lora_B", "lora_A")])
def test_half_a_pair_is_refused_with_the_name_of_the_other(tmp_path: Path, there: str, missing: str) -> None:  # 52
    a, b = matrices()
    arrays = pair(a, b)
    del arrays[f"fc.{missing}.weight"]
    refused(tmp_path, arrays, rf"fc\.{there}\.weight: its other half, fc\.{missing}\.weight, is missing")


def test_faults_by_the_thousand_are_told_at_once_and_soon() -> None:  # 52
    a, _ = matrices()
    table = TensorTable("file", {f"model.layers.{i}.q_proj.lora_A.weight": a for i in range(20_000)})
    with pytest.raises(FormatError, match="20000 faults"):
        low_ranks(table, Limits())


def test_ranks_that_differ_are_refused_with_both_shapes(tmp_path: Path) -> None:  # 53
    a, b = matrices()
    refused(tmp_path, pair(a[:1], b), r"fc: the ranks differ.*lora_A is \(1, 4\), lora_B is \(2, 3\)")


def test_rank_limits_hold(tmp_path: Path) -> None:
    save_adapter(one_site(rank=5), tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match="fc: its rank is 5, expected 1 to 4"):
        load_adapter(tmp_path / "a.safetensors", limits=Limits(rank=4))


def test_matrices_of_peft_without_their_scale_are_refused_with_what_to_do(tmp_path: Path) -> None:  # 55
    a, b = matrices()
    refused(tmp_path, pair(a, b.T), "only as PEFT's .* whose scale is not known here.* pass the PEFT folder")


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_numbers_of_another_kind_are_refused(tmp_path: Path, dtype: type) -> None:  # 56
    a, b = matrices(dtype=dtype)
    refused(tmp_path, pair(a, b), f"fc.lora_A.weight: its element type is {np.dtype(dtype)}, expected")


def test_halves_of_different_types_are_refused(tmp_path: Path) -> None:
    a, b = matrices()
    refused(tmp_path, pair(a.astype(np.float16), b), "fc.lora_A.weight: its element type is float16, that of")


def test_an_unaligned_file_loads_the_same(tmp_path: Path) -> None:  # 57
    content = safetensors_of(pair(*matrices()))
    length = int.from_bytes(content[:8], "little")
    for extra in range(1, 8):
        shifted = (
            (length + extra).to_bytes(8, "little") + content[8 : 8 + length] + b" " * extra + content[8 + length :]
        )
        (tmp_path / "a.safetensors").write_bytes(shifted)
        assert load_adapter(tmp_path / "a.safetensors") == one_site()


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    a, b = matrices()
    nan = np.full_like(b, np.nan)
    arrays = {**pair(a, b, "ok"), **pair(a, nan, "nan"), **pair(a[:1], b, "rank"), **pair(a[0], b[0], "vector")}
    message = refused(tmp_path, {**arrays, "half.lora_A.weight": a}, "5 faults")
    for part in ("nan.lora_B.weight: 6 of 6", "rank: the ranks differ", "vector.lora_A.weight: expected a matrix"):
        assert part in message
    assert "half.lora_A.weight: its other half" in message
    assert "ok:" not in message


def test_a_long_list_of_faults_is_cut(tmp_path: Path) -> None:
    message = refused(tmp_path, {f"t{i}": np.ones((1, 1), np.float32) for i in range(100)}, "100 faults")
    assert "and 80 more" in message
    assert len(message.splitlines()) < 25


@pytest.mark.parametrize(
    "name", ["x\n.lora_A.weight", "x\0.lora_A.weight", "\u202ex.lora_A.weight", "é" * 300 + ".lora_A.weight"]
)
def test_names_that_cannot_be_seen_or_are_too_long_are_refused(tmp_path: Path, name: str) -> None:
    a, b = matrices()
    message = refused(tmp_path, {**pair(a, b), name: a}, "cannot be seen|over 512 bytes")
    assert message.replace("\n", " ").isprintable()


def test_a_name_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    a, b = matrices()
    for name in ("fc.lora_middle.weight", "lora_A.weight", ".lora_A.weight", "fc.lora_A.quant.weight"):
        refused(tmp_path, {**pair(a, b), name: a}, "unknown kind of tensor")


def test_two_spellings_of_one_place_are_refused(tmp_path: Path) -> None:
    a, b = matrices()
    refused(tmp_path, {**pair(a, b), "fc.lora_A.MatMul.weight": a}, "fc.lora_A.weight stands for the same matrix")


@pytest.mark.parametrize("suffix", FORMATS)
def test_an_adapter_of_zeros_loads_as_zeros(tmp_path: Path, suffix: str) -> None:  # 58
    zero = Adapter({"fc": LowRank(a=np.zeros((2, 4), np.float32), b=np.zeros((2, 3), np.float32))})
    save_adapter(zero, tmp_path / f"a.{suffix}")
    loaded = load_adapter(tmp_path / f"a.{suffix}")
    assert loaded == zero
    assert not loaded.sites["fc"].b.any()
