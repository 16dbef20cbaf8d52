"""The element types that adapters may have, and what each file format calls them."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class ElementType:
    """One element type under all its names.

    Args:
        dtype: the numpy type
        safetensors: its code in a safetensors header
        onnx: its number in ``onnx.TensorProto.DataType``, which ``.onnx_adapter`` files use
    """

    dtype: np.dtype[Any]
    safetensors: str
    onnx: int


TYPES = (
    ElementType(np.dtype(np.float32), "F32", 1),
    ElementType(np.dtype(np.float16), "F16", 10),
    ElementType(np.dtype(ml_dtypes.bfloat16), "BF16", 16),
    ElementType(np.dtype(ml_dtypes.float8_e4m3fn), "F8_E4M3", 17),
    ElementType(np.dtype(ml_dtypes.float8_e5m2), "F8_E5M2", 19),
)
BY_DTYPE = {kind.dtype: kind for kind in TYPES}
BY_SAFETENSORS = {kind.safetensors: kind.dtype for kind in TYPES}
BY_ONNX = {kind.onnx: kind.dtype for kind in TYPES}

# For refusals: what was expected.
NAMES = ", ".join(str(kind.dtype) for kind in TYPES)
