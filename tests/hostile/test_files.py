"""Broken, lying and odd files (the numbers count the kinds of bad input that the loader promises to refuse)."""

import json
import os
import socket
import stat
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterx.errors import AdapterxError, FormatError, OptionError
from adapterx.formats import Limits, load_adapter, save_adapter
from adapterx.formats.file_bytes import FileBytes
from tests.formats.files import (
    FORMATS,
    adapters,
    entry,
    matrices,
    one_site,
    pair,
    peft_folder,
    safetensors_bytes,
    safetensors_of,
)

A, B = "fc.lora_A.weight", "fc.lora_B.weight"
GOOD = {A: entry([2, 4], 0, 32), B: entry([2, 3], 32, 56)}
DATA = bytes(56)


def refused(tmp_path: Path, content: bytes, cause: str, name: str = "bad.safetensors") -> str:
    """The message of the error that a file of this content gets; it names the file and fits ``cause``."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FormatError, match=cause) as caught:
        load_adapter(path)
    assert name in str(caught.value)
    return str(caught.value)


def changed(name: str, **fields: Any) -> bytes:
    """The good file with some fields of one tensor's entry replaced."""
    return safetensors_bytes({**GOOD, name: {**GOOD[name], **fields}}, DATA)


def test_the_file_that_the_others_are_made_from_is_good(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(GOOD, DATA))
    assert load_adapter(tmp_path / "a.safetensors").ranks == (2,)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        pytest.param(b"", "empty", id="1 empty"),
        pytest.param(b"1234567", "7 bytes cannot be", id="2 seven bytes"),
        pytest.param(
            struct.pack("<Q", 1000) + b"{}", "says 1,000 bytes, the file has 10", id="3 header beyond the file"
        ),
        pytest.param(struct.pack("<Q", 2**63) + b"{}", "says 9,223,372,036,854,775,808 bytes", id="4 header 2^63"),
        pytest.param(struct.pack("<Q", 2**64 - 1) + b"{}", "says 18,446,744", id="4 header 2^64-1"),
        pytest.param(struct.pack("<Q", 17 << 20) + b"{}", "at most 16,777,216 are read", id="5 header over limit"),
        pytest.param(safetensors_bytes(b'{"\xff": 1}'), "byte 2 is not UTF-8", id="6 invalid UTF-8"),
        pytest.param(safetensors_bytes(b"{nonsense"), "expected JSON", id="7 not JSON"),
        pytest.param(safetensors_bytes(b"[1, 2]"), "expected a JSON object, this is a list", id="7 JSON list"),
        pytest.param(safetensors_bytes(b'{"a":' * 2000 + b"1" + b"}" * 2000), "nested too deep", id="8 JSON 2000 deep"),
        pytest.param(safetensors_bytes(b'{"a":' * 200 + b"1" + b"}" * 200), "a: expected dtype", id="8 JSON 200 deep"),
        pytest.param(
            safetensors_bytes(json.dumps(GOOD)[:-1].encode() + b"," + json.dumps({A: GOOD[A]})[1:].encode(), DATA),
            "'fc.lora_A.weight' is there twice",
            id="9 same key twice",
        ),
        pytest.param(
            safetensors_bytes({A: entry([2, 4], 0, 32), B: entry([2, 3], 28, 52)}, DATA[:52]),
            "fc.lora_B.weight: overlaps",
            id="10 overlap",
        ),
        pytest.param(
            safetensors_bytes({A: entry([2, 4], 0, 32), B: entry([2, 3], 40, 64)}, bytes(64)),
            "fc.lora_B.weight: leaves a hole",
            id="11 hole",
        ),
        pytest.param(safetensors_bytes(GOOD, DATA + b"x"), "bytes that belong to no tensor", id="12 trailing bytes"),
        pytest.param(safetensors_bytes(GOOD, DATA[:-1]), "truncated", id="13 truncated"),
        pytest.param(changed(A, shape=[2, 5]), "lora_A.weight: shape .* takes 40 bytes.* give 32", id="14 size"),
        pytest.param(changed(A, shape=[2**33, 2**33]), "lora_A.weight: shape", id="15 product overflow"),
        pytest.param(changed(A, shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "no elements", id="15 empty and huge"),
        pytest.param(changed(A, shape=[-2, -4]), "lora_A.weight: .*not negative, got -2", id="16 negative"),
        pytest.param(changed(A, shape=[2.0, 4]), "lora_A.weight: .*got 2.0", id="16 float"),
        pytest.param(changed(A, shape=[True, 8]), "lora_A.weight: .*got True", id="16 bool"),
        pytest.param(changed(A, data_offsets=[0, 1e400]), "Infinity is not JSON", id="16 infinite"),
        pytest.param(changed(A, dtype="Q4_K"), "lora_A.weight: its element type is 'Q4_K'", id="17 unknown dtype"),
        pytest.param(changed(A, dtype=["F32"]), "lora_A.weight: expected dtype", id="17 dtype is a list"),
        pytest.param(safetensors_bytes({}), "there are none", id="20 no tensors"),
        pytest.param(safetensors_bytes({"__metadata__": {"a": "b"}}), "there are none", id="20 only metadata"),
        pytest.param(safetensors_bytes({"__metadata__": {"a": 1}, **GOOD}, DATA), "must map strings", id="20 metadata"),
    ],
)
def test_a_broken_safetensors_file_is_refused_with_its_cause(tmp_path: Path, content: bytes, cause: str) -> None:
    refused(tmp_path, content, cause)


def test_all_broken_entries_are_told_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, safetensors_bytes({A: entry([2, -4], 0, 32), B: entry([2], 32, 56)}, DATA), "2 faults")
    assert A in message
    assert B in message


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 1 << 30])
def test_a_lying_header_length_allocates_nothing(tmp_path: Path, length: int) -> None:  # 4
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100_000))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            load_adapter(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size
    finally:
        tracemalloc.stop()


def test_bf16_loads_exactly(tmp_path: Path) -> None:  # 18
    patterns = np.arange(0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(2, -1)
    (tmp_path / "a.safetensors").write_bytes(safetensors_of(pair(patterns, patterns)))
    loaded = load_adapter(tmp_path / "a.safetensors").sites["fc"].a
    np.testing.assert_array_equal(loaded.view(np.uint16), patterns.view(np.uint16))


def test_too_many_tensors_are_refused_by_their_number(tmp_path: Path) -> None:  # 19
    header = {f"t{i}": entry([0, 1], 0, 0) for i in range(20_001)}
    refused(tmp_path, safetensors_bytes(header), "names 20001 tensors, at most 20000")


def test_what_is_no_regular_file_is_refused_without_blocking(tmp_path: Path) -> None:  # 21
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path, kind in [("fifo", "a FIFO"), ("socket", "a socket"), ("/dev/zero", "a character device")]:
            with pytest.raises(FormatError, match=f"expected a regular file, this is {kind}"):
                load_adapter(tmp_path / path)
    with pytest.raises(FormatError, match="no PEFT folder"):
        load_adapter(tmp_path)
    with pytest.raises(FormatError, match="this is a folder"):
        FileBytes(tmp_path, Limits())


def test_a_symlink_out_of_the_root_is_refused_and_one_inside_loads(tmp_path: Path) -> None:  # 22, 23
    blobs, snapshot = tmp_path / "store" / "blobs", tmp_path / "store" / "snapshots" / "main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_adapter(one_site(), tmp_path / "outside.safetensors")
    save_adapter(one_site(), blobs / "abc123.safetensors")
    (blobs / "abc123.safetensors").rename(blobs / "abc123")
    # As the cache of the Hugging Face hub lies.
    (snapshot / "a.safetensors").symlink_to("../../blobs/abc123")
    (snapshot / "b.safetensors").symlink_to("../../../outside.safetensors")
    assert load_adapter(snapshot / "a.safetensors") == one_site()
    assert load_adapter(snapshot / "a.safetensors", root=tmp_path / "store") == one_site()
    assert load_adapter(snapshot / "b.safetensors") == one_site()
    for path in (snapshot / "b.safetensors", snapshot / ".." / ".." / ".." / "outside.safetensors"):
        with pytest.raises(FormatError, match="outside"):
            load_adapter(path, root=tmp_path / "store")


def test_the_root_holds_for_both_files_of_a_peft_folder(tmp_path: Path) -> None:  # 22
    folder = peft_folder(tmp_path / "p")
    (folder / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    (folder / "adapter_config.json").symlink_to(tmp_path / "elsewhere.json")
    assert load_adapter(folder).ranks == (2,)
    with pytest.raises(FormatError, match=r"elsewhere\.json, which lies outside"):
        load_adapter(folder, root=folder)


def test_a_hard_link_loads(tmp_path: Path) -> None:  # 24
    save_adapter(one_site(), tmp_path / "a.npz")
    (tmp_path / "b.npz").hardlink_to(tmp_path / "a.npz")
    assert load_adapter(tmp_path / "b.npz") == one_site()


@pytest.mark.parametrize("how", ["write", "shrink", "grow"])
def test_a_file_that_changes_during_the_read_is_refused(tmp_path: Path, how: str) -> None:  # 25
    path = tmp_path / "a.safetensors"
    save_adapter(one_site(rank=64, d_in=4096, d_out=4096), path)
    with FileBytes(path, Limits()) as file:
        file.head(16)
        os.utime(path, ns=(0, 0))
        if how == "write":
            with path.open("r+b") as writer:
                writer.seek(1000)
                writer.write(b"other")
        else:
            os.truncate(path, 5000 if how == "shrink" else file.size + 1)
        with pytest.raises(FormatError, match=r"the file (changed|became shorter) while it was read"):
            file.whole()


def test_a_file_that_is_replaced_during_the_read_is_read_as_it_was(tmp_path: Path) -> None:  # 25
    path = tmp_path / "a.safetensors"
    save_adapter(one_site(), path)
    before = path.read_bytes()
    with FileBytes(path, Limits()) as file:
        file.head(16)
        save_adapter(one_site(rank=3), path)
        assert file.whole().tobytes() == before


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_loaded_adapter_outlives_its_file(tmp_path: Path, suffix: str) -> None:  # 26
    path = tmp_path / f"a.{suffix}"
    save_adapter(one_site(), path)
    loaded = load_adapter(path)
    os.truncate(path, 0)
    assert loaded == one_site()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_mapped_file_loads_the_same_adapter(tmp_path: Path, suffix: str) -> None:
    save_adapter(one_site(), tmp_path / f"a.{suffix}")
    assert load_adapter(tmp_path / f"a.{suffix}", mmap=True) == one_site()


def test_a_file_that_may_not_be_read_is_refused_with_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"  # 27
    save_adapter(one_site(), path)
    path.chmod(0o200)
    if os.geteuid() == 0:  # root may read anything, so the kernel's answer is given for it

        def denied(*_: object) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", denied)
    with pytest.raises(FormatError, match="permission denied; its mode is --w-------"):
        load_adapter(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o200


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("claimed", [*FORMATS, "bin", "dat"])
def test_content_and_not_the_suffix_tells_the_format(tmp_path: Path, suffix: str, claimed: str) -> None:  # 28
    save_adapter(one_site(), tmp_path / f"a.{suffix}")
    (tmp_path / f"a.{suffix}").rename(tmp_path / f"b.{claimed}")
    loaded = load_adapter(tmp_path / f"b.{claimed}")
    assert (loaded, loaded.metadata["format"]) == (one_site(), suffix)


def test_a_file_of_two_formats_at_once_is_refused(tmp_path: Path) -> None:  # 28
    refused(tmp_path, b"PK\x03\x04TORT" + bytes(100), "read as npz and as onnx_adapter")


def test_a_file_of_no_format_is_refused(tmp_path: Path) -> None:  # 28
    refused(tmp_path, b"GGUF\3\0\0\0 and more", r"begins with b'GGUF", name="model.gguf")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_and_never_opened(tmp_path: Path, protocol: int) -> None:  # 29
    content = b"\x80" + bytes([protocol]) + b"cos\nsystem\n(S'touch owned'\ntR."
    for name in ("adapter_model.bin", "a.safetensors", "a.npz", "plain"):
        assert "save_pretrained" in refused(tmp_path, content, "this is a pickle", name)


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path: Path, length: int) -> None:  # 28, 29
    header = json.dumps(GOOD).encode().ljust(length)
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, DATA))
    assert load_adapter(tmp_path / "a.safetensors").ranks == (2,)


def test_a_textual_pickle_is_known_by_its_suffix(tmp_path: Path) -> None:  # 29
    refused(tmp_path, b"cos\nsystem\n(S'touch owned'\ntR.", "this is a pickle", "weights.pt")


def test_a_torch_archive_is_refused_as_a_pickle(tmp_path: Path) -> None:  # 29
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    refused(tmp_path, (tmp_path / "a.pt").read_bytes(), "this is a pickle", "a.npz")
    refused(tmp_path, (tmp_path / "a.pt").read_bytes()[:-5], "this is a pickle", "a.npz")


def test_a_peft_folder_of_pickles_is_refused(tmp_path: Path) -> None:  # 29
    folder = peft_folder(tmp_path / "p")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FormatError, match=r"adapter_model\.bin: this is a pickle"):
        load_adapter(folder)


def test_sizes_are_limited_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(FormatError, match=r"3,221,225,472 bytes, at most 2,147,483,648 are read"):
        load_adapter(path)


def test_a_pinned_hash_is_checked(tmp_path: Path) -> None:  # 39
    import hashlib

    path = tmp_path / "a.safetensors"
    save_adapter(one_site(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_adapter(path, sha256=digest.upper()) == one_site()
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    assert load_adapter(path) != one_site()
    with pytest.raises(FormatError, match=f"expected sha256 {digest}"):
        load_adapter(path, sha256=digest)


def test_options_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="64 hex digits"):
        load_adapter("a.safetensors", sha256="abc")
    with pytest.raises(OptionError, match="'refuse' or 'allow'"):
        load_adapter("a.safetensors", nonfinite="alow")
    with pytest.raises(OptionError, match="cannot pin a PEFT adapter"):
        load_adapter(peft_folder(tmp_path / "p"), sha256="0" * 64)


def test_a_path_with_a_zero_byte_or_of_no_file_is_refused() -> None:
    with pytest.raises(FormatError, match="no such file"):
        load_adapter("no/where.npz")
    with pytest.raises(FormatError, match="cannot be opened"):
        load_adapter("a\0b.npz")


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, list[tuple[str, int, bytes]]]:
    """A format, and changes to a file of it: flips, splices and cuts, more of them near the structure at the front."""
    place = st.integers(0, 150) | st.integers(0, 4000)
    junk = st.binary(min_size=1, max_size=8) | st.sampled_from(
        [b"\xff" * 4, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"{", b'"']
    )
    change = st.tuples(st.sampled_from(["over", "insert", "cut", "drop", "repeat"]), place, junk)
    return draw(st.sampled_from(FORMATS)), draw(st.lists(change, min_size=1, max_size=4))


@given(adapters(), mutations())
def test_a_changed_file_is_an_adapter_or_a_typed_error(
    tmp_path_factory: pytest.TempPathFactory, adapter: Any, mutation: tuple[str, list[tuple[str, int, bytes]]]
) -> None:
    suffix, changes = mutation
    path = tmp_path_factory.getbasetemp() / f"fuzz.{suffix}"
    save_adapter(adapter, path)
    content = bytearray(path.read_bytes())
    for how, where, junk in changes:
        at = where % (len(content) + 1)
        match how:
            case "over":
                content[at : at + len(junk)] = junk
            case "insert":
                content[at:at] = junk
            case "cut":
                del content[at:]
            case "drop":
                del content[at : at + len(junk)]
            case "repeat":
                content[at:at] = content[at : at + 64]
    path.write_bytes(content)
    try:
        loaded = load_adapter(path)
    except AdapterxError as error:
        message = str(error)
    else:
        message = str(path)
        assert all(array.ndim == 2 and not array.flags.writeable for _, array in loaded.tensors())
    assert str(path) in message


def test_matrices_of_another_rank_are_no_pair(tmp_path: Path) -> None:
    a, b = matrices()
    refused(tmp_path, safetensors_of(pair(a[:1], b)), "fc: the ranks differ")
