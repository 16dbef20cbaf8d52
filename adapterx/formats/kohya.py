"""Writing LoRA files as kohya-ss sd-scripts does: flattened modules, ``lora_down``, ``lora_up`` and ``alpha``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import numpy as np

from adapterx.adapter import MAGNITUDE, Adapter, Array, LowRank
from adapterx.atomic import atomic_write
from adapterx.faults import Faults
from adapterx.flattened import COMPONENTS, flattened, in_pipeline, is_flattened
from adapterx.formats import safetensors
from adapterx.formats.tensor_table import tensors_to_write


def write(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write ``adapter``; ``alpha`` is the rank of each module, since the scale is inside ``lora_up``.

    Args:
        adapter: LoRA and DoRA on linear and convolution layers, of one or several models of a pipeline
        path: replaced if it exists

    Raises:
        FormatError: a site whose model in the pipeline nothing tells, two sites whose names become one, parts
            that these files do not have: all at once. Nothing is written.
    """
    names = _names(adapter, str(path))
    tensors = ((name, np.ascontiguousarray(array)) for name, array in _tensors(adapter.sites, names))
    atomic_write(path, safetensors.pieces(tensors, {"format": "pt", "ss_network_module": "networks.lora"}))


def _names(adapter: Adapter, where: str) -> dict[str, str]:
    """The flattened name of each site."""
    # Its checks come before its first tensor.
    next(tensors_to_write(adapter.sites, where))
    faults = Faults(where)
    models = {site: in_pipeline(site) for site in adapter.sites if not is_flattened(site)}
    # One text encoder is `te`, of two the first is `te1`.
    prefixes = {model: prefix for prefix, model in COMPONENTS.items() if model and prefix != "lora_te1_"}
    if any(model == "text_encoder_2" for model, _ in models.values()):
        prefixes["text_encoder"] = "lora_te1_"
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for site, change in adapter.sites.items():
        model, path = models.get(site, ("", site))
        if site in models and model not in prefixes:
            faults.add(
                site, f"nothing tells its model in a pipeline; name it {', '.join(f'{m}.' for m in prefixes)}..."
            )
            continue
        names[site] = name = prefixes[model] + flattened(path) if site in models else site
        if name in taken:
            faults.add(site, f"its name becomes {name}, and so does that of {taken[name]}")
        taken[name] = site
        if set(change.parts) - {MAGNITUDE} or not change.rank:
            faults.add(site, f"these files have no {', '.join(name for name in change.parts if name != MAGNITUDE)}")
    faults.refuse("this adapter cannot be a kohya file", advice="Nothing was written. Write it as .safetensors.")
    return names


def _tensors(sites: Mapping[str, LowRank], names: Mapping[str, str]) -> Iterator[tuple[str, Array]]:
    for site, change in sites.items():
        name, wide = names[site], [1] * len(change.kernel)
        yield f"{name}.lora_down.weight", change.a
        yield f"{name}.lora_up.weight", change.b.T.reshape(change.d_out, change.rank, *wide)
        yield f"{name}.alpha", np.asarray(change.rank, np.float32)
        if MAGNITUDE in change.parts:
            yield f"{name}.dora_scale", change.parts[MAGNITUDE].reshape(-1, 1, *wide)
