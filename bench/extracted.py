"""What swap.py and feed.py run on: one export, the models that come of it, and adapters that fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnxruntime as ort
from llama_export import Llama, write_export

import adapterx as ax


@dataclasses.dataclass(frozen=True, slots=True)
class Extracted:
    """Files in one folder, and the adapter that was in the export.

    Args:
        sizes: of the export
        export: the export, adapter baked in
        base: the same layers without branches, other weights
        model: the export with its adapter as graph inputs
        external: the export with its adapter as external initializers
        adapter: what was in the export
    """

    sizes: Llama
    export: Path
    base: Path
    model: Path
    external: Path
    adapter: ax.Adapter


def prepare(folder: Path, sizes: Llama) -> Extracted:
    """Write an export and extract it in both modes."""
    places = {name: folder / name for name in ("export", "base")}
    for place in places.values():
        place.mkdir()
    export = write_export(places["export"] / "model.onnx", sizes)
    base = write_export(places["base"] / "model.onnx", dataclasses.replace(sizes, rank=0))
    inputs = ax.extract_adapters(export, folder / "inputs", make_inputs=True)
    external = ax.extract_adapters(export, folder / "external", make_inputs=False)
    assert set(inputs.sites.names) == set(sizes.sites()), "every Linear has an adapter"
    return Extracted(sizes, export, base, inputs.model_path, external.model_path, inputs.adapter)


def random_adapter(like: ax.Adapter, *, rank: int, seed: int) -> ax.Adapter:
    """Small normal numbers at every site of ``like``."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) * np.float32(0.02)

    return ax.Adapter(
        {name: ax.LowRank(a=draw(rank, site.d_in), b=draw(rank, site.d_out)) for name, site in like.sites.items()}
    )


def one_thread() -> ort.SessionOptions:
    """One thread that does not spin: what is measured is work, not how cores are shared."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return options


def activations(sizes: Llama, *, rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Feeds of the model."""
    return {"x": np.random.default_rng(1).standard_normal((rows, tokens, sizes.d), np.float32)}
