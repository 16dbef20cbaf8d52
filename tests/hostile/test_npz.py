"""Crafted .npz files: bombs, twins, ways out of the archive, and headers that lie."""

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from adapterx.errors import FormatError
from adapterx.formats import Limits, load_adapter, save_adapter
from tests.formats.files import matrices, one_site, pair


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def members() -> list[tuple[str, bytes]]:
    return [(f"{name}.npy", npy(array)) for name, array in pair(*matrices()).items()]


def refused(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=cause) as caught:
        load_adapter(path)
    assert "bad.npz" in str(caught.value)


def with_header(old: bytes, new: bytes) -> bytes:
    """The good archive, its first npy header changed in place (equal lengths keep everything else right)."""
    (name, content), rest = members()[0], members()[1:]
    assert old in content
    return zipped([(name, content.replace(old, new.ljust(len(old)) if len(new) < len(old) else new, 1)), *rest])


def test_the_archive_that_the_others_are_made_from_is_good(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        (tmp_path / "a.npz").write_bytes(zipped(members(), method))
        assert load_adapter(tmp_path / "a.npz") == one_site()


def test_a_bomb_is_refused_before_anything_is_inflated(tmp_path: Path) -> None:  # 30
    zeros = npy(np.zeros((64, 250_000), np.float32))
    path = tmp_path / "bomb.npz"
    path.write_bytes(zipped([("fc.lora_A.weight.npy", zeros), ("fc.lora_B.weight.npy", zeros)], zipfile.ZIP_DEFLATED))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"say they inflate to 128,000,256"):
            load_adapter(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_a_member_that_inflates_beyond_what_it_says_is_cut_off(tmp_path: Path) -> None:  # 30
    zeros = npy(np.zeros((64, 250_000), np.float32))
    content = zipped([("fc.lora_A.weight.npy", zeros)], zipfile.ZIP_DEFLATED)
    size = struct.pack("<I", len(zeros))
    assert content.count(size) == 2
    path = tmp_path / "bomb.npz"
    path.write_bytes(content.replace(size, struct.pack("<I", 1000)))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="is damaged"):
            load_adapter(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size + 100_000
    finally:
        tracemalloc.stop()


def test_a_member_that_comes_twice_is_refused(tmp_path: Path) -> None:  # 31
    with pytest.warns(UserWarning, match="Duplicate name"):
        content = zipped([*members(), members()[0]])
    refused(tmp_path, content, "'fc.lora_A.weight.npy' is there twice")


@pytest.mark.parametrize("name", ["../../x.npy", "/etc/x.npy", "a/../x.npy", "a\\..\\x.npy", "a\nb.npy", "\u202ex.npy"])
def test_a_member_with_a_name_of_no_adapter_is_refused(tmp_path: Path, name: str) -> None:  # 31
    refused(tmp_path, zipped([*members(), (name, b"")]), "has a name that no adapter file has")


def test_python_objects_are_refused_and_never_opened(tmp_path: Path) -> None:  # 32
    content = zipped([("fc.lora_A.weight.npy", npy(np.array([{"a": 1}], dtype=object))), members()[1]])
    refused(tmp_path, content, "fc.lora_A.weight: it holds Python objects")


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        pytest.param(b"(2, 4), }        ", b"(1000000, 1000000), }", "shape .* takes 4,000,000,000,000", id="33 4 TB"),
        pytest.param(b"(2, 4)", b"(2, 5)", r"shape \(2, 5\) of <f4 takes 40 bytes, there are 32", id="33 one column"),
        pytest.param(b"(2, 4)", b"(0, 4)", r"shape \(0, 4\)", id="33 nothing"),
        pytest.param(b"(2, 4)", b"(-2,4)", "header is not that of a plain array", id="negative"),
        pytest.param(b"'<f4'", b"'|V4'", "its element type is '|V4'", id="void"),
        pytest.param(b"'<f4'", b"'<f1'", "its element type is '<f1'", id="float8"),
        pytest.param(b"'<f4'", b"[('a'", "header is not that of a plain array", id="a structure"),
        pytest.param(b"'descr'", b"'desc' ", "header is not that of a plain array", id="another key"),
        pytest.param(b"\x93NUMPY", b"\x93NUMPI", "expected an npy array", id="no npy"),
        pytest.param(b"\x93NUMPY\x01\x00v\x00", b"\x93NUMPY\x01\x00\xff\xff", "header is not that", id="long header"),
    ],
)
def test_an_npy_header_that_lies_is_refused(tmp_path: Path, old: bytes, new: bytes, cause: str) -> None:
    if len(new) > len(old):
        old += b" " * (len(new) - len(old))
    refused(tmp_path, with_header(old, new), cause)


@pytest.mark.parametrize(
    ("dtype", "cause"), [("float64", "its element type is float64"), ("int32", "int32"), ("bool", "bool")]
)
def test_numbers_of_another_kind_are_refused_with_what_to_do(tmp_path: Path, dtype: str, cause: str) -> None:  # 56
    a, b = matrices()
    np.savez(tmp_path / "bad.npz", **pair(a.astype(dtype), b))
    refused(tmp_path, (tmp_path / "bad.npz").read_bytes(), f"fc.lora_A.weight: .*{cause}.*cast it")


@pytest.mark.parametrize("order", [np.asfortranarray, lambda array: array.astype(array.dtype.newbyteorder(">"))])
def test_fortran_order_and_big_endian_load(tmp_path: Path, order) -> None:  # 57
    a, b = matrices()
    np.savez(tmp_path / "a.npz", **pair(order(a), order(b)))
    assert load_adapter(tmp_path / "a.npz") == one_site()


def damaged(change) -> bytes:
    content = bytearray(zipped(members()))
    change(content, content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06"))
    return bytes(content)


def put(offset: int, number: int, form: str = "<H"):
    """A change of one field of the first directory entry."""
    return lambda content, entry, end: struct.pack_into(form, content, entry + offset, number)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        pytest.param(damaged(put(8, 1)), "is encrypted", id="encrypted"),
        pytest.param(damaged(put(10, 12)), "packed by method 12", id="bzip2"),
        pytest.param(damaged(put(20, 2**31, "<I")), "says .* bytes and holds", id="sizes differ"),
        pytest.param(damaged(put(42, 2**31, "<I")), "does not lie where its zip directory says", id="local offset"),
        pytest.param(damaged(put(42, 10, "<I")), "does not lie where its zip directory says", id="no local header"),
        pytest.param(damaged(put(28, 60_000)), "malformed", id="long name"),
        pytest.param(damaged(put(16, 1, "<I")), "is damaged", id="checksum"),
        pytest.param(zipped(members())[:-30], "without its end", id="truncated"),
        pytest.param(zipped(members()) + b"junk", "or bytes follow it", id="trailing bytes"),
        pytest.param(b"PK\x03\x04", "without its end", id="nothing but a sign"),
        pytest.param(zipped([]), "there are none", id="no members"),
        pytest.param(zipped([("readme.txt", b"hello")]), "is no .npy array", id="another file"),
        pytest.param(zipped([("a/data.pkl", b"x")]), "this is a pickle", id="29 pickle"),
    ],
)
def test_a_broken_archive_is_refused_with_its_cause(tmp_path: Path, content: bytes, cause: str) -> None:
    refused(tmp_path, content, cause)


def test_two_members_over_the_same_bytes_are_refused(tmp_path: Path) -> None:
    a, _ = matrices()
    content = bytearray(zipped([(f"{name}.npy", npy(array)) for name, array in pair(a, a).items()]))
    first = content.index(b"PK\x01\x02")
    second = content.index(b"PK\x01\x02", first + 4)
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    refused(tmp_path, bytes(content), "overlaps another")


def test_bytes_behind_an_array_are_refused(tmp_path: Path) -> None:
    refused(
        tmp_path, zipped([(name, content + b"more") for name, content in members()]), "takes 32 bytes, there are 36"
    )


def test_too_many_members_are_refused_by_their_number(tmp_path: Path) -> None:
    save_adapter(one_site(), tmp_path / "a.npz")
    with pytest.raises(FormatError, match="2 members, at most 1 are read"):
        load_adapter(tmp_path / "a.npz", limits=Limits(tensors=1))
