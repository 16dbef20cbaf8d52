"""Adapters to write, and files built by hand: what our own writers would refuse to make."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adapterx.adapter import Adapter, LowRank

FORMATS = ("safetensors", "onnx_adapter", "npz")
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
NAMES = st.sampled_from(
    ["fc", "model.layers.0.q_proj", "model.layers.10.self_attn.v_proj", "block_é", "a.lora_A.b", "0"]
)


@st.composite
def adapters(draw: st.DrawFn, dtypes: tuple[np.dtype[Any], ...] = DTYPES) -> Adapter:
    """Small adapters of any finite values; sites may differ in rank, shape and element type."""
    sites = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(dtypes))
        rank, d_in, d_out = (draw(st.integers(1, 5)) for _ in range(3))
        numbers = st.floats(-1e3, 1e3, width=16)
        a, b = (draw(hnp.arrays(np.float32, (rank, d), elements=numbers)) for d in (d_in, d_out))
        sites[name] = LowRank(a=a.astype(dtype), b=b.astype(dtype))
    return Adapter(sites, draw(st.sampled_from([{}, {"base_model": "org/model"}])))


def one_site(dtype: Any = np.float32, rank: int = 2, d_in: int = 4, d_out: int = 3) -> Adapter:
    """An adapter of one site, ``fc``, with small distinct values."""
    a = np.arange(rank * d_in, dtype=np.float32).reshape(rank, d_in) - 3
    b = np.arange(rank * d_out, dtype=np.float32).reshape(rank, d_out) + 1
    return Adapter({"fc": LowRank(a=a.astype(dtype), b=b.astype(dtype))})


def pair(a: np.ndarray, b: np.ndarray, site: str = "fc") -> dict[str, np.ndarray]:
    """The two tensors of a site under their file names."""
    return {f"{site}.lora_A.weight": a, f"{site}.lora_B.weight": b}


def matrices(rank: int = 2, d_in: int = 4, d_out: int = 3, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """``a [r, d_in]`` and ``b [r, d_out]``."""
    site = one_site(dtype, rank, d_in, d_out).sites["fc"]
    return site.a, site.b


_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int32": "I32"}


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with any header: a JSON value, or its text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """One tensor's entry in a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors_of(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    """A sound safetensors file of any tensors, as any tool might write it."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = entry(list(array.shape), len(data), len(data) + len(raw), _CODES[array.dtype.name])
        data += raw
    return safetensors_bytes(header, data)


def peft_folder(folder: Path, config: dict[str, Any] | None = None, **tensors: np.ndarray) -> Path:
    """A PEFT folder of one site ``fc`` of rank 2 (or ``tensors`` by name after the prefix), alpha 4."""
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["fc"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | (config or {})))
    if not tensors:
        a, b = matrices()
        tensors = pair(a, b.T)
    named = {f"base_model.model.{name}": array for name, array in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(safetensors_of(named, {"format": "pt"}))
    return folder
