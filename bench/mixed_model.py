"""The models of bench/mixed.py: layers of Llama-3.2-1B shape, float or int4, with and without places for adapters."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import onnx
from llama_export import Llama, write_export

import adapterx as ax

LLAMA_1B = Llama(layers=2, d=2048, kv=512, ff=8192, rank=0)
QUICK = Llama(layers=1, d=64, kv=32, ff=128, rank=0)
BLOCK = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Models:
    """Files of one base.

    Args:
        base: the graph as it was exported (and quantized)
        ported: by dtype of the adapters (``float32``, ``float16``, ``int8``), the same graph with sites
    """

    base: Path
    ported: dict[str, Path]


def write_models(folder: Path, sizes: Llama, *, bits: int, dtypes: tuple[str, ...]) -> Models:
    """A base of ``bits`` (32, or 4 by blocks of 32 with accuracy_level 4) and its injected forms."""
    folder.mkdir(parents=True)
    base = write_export(folder / "base.onnx", sizes)
    if bits == 4:
        base = _quantized(base, folder / "int4" / "base.onnx")
    ported = {}
    for dtype in dtypes:
        made = ax.inject_adapters(base, folder / dtype, targets="all-linear", adapter_dtype=dtype)
        assert len(made.sites) == len(sizes.sites()), "every Linear has a site"
        ported[dtype] = made.model_path
    return Models(base, ported)


def site_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """Site name -> ``(d_in, d_out)``, as the model says."""
    return {site.name: site.shape for site in ax.AdapterSession(model).sites}


def random_adapter(shapes: dict[str, tuple[int, int]], *, rank: int, seed: int) -> ax.Adapter:
    """Small normal numbers at every site; cut from one block, since drawing them takes longer than all else."""
    rng = np.random.default_rng(seed)
    block = rng.standard_normal(2 * rank * max(max(shape) for shape in shapes.values()), np.float32) * np.float32(0.02)
    sites = {}
    for name, (d_in, d_out) in shapes.items():
        a, b = (
            np.roll(block, int(rng.integers(block.size)))[: rank * width].reshape(rank, width)
            for width in (d_in, d_out)
        )
        sites[name] = ax.LowRank(a=a, b=b)
    return ax.Adapter(sites)


def _quantized(base: Path, target: Path) -> Path:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(onnx.load(base), block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    target.parent.mkdir()
    onnx.save(quantizer.model.model, target, save_as_external_data=True, location=f"{target.name}.data")
    return target
