"""Adapters in a file that is mapped into memory: the system may drop its pages, and reads them again when needed."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeAlias

import numpy as np

from adapterx.adapter import Adapter, Array, LowRank
from adapterx.errors import OptionError
from adapterx.runtime.inference import ort
from adapterx.runtime.resident import Resident

_ALIGNED: Final = 64
_Place: TypeAlias = tuple[int, int]


def mapped(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The same arrays as read-only pages of one temporary file without a name.

    The file is gone when the last array is. It lies where temporary files do (``TMPDIR``); where that is a file
    system in memory, nothing is saved. Arrays that share their memory share it in the file too.

    Args:
        arrays: of any dtype and shape

    Raises:
        OptionError: the file cannot be written or mapped.

    Example:
        >>> import numpy as np
        >>> one = mapped({"a": np.arange(3)})["a"]
        >>> one, one.flags.writeable
        (array([0, 1, 2]), False)
    """
    arrays = {name: array if array.flags.c_contiguous else array.copy() for name, array in arrays.items()}
    places = {name: _place(array) for name, array in arrays.items()}
    starts, end = {}, 0
    for place in dict.fromkeys(places.values()):
        starts[place] = end
        end += -(-place[1] // _ALIGNED) * _ALIGNED
    written = {places[name]: array for name, array in arrays.items()}
    pages = _pages(written, end) if end else np.zeros(0, np.uint8)
    found = {}
    for name, array in arrays.items():
        start = starts[places[name]]
        flat = pages[start : start + array.nbytes]
        found[name] = flat.view(array.dtype).reshape(array.shape)
    return found


def mapped_resident(
    resident: Resident, values: Callable[[Mapping[str, Array]], Mapping[str, ort.OrtValue]]
) -> Resident:
    """The same resident, generation and all, with its adapter and its arrays in a mapped file.

    Args:
        resident: what a session holds
        values: makes the OrtValues of arrays

    Raises:
        OptionError: the file cannot be written or mapped.
    """
    moved = mapped(dict(_tensors(resident)))
    arrays = {name: moved[f"fed {name}"] for name in resident.arrays}
    adapter = resident.adapter
    if adapter is not None:
        adapter = Adapter(
            {site: _low_rank(site, change, moved) for site, change in adapter.sites.items()}, adapter.metadata
        )
    return dataclasses.replace(resident, adapter=adapter, arrays=arrays, tensors=values(arrays))


def resident_nbytes(resident: Resident) -> int:
    """Bytes of an adapter and of what is fed for it; memory that both share counts once."""
    return sum(size for _, size in {_place(array) for _, array in _tensors(resident)})


def _tensors(resident: Resident) -> Iterator[tuple[str, Array]]:
    for site, change in resident.adapter.sites.items() if resident.adapter else ():
        for part, array in (("a", change.a), ("b", change.b), *change.parts.items()):
            yield f"{site} {part}", array
    for name, array in resident.arrays.items():
        yield f"fed {name}", array


def _low_rank(site: str, change: LowRank, moved: Mapping[str, Array]) -> LowRank:
    parts = {part: moved[f"{site} {part}"] for part in change.parts}
    return LowRank(a=moved[f"{site} a"], b=moved[f"{site} b"], parts=parts)


def _place(array: Array) -> _Place:
    """Address and size; nothing lies nowhere."""
    return (array.ctypes.data, array.nbytes) if array.nbytes else (0, 0)


def _pages(arrays: Mapping[_Place, Array], size: int) -> Array:
    try:
        with tempfile.TemporaryFile(prefix="adapterx.") as file:
            for array in arrays.values():
                # Not every dtype is known to the buffer protocol, bytes are.
                file.write(array.reshape(-1).view(np.uint8).data)
                file.write(bytes(-array.nbytes % _ALIGNED))
            file.flush()
            return _map(file.fileno(), size)
    except (OSError, ValueError) as error:
        raise OptionError(
            f"adapters beyond what may lie in memory go to a temporary file of {size:,} bytes, which cannot be "
            f"written and mapped in {tempfile.gettempdir()} ({error}); set TMPDIR to a folder with room, or raise "
            "max_cpu_loras and max_cpu_bytes"
        ) from error


def _map(descriptor: int, size: int) -> Array:
    """Read-only pages of an open file, which outlive its descriptor."""
    if os.name == "nt":
        return np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), np.uint8)
    # Python's own mmap keeps a descriptor (until 3.13 always), and 1,024 of them are a common limit of a process.
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    number = ctypes.c_int
    system.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, number, number, number, ctypes.c_long)
    address = system.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    pages = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(pages, system.munmap, ctypes.c_void_p(address), ctypes.c_size_t(size)).atexit = False
    return np.frombuffer(memoryview(pages).toreadonly(), np.uint8)
