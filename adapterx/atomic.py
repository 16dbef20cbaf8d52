"""Files that are either whole or not there: write to a sibling, flush it, rename it over the target.

A file is never changed in place. Another process may have it mapped, and would see half of each content or die of
SIGBUS; a rename leaves the old inode to those who have it open.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

from adapterx.progress import progress

Buffer = bytes | bytearray | memoryview
Content = Buffer | Iterable[Buffer] | Callable[[BinaryIO], object]

_COPY_STEP = 32 << 20
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def atomic_write(path: str | os.PathLike[str], content: Content) -> None:
    """Make ``path`` hold ``content``, or leave everything as it was.

    The permissions are those of any new file (0666 less the umask). A symlink at ``path`` is replaced, not followed.

    Args:
        path: the file; its folder must exist
        content: bytes, an iterable of bytes, or a function that writes to the binary file it is given

    Raises:
        OSError: no such folder, no permission, disk full. The old file is whole and no temporary file is left.

    Example:
        >>> import tempfile, pathlib
        >>> target = pathlib.Path(tempfile.mkdtemp(), "one.txt")
        >>> atomic_write(target, [b"he", b"llo"])
        >>> target.read_bytes(), [p.name for p in target.parent.iterdir()]
        (b'hello', ['one.txt'])
    """
    with replacing(path) as file:
        if callable(content):
            content(file)
        else:
            for piece in [content] if isinstance(content, Buffer) else content:
                file.write(piece)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new binary file that takes the place of ``path`` when the block ends without an error.

    Raises:
        OSError: as :func:`atomic_write`.
    """
    target = Path(path)
    folder = target.parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "cannot write here, the folder does not exist", str(folder))
    if target.is_dir() and not target.is_symlink():
        raise IsADirectoryError(errno.EISDIR, "cannot write a file over a folder", str(target))
    temporary = folder / f".{target.name[:200]}.{secrets.token_hex(6)}.tmp"
    # Creating it with 0666 lets the kernel apply the umask; reading the umask would race with other threads.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 - Path.open cannot take a descriptor
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _flush_folder(folder)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which gets the name ``path`` when the block ends without an error.

    Args:
        path: an empty folder, or nothing; folders above it are made

    Raises:
        OSError: there is something at ``path``, or no permission. Nothing is left.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.parent / f".{target.name[:200]}.{secrets.token_hex(6)}.tmp"
    stage.mkdir()
    try:
        yield stage
        if target.is_dir():
            target.rmdir()
        stage.rename(target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    _flush_folder(target.parent)


@contextlib.contextmanager
def replaced_folder(path: str | os.PathLike[str], *, dropped: Collection[str] = ()) -> Iterator[Path]:
    """A folder to write into, which takes the place of the folder ``path`` when the block ends without an error.

    What else is in the old folder is carried over (as links where the file system has them, so nothing is copied); only
    the names in ``dropped``, and what is written anew, are not.

    Args:
        path: a folder, or nothing; folders above it are made
        dropped: names in the old folder that go with it

    Raises:
        OSError: there is a file at ``path``, or no permission. The old folder is as it was.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "cannot write a folder over a file", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.parent / f".{target.name[:200]}.{secrets.token_hex(6)}.tmp"
    old = stage.with_suffix(".old")
    stage.mkdir()
    try:
        yield stage
        if target.is_dir():
            kept = (each for each in target.iterdir() if each.name not in dropped and not (stage / each.name).exists())
            for each in sorted(kept):
                if each.is_dir() and not each.is_symlink():
                    shutil.copytree(each, stage / each.name, symlinks=True, copy_function=_linked)
                else:
                    _linked(str(each), str(stage / each.name))
            target.rename(old)
        try:
            stage.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _flush_folder(target.parent)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _flush_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; where folders cannot be opened (Windows) there is no need."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems refuse to sync a folder; the file itself is complete.
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}:
            raise
    finally:
        os.close(descriptor)


def copy_file(source: str | os.PathLike[str], target: str | os.PathLike[str], *, description: str = "copying") -> None:
    """Copy a file of any size, atomically, with a progress bar on a terminal.

    Args:
        source: a regular file
        target: replaced when the copy is complete
        description: the word before the bar

    Raises:
        OSError: as :func:`atomic_write`; also when ``source`` becomes shorter during the copy.
    """
    with Path(source).open("rb", buffering=0) as origin, replacing(target) as copy:
        total = os.fstat(origin.fileno()).st_size
        with progress(description, total) as advance:
            for step in _copied(origin, copy, 0, total, 0):
                advance(step)


@contextlib.contextmanager
def copy_around(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    holes: Iterable[tuple[int, int]],
    *,
    advance: Callable[[int], object],
    shift: int = 0,
) -> Iterator[BinaryIO]:
    """A copy of a file of any size in which some ranges are still to be written, by the block, anywhere in them.

    What the block writes beyond the end makes the file longer. The file takes the place of ``target`` when the block
    ends without an error.

    Args:
        source: a regular file
        target: replaced
        holes: ``(first, last)`` bytes of the source that are not copied
        advance: called with the bytes just copied
        shift: how much further from the start the copied bytes will lie

    Raises:
        OSError: as :func:`copy_file`.
    """
    with Path(source).open("rb", buffering=0) as origin, replacing(target) as copy:
        end = os.fstat(origin.fileno()).st_size
        at = 0
        for first, last in [*sorted(holes), (end, end)]:
            for step in _copied(origin, copy, at, first, shift):
                advance(step)
            at = max(at, last)
        yield copy


def _copied(origin: RawIOBase, copy: BinaryIO, done: int, end: int, shift: int) -> Iterator[int]:
    """Copy bytes to ``shift`` beyond where they were, in the kernel where it can (which also shares blocks).

    Yields the size of each step.
    """
    in_kernel = hasattr(os, "copy_file_range")
    while done < end:
        step = min(_COPY_STEP, end - done)
        moved = 0
        if in_kernel:
            try:
                moved = os.copy_file_range(origin.fileno(), copy.fileno(), step, done, done + shift)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
            # Some file systems answer 0 instead of an error.
            in_kernel = moved > 0
        if not in_kernel:
            origin.seek(done)
            copy.seek(done + shift)
            moved = copy.write(origin.read(step) or b"")
        if not moved:
            raise OSError(errno.EIO, f"the file became shorter during the copy: {done} of {end} bytes")
        done += moved
        yield moved
