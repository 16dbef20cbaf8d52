"""FileBytes: the bytes of one regular file, read once, in pieces that are still in the cache when they are checked."""

from __future__ import annotations

import errno
import hashlib
import mmap as memory_map
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from adapterx.errors import FormatError
from adapterx.limits import Limits

Bytes = NDArray[np.uint8]

# Small enough to stay in the second-level cache between the read and the check, large enough to hide the call.
CHUNK = 1 << 20

_OPEN = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOCTTY", 0)
# A FIFO without a writer must not block the open; regular files do not know the flag.
_OPEN |= getattr(os, "O_NONBLOCK", 0)


class FileBytes:
    """An open regular file whose bytes are asked for from front to back; a context manager.

    ``data`` is one buffer of the file's size. It may be looked at up to where :meth:`advance` or :meth:`whole` has
    come (``filled``). After :meth:`whole` it is read-only, and unless it is mapped nothing that happens to the file
    changes it.

    Args:
        path: the file; symlinks are followed
        limits: ``file_bytes`` is checked before anything is allocated
        root: if given, the folder that the file must really lie in, symlinks resolved
        sha256: if given, the hex digest that the whole file must have
        mmap: map the file instead of reading it; only for files that nobody truncates or rewrites in place

    Raises:
        FormatError: not a regular file, not readable, empty, too large, or outside ``root``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        limits: Limits,
        *,
        root: str | os.PathLike[str] | None = None,
        sha256: str | None = None,
        mmap: bool = False,
    ) -> None:
        self.path = Path(path)
        self._expected = sha256
        self._digest = hashlib.sha256() if sha256 is not None else None
        self._descriptor = _opened(self.path, root)
        try:
            self._before = os.fstat(self._descriptor)
            self._refuse_odd_files(limits)
            self.size = self._before.st_size
            self._mapped = mmap
            self.data: Bytes = self._map() if mmap else np.empty(self.size, np.uint8)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.filled = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def advance(self, upto: int) -> Iterator[Bytes]:
        """Fill ``data`` up to ``upto`` and yield each new piece, at most :data:`CHUNK` bytes, while it is hot."""
        upto = min(upto, self.size)
        while self.filled < upto:
            piece = self.data[self.filled : min(self.filled + CHUNK, upto)]
            if not self._mapped:
                self._read_into(piece)
            if self._digest is not None:
                self._digest.update(piece.data)
            self.filled += len(piece)
            yield piece

    def head(self, count: int) -> bytes:
        """The first ``count`` bytes, fewer where the file is shorter."""
        for _ in self.advance(count):
            pass
        return self.data[:count].tobytes()

    def whole(self) -> Bytes:
        """All bytes, read-only, after checking that the file did not change and has the pinned hash."""
        for _ in self.advance(self.size):
            pass
        after = os.fstat(self._descriptor)
        if (after.st_size, after.st_mtime_ns) != (self.size, self._before.st_mtime_ns):
            raise FormatError(f"{self.path}: the file changed while it was read; load it again when its writer is done")
        if self._digest is not None and self._digest.hexdigest() != str(self._expected).lower():
            raise FormatError(
                f"{self.path}: expected sha256 {self._expected}, the file has {self._digest.hexdigest()}; "
                "it is not the file that was pinned"
            )
        self.data.flags.writeable = False
        return self.data

    def _read_into(self, piece: Bytes) -> None:
        left = piece.data
        while left:
            count = os.readv(self._descriptor, [left]) if hasattr(os, "readv") else _copied_in(self._descriptor, left)
            if count == 0:
                raise FormatError(f"{self.path}: the file became shorter while it was read; load it again")
            left = left[count:]

    def _map(self) -> Bytes:
        return np.frombuffer(memory_map.mmap(self._descriptor, 0, access=memory_map.ACCESS_READ), np.uint8)

    def _refuse_odd_files(self, limits: Limits) -> None:
        if not stat.S_ISREG(self._before.st_mode):
            raise FormatError(f"{self.path}: expected a regular file, this is {_kind(self._before.st_mode)}")
        if self._before.st_size == 0:
            raise FormatError(f"{self.path}: the file is empty; was it downloaded completely?")
        if self._before.st_size > limits.file_bytes:
            raise FormatError(
                f"{self.path}: the file has {self._before.st_size:,} bytes, at most {limits.file_bytes:,} are read; "
                "pass limits=Limits(file_bytes=...) if you trust it"
            )


def _opened(path: Path, root: str | os.PathLike[str] | None) -> int:
    """A descriptor for ``path``; with ``root``, of the real file, which must not become a symlink meanwhile."""
    flags = _OPEN
    target = path
    if root is not None:
        target, store = Path(os.path.realpath(path)), Path(os.path.realpath(root))
        if not target.is_relative_to(store):
            raise FormatError(f"{path}: it really is {target}, which lies outside {store}; nothing outside is read")
        flags |= getattr(os, "O_NOFOLLOW", 0)
    try:
        return os.open(target, flags)
    except PermissionError:
        raise FormatError(f"{path}: permission denied; {_mode(target)}") from None
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file or folder") from None
    except OSError as error:
        # Linux answers ENXIO to the open of a socket.
        what = "expected a regular file, this is a socket" if error.errno == errno.ENXIO else error.strerror
        raise FormatError(f"{path}: cannot be opened ({what})") from None
    except ValueError as error:
        raise FormatError(f"{str(path)!r}: cannot be opened ({error})") from None


def _copied_in(descriptor: int, left: memoryview) -> int:
    got = os.read(descriptor, len(left))
    left[: len(got)] = got
    return len(got)


def _mode(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "one of the folders above it is closed to this user"
    return f"its mode is {stat.filemode(found.st_mode)} and its owner is user {found.st_uid}"


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")
