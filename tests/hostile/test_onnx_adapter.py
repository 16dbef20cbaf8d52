"""Crafted .onnx_adapter files; ONNX Runtime before 1.24.4 reads out of bounds on some of them."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import flatbuffers
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterx.adapter import Adapter
from adapterx.errors import AdapterxError, FormatError
from adapterx.formats import Limits, load_adapter, save_adapter
from adapterx.formats.onnx_adapter import model_version
from tests.formats.files import matrices, one_site, pair


def built(
    tensors: dict[str, tuple[Any, int, bytes]],
    *,
    version: int = 1,
    identifier: bytes = b"TORT",
    omit: str = "",
    share: bool = False,
) -> bytes:
    """A flatbuffer of the right schema with any dims, types and data.

    ``omit`` leaves out a field of each parameter, ``share`` lets all of them refer to the data of the first.
    """
    builder = flatbuffers.Builder()
    parameters: list[int] = []
    fields: dict[str, int] = {}
    for name, (dims, code, data) in tensors.items():
        if not (share and fields):
            builder.Prep(8, len(data))
            fields["raw_data"] = builder.CreateByteVector(data)
        builder.StartVector(8, len(dims), 8)
        for size in reversed(dims):
            builder.PrependInt64(size)
        fields["dims"] = builder.EndVector()
        fields["name"] = builder.CreateString(name)
        builder.StartObject(4)
        for slot, field in enumerate(("name", "dims", None, "raw_data")):
            if field is None:
                builder.PrependInt32Slot(slot, code, 0)
            elif field != omit:
                builder.PrependUOffsetTRelativeSlot(slot, fields[field], 0)
        parameters.append(builder.EndObject())
    builder.StartVector(4, len(parameters), 4)
    for parameter in reversed(parameters):
        builder.PrependUOffsetTRelative(parameter)
    vector = builder.EndVector()
    builder.StartObject(4)
    builder.PrependInt32Slot(0, version, 0)
    builder.PrependUOffsetTRelativeSlot(3, vector, 0)
    builder.Finish(builder.EndObject(), file_identifier=identifier)
    return bytes(builder.Output())


def of(a_dims: Any = (2, 4), *, code: int = 1, name: str = "fc.lora_A.weight", **more: Any) -> bytes:
    """A file of one site in which one parameter may lie."""
    a, b = matrices()
    return built({name: (a_dims, code, a.tobytes()), "fc.lora_B.weight": ((2, 3), 1, b.tobytes())}, **more)


def refused(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "bad.onnx_adapter"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=cause) as caught:
        load_adapter(path)
    assert "bad.onnx_adapter" in str(caught.value)


def test_the_file_that_the_others_are_made_from_is_good(tmp_path: Path) -> None:
    (tmp_path / "a.onnx_adapter").write_bytes(of())
    assert load_adapter(tmp_path / "a.onnx_adapter") == one_site()


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        pytest.param(of(identifier=b"TORX"), "expected the identifier b'TORT'.*b'TORX'", id="34 identifier"),
        pytest.param(
            of((3, 4)), r"lora_A.weight: dims \(3, 4\) .*take 48 bytes, its data has 32", id="35 one row more"
        ),
        pytest.param(of((1, 4)), r"lora_A.weight: dims \(1, 4\)", id="35 one row less"),
        pytest.param(of((200_000, 4)), "take 3200000 bytes, its data has 32", id="35 100,000 times"),
        pytest.param(of((2**62, 2**62)), "its data has 32", id="35 product overflow"),
        pytest.param(of((-2, -4)), r"lora_A.weight has dims \(-2, -4\)", id="36 negative"),
        pytest.param(of((0, 4)), r"lora_A.weight has dims \(0, 4\)", id="37 no rows with data"),
        pytest.param(of((0, 2**62, 2**62)), "lora_A.weight has dims", id="37 none, and huge"),
        pytest.param(of()[:-1], "file has", id="38 one byte short"),
        pytest.param(of()[: len(of()) // 2], "it refers to bytes", id="38 half"),
        pytest.param(of() + b"junk", "its content ends at", id="38 trailing junk"),
        pytest.param(of() + bytes(64), "its content ends at", id="38 trailing zeros"),
        pytest.param(of(version=2), "format version is 2, only 1 is known", id="another version"),
        pytest.param(of(code=9), "has the ONNX element type 9, expected", id="bool"),
        pytest.param(of(code=11), "has the ONNX element type 11, expected", id="56 float64"),
        pytest.param(of(code=-1), "has the ONNX element type -1", id="negative type"),
        pytest.param(of((1, 1, 1, 1, 2, 4)), "has 6 dimensions, at most 5", id="six dimensions"),
        pytest.param(of(omit="dims"), "lora_A.weight has no dims", id="no dims"),
        pytest.param(of(omit="raw_data"), "lora_A.weight has no data", id="no data"),
        pytest.param(of(omit="name"), "a parameter has no name", id="no name"),
        pytest.param(of(name="x" * 600), "a name of 600 bytes, at most 512", id="long name"),
        pytest.param(built({}), "there are none", id="no parameters"),
        pytest.param(b"\0\0\0\0TORT", "the table at byte 0 is malformed", id="only an identifier"),
        pytest.param(b"\xff\xff\xff\xffTORT" + bytes(8), "it refers to bytes", id="root beyond the file"),
    ],
)
def test_a_crafted_file_is_refused_with_its_cause(tmp_path: Path, content: bytes, cause: str) -> None:
    refused(tmp_path, content, cause)


@pytest.mark.parametrize("missing", range(1, 4))
def test_a_file_of_ours_that_lacks_bytes_of_its_padding_is_refused(tmp_path: Path, missing: int) -> None:  # 38
    save_adapter(one_site(ml_dtypes.float8_e5m2, rank=1, d_in=1, d_out=1), tmp_path / "a.onnx_adapter")
    content = (tmp_path / "a.onnx_adapter").read_bytes()
    assert not any(content[-3:])
    refused(tmp_path, content[:-missing], "its content ends at")


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    content = of(name="fc.lora_C.weight").replace(b"lora_C", b"lora_B")
    refused(tmp_path, content, "fc.lora_B.weight is there twice")


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, of().replace(b"fc.lora_A", b"f\xff.lora_A"), "is not UTF-8")


def test_many_parameters_over_the_same_data_are_refused(tmp_path: Path) -> None:
    data = bytes(40_000)
    tensors = {f"s{i}.lora_{side}.weight": ((1, 10_000), 1, data) for i in range(100) for side in "AB"}
    refused(tmp_path, built(tensors, share=True), "share their data")


def test_dims_that_lie_allocate_nothing(tmp_path: Path) -> None:  # 35
    path = tmp_path / "a.onnx_adapter"
    path.write_bytes(of((2**40, 4)) + b"")
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            load_adapter(path)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_too_many_parameters_are_refused_by_their_number(tmp_path: Path) -> None:
    (tmp_path / "a.onnx_adapter").write_bytes(of())
    with pytest.raises(FormatError, match="it says 2 parameters, at most 1 are read"):
        load_adapter(tmp_path / "a.onnx_adapter", limits=Limits(tensors=1))


def test_a_flipped_bit_in_the_data_loads_and_is_another_adapter(tmp_path: Path) -> None:  # 39
    a, _ = matrices()
    content = of()
    at = content.index(a.tobytes())
    flipped = bytearray(content)
    flipped[at] ^= 1
    (tmp_path / "a.onnx_adapter").write_bytes(flipped)
    assert load_adapter(tmp_path / "a.onnx_adapter") != one_site()
    with pytest.raises(FormatError, match="expected sha256"):
        load_adapter(tmp_path / "a.onnx_adapter", sha256="0" * 64)


def test_the_model_version_of_a_file_of_ours_tells_its_base(tmp_path: Path) -> None:  # 40
    path, fingerprint = tmp_path / "a.onnx_adapter", "89abcdef" * 8
    save_adapter(Adapter(dict(one_site().sites), {"base_fingerprint": fingerprint}), path)
    assert load_adapter(path).metadata["model_version"] == str(model_version(fingerprint))
    assert model_version(fingerprint) != model_version("0" + fingerprint)
    save_adapter(one_site(), path)
    assert "model_version" not in load_adapter(path).metadata


@given(st.data())
def test_any_change_of_an_offset_or_length_is_an_adapter_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(of())
    numbers = st.integers(0, 2**32 - 1) | st.integers(0, 200) | st.sampled_from([2**31, 2**31 - 1, 2**32 - 4])
    for _ in range(data.draw(st.integers(1, 3))):
        struct.pack_into("<I", content, 4 * data.draw(st.integers(0, len(content) // 4 - 1)), data.draw(numbers))
    path = tmp_path_factory.getbasetemp() / "fuzz.onnx_adapter"
    path.write_bytes(content)
    try:
        loaded = load_adapter(path)
    except AdapterxError:
        return
    assert np.isfinite(loaded.sites[next(iter(loaded.sites))].a).all()


def test_pairs_are_checked_as_in_every_format(tmp_path: Path) -> None:
    a, b = matrices()
    tensors = {name: (array.shape, 1, array.tobytes()) for name, array in pair(a[:1], b).items()}
    refused(tmp_path, built(tensors), "fc: the ranks differ")


def with_codes(**change: Any) -> bytes:
    """A file of one site in codes; ``change`` replaces a tensor, ``None`` leaves it out."""
    codes, scale = np.full((2, 4), 3, np.int8), np.ones((2, 2), np.float32)
    tensors = {"lora_A": (codes, 3), "lora_B": (codes[:, :3], 3), "lora_scale": (scale, 1), **change}
    held = {name: one for name, one in tensors.items() if one is not None}
    return built({f"fc.{name}.weight": (one.shape, code, one.tobytes()) for name, (one, code) in held.items()})


def test_codes_with_sound_scales_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.onnx_adapter").write_bytes(with_codes())
    site = load_adapter(tmp_path / "a.onnx_adapter").sites["fc"]
    np.testing.assert_array_equal(site.b, np.full((2, 3), 3, np.float32))


SCALES = {
    "none": (None, "fc.lora_A.weight: its element type is int8"),
    "of one column": (np.ones((2, 1), np.float32), r"expected float32 \[r, 2\] .* it is float32 \[2, 1\]"),
    "of other ranks": (np.ones((3, 2), np.float32), r"it is float32 \[3, 2\]"),
    "flat": (np.ones(4, np.float32), r"it is float32 \[4\]"),
    "of halves": (np.ones((2, 2), np.float16), r"it is float16 \[2, 2\]"),
    "infinite": (np.full((2, 2), np.inf, np.float32), "fc.lora_A.weight: 8 of 8 values are NaN or infinite"),
}


@pytest.mark.parametrize("name", SCALES)
def test_codes_with_other_scales_are_refused(tmp_path: Path, name: str) -> None:
    scale, cause = SCALES[name]
    code = 10 if scale is not None and scale.dtype == np.float16 else 1
    refused(tmp_path, with_codes(lora_scale=None if scale is None else (scale, code)), cause)


@pytest.mark.parametrize(
    "change",
    [
        {"lora_B": None},
        {"lora_B": (np.ones((2, 3), np.float32), 1)},
        {"lora_A": (np.full((3, 4), 3, np.int8), 3)},
        {"lora_A": (np.full(2, 3, np.int8), 3)},
        {"lora_A": (np.array(3, np.int8), 3)},
    ],
    ids=["no b", "b of floats", "a of another rank", "a flat", "a of no dimension"],
)
def test_scales_beside_other_than_two_matrices_of_codes_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    refused(tmp_path, with_codes(**change), r"fc.lora_scale.weight: expected float32 \[r, 2\] beside two matrices")
