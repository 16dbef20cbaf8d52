"""A file is whole or not there."""

import errno
import os
from pathlib import Path

import pytest

from adapterx import atomic
from adapterx.atomic import atomic_write, copy_around, copy_file, new_folder
from adapterx.progress import progress


def test_content_may_be_bytes_pieces_or_a_function(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for content in (b"abc", memoryview(b"abc"), [b"a", b"bc"], lambda file: file.write(b"abc")):
        atomic_write(path, content)
        assert path.read_bytes() == b"abc"
        path.unlink()


def test_a_failure_half_way_leaves_the_old_file_whole_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def pieces():
        yield b"new"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, pieces())
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_at_the_flush_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    real = os.open

    def open_full(name, flags, *rest, **named):
        descriptor = real(name, flags, *rest, **named)
        if str(name).endswith(".tmp"):
            full = real("/dev/full", os.O_WRONLY)
            os.dup2(full, descriptor)
            os.close(full)
        return descriptor

    monkeypatch.setattr(atomic.os, "open", open_full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_new_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        atomic_write(tmp_path / "f", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_a_reader_keeps_the_inode_it_opened(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        atomic_write(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        atomic_write(tmp_path / "nowhere" / "f", b"")


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_copy_has_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_kernel: bool) -> None:
    monkeypatch.setattr(atomic, "_COPY_STEP", 1000)
    if not in_kernel:
        monkeypatch.delattr(atomic.os, "copy_file_range")
    content = os.urandom(12_345)
    (tmp_path / "from").write_bytes(content)
    copy_file(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == content


def test_a_source_that_shrinks_during_the_copy_leaves_no_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_COPY_STEP", 1000)
    source = tmp_path / "from"
    source.write_bytes(b"x" * 5000)
    steps = atomic._copied

    def shrinking(*arguments):
        for step in steps(*arguments):
            os.truncate(source, 1500)
            yield step

    monkeypatch.setattr(atomic, "_copied", shrinking)
    with pytest.raises(OSError, match="1500 of 5000"):
        copy_file(source, tmp_path / "to")
    assert [p.name for p in tmp_path.iterdir()] == ["from"]


def test_progress_is_silent_where_nobody_watches(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("copying", 10) as advance:
        advance(10)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("in_kernel", [True, False])
@pytest.mark.parametrize("shift", [0, 5])
def test_a_copy_around_holes_leaves_them_to_the_caller(tmp_path, monkeypatch, in_kernel, shift):
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(atomic, "_COPY_STEP", 7)
    content = bytes(range(100))
    (tmp_path / "old").write_bytes(content)
    seen = []
    holes = [(90, 100), (0, 3), (40, 60)]
    with copy_around(tmp_path / "old", tmp_path / "new", holes, advance=seen.append, shift=shift) as file:
        for first, last in holes:
            file.seek(first + shift)
            file.write(b"\xff" * (last - first))
    expected = bytearray(content)
    for first, last in holes:
        expected[first:last] = b"\xff" * (last - first)
    assert (tmp_path / "new").read_bytes()[shift:] == expected
    assert sum(seen) == 67
    assert max(seen) <= 7


def test_a_new_folder_is_there_when_all_of_it_is(tmp_path):
    with new_folder(tmp_path / "deep" / "one") as stage:
        (stage / "f").write_text("1")
        assert not (tmp_path / "deep" / "one").exists()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["deep", "deep/one", "deep/one/f"]


def test_a_new_folder_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "one").mkdir()

    def fill():
        with new_folder(tmp_path / "one") as stage:
            (stage / "f").write_text("1")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill()
    assert list(tmp_path.rglob("*")) == [tmp_path / "one"]


def test_a_new_folder_does_not_take_the_place_of_files(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "f").write_text("old")
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "one"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["one", "f"]
