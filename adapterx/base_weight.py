"""BaseWeight: how the float weight of a base operation is stored, as plain data; reading and rewriting it.

Whatever the operator, the weight reads as ``[d_in, d_out]`` in float32: an adapter's change to it is ``a.T @ b``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from adapterx.adapter import Array
from adapterx.errors import ModelError
from adapterx.grid import Grid, around, between, nearest_codes
from adapterx.packed_codes import repacked, unpacked

Form = Literal["in_out", "out_in", "conv", "embedding"]
Storage = Literal["float", "affine", "nf4", "fp4"]
Tensors = Callable[[str], Array]

WEIGHT, SCALE, ZERO = "weight", "scale", "zero_point"
_BYTE = 8
_REDUCED = 64
# The values of codes 0..15. NF4: quantiles of a normal distribution (Dettmers et al., arXiv 2305.14314, appendix E);
# FP4: sign, two bits of exponent, one of mantissa, over 12 (bitsandbytes).
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_HALF = (0.0, 0.0052083333333, 0.6666666666667, 1.0, 0.3333333333333, 0.5, 0.1666666666667, 0.25)
TABLES = {"nf4": _NF4, "fp4": (*_FP4_HALF, *(-value for value in _FP4_HALF))}


@dataclasses.dataclass(frozen=True, slots=True)
class BaseWeight:
    """Where the float weight of one base operation is, and how it is written there. JSON-able; holds no tensors.

    Args:
        form: what the axes of ``shape`` mean. ``in_out`` (MatMul), ``out_in`` (``transB``, MatMulNBits), ``conv``
            ``[c_out, c_in / groups, *kernel]``, ``embedding`` ``[vocabulary, hidden]``
        shape: of the weight as numbers, in that form
        tensors: role (``weight``, ``scale``, ``zero_point``) -> initializer name
        storage: ``float``; ``affine``, which is ``(code - zero_point) * scale``; or ``nf4`` and ``fp4`` of
            MatMulBnb4, which can be read but not written
        bits: of one code, 0 for floats
        signed: codes are signed
        axis: of ``shape``, along which scales differ; ``None`` for one scale
        block_size: elements of ``axis`` that share a scale; 0 when each has its own (or there is one)
        zero: the zero point where no tensor holds any
        by_rows: codes and zero points are packed row by row, padded to whole blocks and bytes (MatMulNBits,
            GatherBlockQuantized over uint8); else as ONNX packs 4-bit tensors, without gaps

    Example:
        >>> one = BaseWeight("out_in", (3, 2), {"weight": "fc.weight"})
        >>> read_weight(one, lambda name: np.ones((3, 2), np.float16)).shape
        (2, 3)
    """

    form: Form
    shape: tuple[int, ...]
    tensors: Mapping[str, str]
    storage: Storage = "float"
    bits: int = 0
    signed: bool = False
    axis: int | None = None
    block_size: int = 0
    zero: int = 0
    by_rows: bool = False

    @property
    def d_in(self) -> int:
        """Features that come in: for a convolution, channels of a group times the kernel; rows of an embedding."""
        return self.shape[0] if self.rows_first else math.prod(self.shape[1:])

    @property
    def d_out(self) -> int:
        """Features that go out."""
        return math.prod(self.shape[1:]) if self.rows_first else self.shape[0]

    @property
    def rows_first(self) -> bool:
        """Axis 0 of the tensor is ``d_in``."""
        return self.form in {"in_out", "embedding"}

    @property
    def quantized(self) -> bool:
        """The weight is not stored as the numbers that it is."""
        return self.storage != "float"

    def as_dict(self) -> dict[str, Any]:
        """For the manifest's JSON; :meth:`from_dict` reads it."""
        return {**dataclasses.asdict(self), "tensors": dict(self.tensors)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> BaseWeight:
        """What :meth:`as_dict` gave.

        Raises:
            ValueError: unknown form or storage, or a size that is no number.
            TypeError: a field too many, or one too few.
        """
        found = cls(**{**raw, "shape": tuple(raw["shape"]), "tensors": dict(raw["tensors"])})
        sizes = (*found.shape, found.bits, found.block_size)
        known = found.form in get_args(Form) and found.storage in get_args(Storage)
        if not known or not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError(f"a base weight has form {found.form!r}, storage {found.storage!r} and sizes {sizes}")
        return found


def read_weight(ref: BaseWeight, tensor: Tensors) -> Array:
    """The weight as numbers.

    Args:
        ref: how it is stored
        tensor: initializer name -> its content. Tensors of 4-bit types may come as ``ml_dtypes`` arrays or as the
            packed bytes.

    Returns:
        float32 ``[d_in, d_out]``, possibly a view; float64 where that is stored.
    """
    if ref.storage == "float":
        stored = tensor(ref.tensors[WEIGHT])
        values = stored.astype(np.float64 if stored.dtype == np.float64 else np.float32, copy=False)
    elif ref.storage == "affine":
        values = _ungrouped(ref, _grid(ref, tensor).values(_grouped(ref, _codes(ref, tensor))))
    else:
        values = _looked_up(ref, tensor)
    return _matrix(ref, values)


def written(ref: BaseWeight, weight: Array, tensor: Tensors, *, keep_grid: bool = False) -> dict[str, Array]:
    """The tensors that hold ``weight``, in the dtype, block and scheme that are there now.

    A quantized group keeps its present scale and zero point where they fit the new numbers better than those that ONNX
    Runtime's quantizer would choose. So what did not change comes back as the same bytes, whoever quantized it.

    Args:
        ref: how it is stored
        weight: ``[d_in, d_out]``
        tensor: initializer name -> its present content
        keep_grid: no scale and no zero point changes, since something else depends on them; what lies beyond the
            outermost code is clipped

    Returns:
        Initializer name -> content, for all of ``ref.tensors``; infinity where a half type cannot hold a number.

    Raises:
        ModelError: a storage that cannot be written.
    """
    values = _stored_order(ref, weight)
    if ref.storage == "float":
        present = tensor(ref.tensors[WEIGHT])
        with np.errstate(over="ignore"):
            return {ref.tensors[WEIGHT]: values.reshape(present.shape).astype(present.dtype, copy=False)}
    if ref.storage != "affine":
        raise ModelError(f"{ref.tensors[WEIGHT]}: a weight in {ref.storage} can be read but not written")
    return _requantized(ref, values, tensor, keep_grid)


def _matrix(ref: BaseWeight, values: Array) -> Array:
    matrix = values.reshape(ref.shape[0], -1)
    return matrix if ref.rows_first else matrix.T


def _stored_order(ref: BaseWeight, weight: Array) -> Array:
    return (weight if ref.rows_first else weight.T).reshape(ref.shape)


def _looked_up(ref: BaseWeight, tensor: Tensors) -> Array:
    """MatMulBnb4: blocks of the flat ``[d_out, d_in]``, the first of two codes in the high half of a byte."""
    packed = tensor(ref.tensors[WEIGHT]).reshape(-1)
    codes = np.stack([packed >> 4, packed & 0xF], axis=-1).reshape(-1)[: math.prod(ref.shape)]
    absmax = tensor(ref.tensors[SCALE]).astype(np.float32).reshape(-1)
    scale = np.repeat(absmax, ref.block_size)[: codes.size]
    return (np.array(TABLES[ref.storage], np.float32)[codes] * scale).reshape(ref.shape)


# -- Codes and zero points, packed or not -----------------------------------------------------------------------------


def _codes(ref: BaseWeight, tensor: Tensors) -> Array:
    length = ref.shape[-1] if ref.by_rows else math.prod(ref.shape)
    return _unpacked(ref, tensor(ref.tensors[WEIGHT]), ref.shape, length)


def _unpacked(ref: BaseWeight, array: Array, shape: tuple[int, ...], length: int) -> Array:
    """Integers of ``shape``, whose last axis (``by_rows``) or whole has ``length`` codes, as int8 or uint8."""
    if not _is_packed(ref, array):
        return array.astype(np.int8 if ref.signed else np.uint8).reshape(shape)
    rows = _bytes_by_rows(ref, array, shape)
    return unpacked(rows, ref.bits, signed=ref.signed, length=length).reshape(shape)


def _packed(ref: BaseWeight, codes: Array, present: Array) -> Array:
    """``codes`` (float32) in the shape and dtype of ``present``."""
    whole = codes.astype(np.int8 if ref.signed else np.uint8)
    if not _is_packed(ref, present):
        return whole.reshape(present.shape).astype(present.dtype)
    rows = _bytes_by_rows(ref, present, codes.shape)
    flat = whole.reshape(*rows.shape[:-1], -1)
    return repacked(flat, rows, ref.bits).reshape(present.shape)


def _is_packed(ref: BaseWeight, array: Array) -> bool:
    return ref.by_rows or (ref.bits < _BYTE and array.dtype.name in {"uint8", "int8"})


def _bytes_by_rows(ref: BaseWeight, array: Array, shape: tuple[int, ...]) -> Array:
    return np.ascontiguousarray(array).reshape(*shape[:-1], -1) if ref.by_rows else array.reshape(-1)


# -- Groups ---------------------------------------------------------------------------------------------------------


def _blocked(ref: BaseWeight) -> tuple[int, int, int, int]:
    """``(m, blocks, block, n)`` of a blocked weight, the last block padded."""
    assert ref.axis is not None, "blocks lie along an axis"
    before, length, after = ref.shape[: ref.axis], ref.shape[ref.axis], ref.shape[ref.axis + 1 :]
    return math.prod(before), -(-length // ref.block_size), ref.block_size, math.prod(after)


def _grouped(ref: BaseWeight, array: Array) -> Array:
    """``[m, blocks, block, n]`` of ``array`` in ``ref.shape``. A short last block repeats its last elements."""
    if ref.axis is None:
        return array.reshape(1, 1, -1, 1)
    if not ref.block_size:
        return np.moveaxis(array, ref.axis, 0).reshape(ref.shape[ref.axis], 1, -1, 1)
    m, blocks, block, n = _blocked(ref)
    array = array.reshape(m, -1, n)
    missing = blocks * block - array.shape[1]
    if missing:
        array = np.pad(array, ((0, 0), (0, missing), (0, 0)), "edge")
    return array.reshape(m, blocks, block, n)


def _ungrouped(ref: BaseWeight, groups: Array) -> Array:
    if ref.axis is None:
        return groups.reshape(ref.shape)
    if not ref.block_size:
        shape = (ref.shape[ref.axis], *ref.shape[: ref.axis], *ref.shape[ref.axis + 1 :])
        return np.moveaxis(groups.reshape(shape), 0, ref.axis)
    m, blocks, block, n = _blocked(ref)
    return groups.reshape(m, blocks * block, n)[:, : ref.shape[ref.axis]].reshape(ref.shape)


def _scale_shape(ref: BaseWeight) -> tuple[int, int, int, int]:
    if ref.axis is None:
        return 1, 1, 1, 1
    if not ref.block_size:
        return ref.shape[ref.axis], 1, 1, 1
    m, blocks, _, n = _blocked(ref)
    return m, blocks, 1, n


def _zero_tensor_shape(ref: BaseWeight) -> tuple[int, ...]:
    """Axes of the zero points as they are packed: by rows they are padded, so the last axis counts."""
    m, blocks, _, n = _scale_shape(ref)
    if not ref.by_rows:
        return m, blocks, 1, n
    return (m, blocks) if n == 1 else (m, blocks, n)


def _grid(ref: BaseWeight, tensor: Tensors) -> Grid:
    """The grid that the weight lies on now, its codes as wide as the type allows."""
    scale = tensor(ref.tensors[SCALE]).astype(np.float32).reshape(_scale_shape(ref))
    low = -(1 << (ref.bits - 1)) if ref.signed else 0
    if ZERO not in ref.tensors:
        zero = np.full_like(scale, ref.zero)
    else:
        zero = _zero_points(ref, tensor(ref.tensors[ZERO])).astype(np.float32)
        zero = np.broadcast_to(zero.reshape(zero.shape if zero.size == 1 else scale.shape), scale.shape)
    return Grid(scale, zero, low, low + (1 << ref.bits) - 1)


def _zero_points(ref: BaseWeight, array: Array) -> Array:
    if _is_float(array):
        return array
    if _is_shared(ref, array):
        return _unpacked(ref, array, (1, 1, 1, 1), 1)
    shape = _zero_tensor_shape(ref)
    return _unpacked(ref, array, shape, shape[-1] if ref.by_rows else math.prod(shape)).reshape(_scale_shape(ref))


def _is_shared(ref: BaseWeight, zero: Array) -> bool:
    """One zero point for the scales of many columns (MatMulInteger)."""
    codes = zero.size * (_BYTE // ref.bits if _is_packed(ref, zero) else 1)
    return codes < math.prod(_scale_shape(ref))


def _is_float(array: Array) -> bool:
    # bfloat16 is of no kind that numpy knows.
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


# -- Requantization --------------------------------------------------------------------------------------------------


def _requantized(ref: BaseWeight, values: Array, tensor: Tensors, keep_grid: bool) -> dict[str, Array]:
    present, old_codes = _grid(ref, tensor), _grouped(ref, _codes(ref, tensor))
    groups = _grouped(ref, values.astype(np.float32, copy=False))
    stored_scale = tensor(ref.tensors[SCALE])
    fresh = present if keep_grid else _fresh(ref, groups, present, old_codes, tensor)
    # The codes are chosen for the scale as it is stored, not as it was computed.
    fresh = dataclasses.replace(fresh, scale=fresh.scale.astype(stored_scale.dtype).astype(np.float32))
    codes, keep = nearest_codes(groups, present, old_codes, fresh)
    scale = np.where(keep, present.scale, fresh.scale)
    zero = np.where(keep, present.zero, fresh.zero)
    result = {
        ref.tensors[WEIGHT]: _packed(ref, _ungrouped(ref, codes), tensor(ref.tensors[WEIGHT])),
        ref.tensors[SCALE]: scale.astype(stored_scale.dtype).reshape(stored_scale.shape),
    }
    if ZERO in ref.tensors:
        result[ref.tensors[ZERO]] = _stored_zero(ref, zero, tensor(ref.tensors[ZERO]))
    return result


def _stored_zero(ref: BaseWeight, zero: Array, present: Array) -> Array:
    if _is_float(present):
        return zero.astype(present.dtype).reshape(present.shape)
    if _is_shared(ref, present):
        # Nothing moved it.
        return _packed(ref, zero.reshape(-1)[:1], present)
    return _packed(ref, zero.reshape(_zero_tensor_shape(ref)), present)


def _fresh(ref: BaseWeight, groups: Array, present: Grid, codes: Array, tensor: Tensors) -> Grid:
    """The grid that ONNX Runtime's quantizer gives these numbers, in the range of codes that it used before."""
    low, high = _range_in_use(ref, codes, present)
    middle = 0 if ref.signed else 1 << (ref.bits - 1)
    stored = tensor(ref.tensors[ZERO]) if ZERO in ref.tensors else None
    fixed = stored is None or bool((present.zero == middle).all()) or _is_shared(ref, stored)
    if fixed:
        signed_largest = low - middle == -(1 << (ref.bits - 1)) and (ref.by_rows or ref.bits < _BYTE)
        signed_largest = signed_largest and bool((present.zero == middle).all())
        scale = around(groups, present.zero, low=low, high=high, signed_largest=signed_largest)
        return Grid(scale, present.zero, low, high)
    assert stored is not None, "else it is fixed"
    scale, zero = between(groups, low=low, high=high, whole=not _is_float(stored))
    if _is_float(stored):
        zero = zero.astype(stored.dtype).astype(np.float32)
    return Grid(scale, zero, low, high)


def _range_in_use(ref: BaseWeight, codes: Array, present: Grid) -> tuple[int, int]:
    """The codes that the quantizer allowed itself: it may have left out the lowest, or half of them (reduce_range).

    Full range would have used the outermost codes, since the largest number of a group lies on one.
    """
    low, high = present.low, present.high
    least, most = int(codes.min()), int(codes.max())
    if ref.by_rows:
        return low, high
    if ref.signed and least > low and not present.zero.any():
        low = -high
    if ref.bits == _BYTE and ref.signed and max(-least, most) <= _REDUCED:
        return -_REDUCED, _REDUCED
    if ref.bits == _BYTE and not ref.signed and most <= high // 2:
        return low, high // 2
    return low, high
