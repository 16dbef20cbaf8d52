"""Calls the CUDA source of LowRankAdd as it was compiled for the host, on arrays that end where memory ends."""

import contextlib
import ctypes
import mmap
from ctypes import POINTER, Structure, c_char_p, c_int32, c_int64, c_void_p
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {name: i for i, name in enumerate(["float32", "float16", "bfloat16", "float64", "int8"])}
PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)


class HostArray(Structure):
    _fields_ = (("at", c_void_p), ("dims", POINTER(c_int64)), ("count", c_int64))


class HostCall(Structure):
    _fields_ = (
        *((name, HostArray) for name in ("base", "x", "a", "b", "mask", "scale")),
        ("y", c_void_p),
        *((name, c_int32) for name in ("activations", "ports", "processors", "order")),
        ("most_rows", c_int64),
        *((name, c_int32) for name in ("tiles", "splits", "group")),
        *((name, c_int64) for name in ("read_of_a", "read_of_b")),
    )


class Result(NamedTuple):
    y: np.ndarray
    tiles: bool
    splits: int
    read: int  # bytes of a and b


def dtype(name):
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def close_to_traps(array):
    """A copy whose last byte is the last of a page; who reads on past it, falls into the next."""
    size = -(-max(array.nbytes, 1) // PAGE) * PAGE
    pages = mmap.mmap(-1, size + PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    forbid(start + size, PAGE)
    copy = np.frombuffer(pages, np.uint8, array.nbytes, size - array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def forbid(start, size):
    assert LIBC.mprotect(c_void_p(start), ctypes.c_size_t(size), 0) == 0


@contextlib.contextmanager
def forbidden(rows):
    """Reading any of these whole pages ends the process."""
    for row in rows:
        assert row.ctypes.data % PAGE == 0
        assert row.nbytes % PAGE == 0
        forbid(row.ctypes.data, row.nbytes)
    yield
    for row in rows:
        LIBC.mprotect(c_void_p(row.ctypes.data), ctypes.c_size_t(row.nbytes), mmap.PROT_READ | mmap.PROT_WRITE)


class CudaOnHost:
    def __init__(self, library):
        self.function = ctypes.CDLL(str(library)).adapterx_cuda_on_host
        self.function.restype = c_char_p

    def __call__(
        self, base, x, a, b, mask, scale=None, *, order=0, processors=4, most_rows=0, in_place=False, trap=True
    ):
        place = close_to_traps if trap else np.ascontiguousarray
        arrays = {"base": base, "x": x, "a": a, "b": b, "mask": mask, "scale": scale}
        arrays = {name: place(array) for name, array in arrays.items() if array is not None}
        y = arrays["base"] if in_place else place(np.full(base.shape, 77, base.dtype))
        call = HostCall(processors=processors, order=order, most_rows=most_rows, y=y.ctypes.data)
        call.activations, call.ports = DTYPES[x.dtype.name], DTYPES[a.dtype.name]
        for name, array in arrays.items():
            dims = (c_int64 * max(array.ndim, 1))(*array.shape)
            setattr(call, name, HostArray(array.ctypes.data, dims, array.ndim))
        fault = self.function(ctypes.byref(call))
        if fault is not None:
            raise ValueError(fault.decode())
        return Result(y.copy(), bool(call.tiles), call.splits, call.read_of_a + call.read_of_b)
