"""Writing LoRA files as diffusers' ``save_lora_weights`` does: PEFT's tensors behind the name of a pipeline's model."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from adapterx.adapter import GAIN, INPUT_GAIN, PROMPT, WHOLE_BIAS, WHOLE_WEIGHT, Adapter, Array, LowRank
from adapterx.atomic import atomic_write
from adapterx.faults import Faults
from adapterx.flattened import FLAT_ADVICE, PIPELINE, in_pipeline, is_flattened
from adapterx.formats import peft_folder, safetensors
from adapterx.formats.diffusion import SETTINGS
from adapterx.formats.tensor_table import tensors_to_write

_NOT_HELD = {GAIN, INPUT_GAIN, PROMPT, WHOLE_BIAS, WHOLE_WEIGHT}


def write(adapter: Adapter, path: str | os.PathLike[str]) -> None:
    """Write ``adapter`` as one file for a pipeline.

    ``lora_adapter_metadata`` says what a PEFT config would: without it, older versions of diffusers scale sites of
    another rank than the first's.

    Args:
        adapter: LoRA and DoRA of one or several models of a pipeline
        path: replaced if it exists

    Raises:
        FormatError: a site whose model in the pipeline nothing tells, flattened names, parts that these files do not
            have: all at once. Nothing is written.
    """
    models = _by_model(adapter, str(path))
    tensors: list[tuple[str, Array]] = []
    settings: dict[str, Any] = {}
    for model, sites in models.items():
        config = peft_folder.lora_config(sites)
        settings |= {f"{model}.{key}": value for key, value in config.items()}
        tensors += [(f"{model}.{name}", np.ascontiguousarray(t)) for name, t in peft_folder.lora_tensors(sites, config)]
    metadata = {"format": "pt", SETTINGS: json.dumps(settings, indent=2, sort_keys=True)}
    atomic_write(path, safetensors.pieces(tensors, metadata))


def _by_model(adapter: Adapter, where: str) -> dict[str, dict[str, LowRank]]:
    # Its checks come before its first tensor.
    next(tensors_to_write(adapter.sites, where))
    faults = Faults(where)
    found: dict[str, dict[str, LowRank]] = {}
    for site, change in adapter.sites.items():
        model, path = in_pipeline(site)
        if is_flattened(site):
            faults.add(site, FLAT_ADVICE)
        elif not model:
            faults.add(
                site, f"nothing tells its model in a pipeline; name it {', '.join(f'{m}.' for m in PIPELINE)}..."
            )
        if held := _NOT_HELD & change.parts.keys():
            faults.add(site, f"these files have no {', '.join(sorted(held))}")
        found.setdefault(model, {})[path] = change
    for model, sites in found.items():
        for path, cause in peft_folder.lora_faults(sites):
            faults.add(f"{model}.{path}", cause)
    faults.refuse("this adapter cannot be a diffusers file", advice="Nothing was written. Write it as .safetensors.")
    return found
