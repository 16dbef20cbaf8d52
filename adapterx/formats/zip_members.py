"""Members of a zip archive that lies in memory, with every declared size checked before anything is inflated.

The standard library's reader builds an object per entry before it can be asked how many there are, and lets the
last of two members of one name win; adapters need only the plain subset that ``numpy.savez`` writes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from adapterx.errors import FormatError
from adapterx.formats.file_bytes import Bytes
from adapterx.limits import Limits

STORED = 0
DEFLATED = 8

_END = struct.Struct("<4s4H2LH")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x1
# 1 January 1980, the first day that the format knows: a clock in a file would make equal files differ.
_FIRST_DAY = 0x21
_UTF8 = 0x800
_PADDING_FIELD = 0xD935
_ADVICE = "The file is broken: download or export it again."

# What is allowed to inflate far beyond the ratio, since a few zeros compress without bound.
_SMALL = 1 << 20


class Member(NamedTuple):
    """One file in an archive: its name, how it is packed, and where."""

    name: str
    method: int
    checksum: int
    packed: int
    size: int
    start: int


def members(data: Bytes, *, where: str, limits: Limits) -> list[Member]:
    """The members, after checking names, sizes, places and what they inflate to in sum.

    Args:
        data: the archive
        where: its name for messages
        limits: ``header_bytes`` bounds the directory, ``tensors`` the entries, ``inflation`` and ``file_bytes`` what
            all members inflate to

    Raises:
        FormatError: no zip, broken, encrypted, zip64, another packing than stored or deflated, a name twice or one
            that leads out of the archive, members that overlap, or too much to inflate.
    """
    start, count = _directory(data, where, limits)
    found: list[Member] = []
    names: set[str] = set()
    for _ in range(count):
        member, start = _entry(data, start, where)
        if member.name in names:
            raise FormatError(f"{where}: the member {member.name!r} is there twice; which one holds cannot be known")
        names.add(member.name)
        found.append(member)
    _refuse_overlaps(found, where)
    total = sum(member.size for member in found)
    if total > limits.file_bytes or total > max(limits.inflation * len(data), _SMALL):
        raise FormatError(
            f"{where}: {len(data):,} bytes that say they inflate to {total:,}; "
            f"at most {limits.inflation} times the file, and {limits.file_bytes:,} bytes, are inflated"
        )
    return found


def content(data: Bytes, member: Member, where: str) -> memoryview:
    """The bytes of a member: where it is stored, a view of the archive.

    Raises:
        FormatError: it inflates to another size than declared, or has another checksum.
    """
    packed = data[member.start : member.start + member.packed].data
    unpacked = packed if member.method == STORED else memoryview(_inflated(packed, member, where))
    if len(unpacked) != member.size or zlib.crc32(unpacked) != member.checksum:
        raise FormatError(f"{where}: the member {member.name!r} is damaged (size or checksum); {_ADVICE}")
    return unpacked


def _inflated(packed: memoryview, member: Member, where: str) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One byte over what was declared is enough to know that the declaration lied.
        return inflater.decompress(packed, member.size + 1)
    except zlib.error as error:
        raise FormatError(f"{where}: the member {member.name!r} is damaged ({error}); {_ADVICE}") from None


def _directory(data: Bytes, where: str, limits: Limits) -> tuple[int, int]:
    """Where the central directory starts, and how many entries it has."""
    tail = data[-(_END.size + 0xFFFF) :].tobytes()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise FormatError(f"{where}: a zip archive without its end, it is truncated; {_ADVICE}")
    _, disk, first_disk, _, count, size, start, comment = _END.unpack_from(tail, at)
    end = len(data) - len(tail) + at
    if disk or first_disk or count == 0xFFFF or 0xFFFFFFFF in (size, start):
        raise FormatError(f"{where}: a zip archive in several parts or of zip64 kind; write a plain one")
    if count > limits.tensors or size > limits.header_bytes:
        raise FormatError(f"{where}: {count} members, at most {limits.tensors} are read")
    if start + size != end or end + _END.size + comment != len(data) or count * _ENTRY.size > size:
        raise FormatError(f"{where}: its zip directory does not lie where it says, or bytes follow it; {_ADVICE}")
    return start, count


def _entry(data: Bytes, at: int, where: str) -> tuple[Member, int]:
    """The directory entry at ``at``, and where the next one starts."""
    if at + _ENTRY.size > len(data):
        raise FormatError(f"{where}: its zip directory is truncated; {_ADVICE}")
    fields = _ENTRY.unpack_from(data.data, at)
    signature, flags, method, checksum, packed, size = fields[0], fields[3], fields[4], *fields[7:10]
    name_length, extra, comment, local = fields[10], fields[11], fields[12], fields[16]
    end = at + _ENTRY.size + name_length + extra + comment
    if signature != b"PK\x01\x02" or end > len(data):
        raise FormatError(f"{where}: its zip directory is malformed; {_ADVICE}")
    name = _name(data[at + _ENTRY.size :][:name_length].tobytes(), where)
    if flags & _ENCRYPTED or method not in (STORED, DEFLATED):
        raise FormatError(f"{where}: the member {name!r} is encrypted or packed by method {method}; write a plain one")
    if method == STORED and packed != size:
        raise FormatError(f"{where}: the member {name!r} says {size} bytes and holds {packed}; {_ADVICE}")
    return Member(name, method, checksum, packed, size, _data_start(data, local, packed, where)), end


def _data_start(data: Bytes, local: int, packed: int, where: str) -> int:
    """Where a member's data starts: behind its own, second header."""
    if local + _LOCAL.size <= len(data):
        fields = _LOCAL.unpack_from(data.data, local)
        start = int(local + _LOCAL.size + fields[9] + fields[10])
        if fields[0] == b"PK\x03\x04" and start + packed <= len(data):
            return start
    raise FormatError(f"{where}: a member does not lie where its zip directory says; {_ADVICE}")


def _name(raw: bytes, where: str) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError(f"{where}: a member's name is not UTF-8; {_ADVICE}") from None
    if name.startswith("/") or "\\" in name or ".." in name.split("/") or not name.isprintable():
        raise FormatError(f"{where}: the member {name!r} has a name that no adapter file has; nothing was read")
    return name


def _refuse_overlaps(found: list[Member], where: str) -> None:
    end = 0
    for member in sorted(found, key=lambda member: member.start):
        if member.start < end:
            raise FormatError(f"{where}: the member {member.name!r} overlaps another; {_ADVICE}")
        end = member.start + member.packed


def archive(pieces: list[tuple[str, list[memoryview | bytes]]], *, alignment: int) -> Iterator[bytes | memoryview]:
    """A zip archive of stored members, piece by piece; the same members give the same bytes.

    Args:
        pieces: name and content of each member
        alignment: each member's content starts at a multiple of it, by way of an extra field of zeros
    """
    directory: list[bytes] = []
    at = 0
    for name, parts in pieces:
        raw = name.encode()
        size, checksum = 0, 0
        for part in parts:
            size, checksum = size + len(part), zlib.crc32(part, checksum)
        # An extra field takes four bytes of header, so shorter gaps go once around.
        padding = -(at + _LOCAL.size + len(raw) + 4) % alignment
        extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
        common = (20, _UTF8, STORED, 0, _FIRST_DAY, checksum, size, size, len(raw), len(extra))
        yield _LOCAL.pack(b"PK\x03\x04", *common) + raw + extra
        yield from parts
        directory.append(_ENTRY.pack(b"PK\x01\x02", 20, *common[:9], 0, 0, 0, 0, 0, at) + raw)
        at += _LOCAL.size + len(raw) + len(extra) + size
    listed = b"".join(directory)
    yield listed + _END.pack(b"PK\x05\x06", 0, 0, len(pieces), len(pieces), len(listed), at, 0)
