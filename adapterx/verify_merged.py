"""Proof of an extraction whose sites take more than two matrices: what is fed against what is merged into the weights.

An adapter of such a kind has no two matrices in the original graph that other numbers could be put in. So the
exported one is compared with the original graph as it stands, and others, which were never in it, with
:func:`adapterx.graph.merge.merge_adapter`: ports compute on activations, a merge on weights, and the two meet nowhere
before the outputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from adapterx.adapter import LORA_A, LORA_B, PROMPT, Adapter, Array, LowRank
from adapterx.errors import MismatchError
from adapterx.graph.merge import merge_adapter
from adapterx.manifest import Manifest
from adapterx.site import LOW_RANK, AdapterSite

_GAIN = 0.3

Run = Callable[[Path], list[Array]]


def needs_merging(manifest: Manifest) -> bool:
    """Whether a site is more than a linear layer with two matrices."""
    return any(site.ports != LOW_RANK or site.kind != "lora" or site.kernel for site in manifest.sites)


def random_adapter(manifest: Manifest, rng: np.random.Generator, *, grow: int) -> Adapter:
    """An adapter for every port; with ``grow`` of 1 or -1, of larger or smaller ranks that differ among sites."""
    return Adapter({site.name: _random(site, rng, grow * (1 + i % 3)) for i, site in enumerate(manifest.sites)})


def _random(site: AdapterSite, rng: np.random.Generator, more: int) -> LowRank:
    rank, dtype = max(1, site.rank + more), np.dtype(site.fitted_dtype)

    def drawn(port: str, rows: int, scale: float) -> Array:
        return (scale * rng.standard_normal((rows, *site.width(port)))).astype(dtype)

    parts = {port: drawn(port, site.rows(port), _GAIN) for port in site.ports if port not in LOW_RANK}
    if LORA_A not in site.ports:
        return LowRank.of_parts(parts)
    fan_in = 1 if site.is_embedding else int(np.prod(site.width(LORA_A)))
    a, b = drawn(LORA_A, rank, fan_in**-0.5), drawn(LORA_B, rank, rank**-0.5)
    return LowRank(a=a, b=b, parts=parts)


def merged_outputs(
    extracted: Path, manifest: Manifest, candidates: Mapping[str, Adapter | None], run: Run
) -> tuple[dict[str, list[Array]], str]:
    """Outputs with every candidate merged in (``None`` is a weight of 0); or none, and why there can be none.

    Args:
        extracted: the model with ports
        manifest: its own
        candidates: by name
        run: gives the outputs of a model file
    """
    if any(PROMPT in site.ports for site in manifest.sites):
        return {}, "a prompt cannot be merged into weights"
    outputs = {}
    some = next(one for one in candidates.values() if one is not None)
    for name, candidate in candidates.items():
        with tempfile.TemporaryDirectory(prefix="adapterx.") as folder:
            weight = 0.0 if candidate is None else 1.0
            try:
                merge = merge_adapter(extracted, candidate or some, Path(folder) / "merged.onnx", weight=weight)
            except MismatchError as error:
                return {}, f"others cannot be merged into this base ({str(error).splitlines()[1].strip()})"
            if merge.quantized:
                return {}, "merging others into its quantized base would quantize them"
            outputs[name] = run(merge.path)
    return outputs, ""
