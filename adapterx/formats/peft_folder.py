"""Writing PEFT folders: what ``peft.PeftModel.from_pretrained`` loads, with every scale at 1."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapterx.adapter import (
    ABSOLUTE,
    GAIN,
    INPUT_GAIN,
    MAGNITUDE,
    SHIFT,
    WHOLE_BIAS,
    WHOLE_WEIGHT,
    Adapter,
    Array,
    LowRank,
)
from adapterx.atomic import Buffer, new_folder, replacing
from adapterx.faults import Faults
from adapterx.flattened import FLAT_ADVICE, is_flattened
from adapterx.formats import peft_config, safetensors
from adapterx.formats.peft import WEIGHTS
from adapterx.formats.tensor_table import PREFIX, tensors_to_write

# The last part of an embedding's path. Its tensors have names of their own in PEFT, and the matrices do not tell.
EMBEDDINGS = (
    "embed_tokens", "word_embeddings", "word_embedding", "token_embedding", "wte", "embed_in", "tok_embeddings",
    "shared",
)  # fmt: skip
_GAINS = frozenset({GAIN, INPUT_GAIN})


def write(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Every site is named in full in ``target_modules``, so PEFT adapts these modules and no others. ``r`` is the most
    frequent rank; sites of another are in ``rank_pattern`` and ``alpha_pattern``, under patterns that fit their name
    only. alpha is the rank everywhere, since the scale is inside ``lora_B``. A module whose last part is in
    :data:`EMBEDDINGS` is written as an embedding's.

    Args:
        adapter: LoRA on linear, convolution and embedding layers, with or without biases of its own; DoRA; (IA)3; whole
            weights and biases beside LoRA
        folder: made if it is not there; other files in it stay

    Raises:
        FormatError: what one PEFT adapter cannot hold, by site: parts of several kinds, names that were flattened,
            an element type that no file holds. Nothing is written.
        OSError: no permission, disk full.
    """
    folder = Path(folder)
    # Its checks come before its first tensor.
    next(tensors_to_write(adapter.sites, str(folder)))
    config = _config(adapter, str(folder))
    # Both are complete before either takes its place.
    with (
        contextlib.nullcontext(folder) if folder.is_dir() else new_folder(folder) as place,
        replacing(place / WEIGHTS) as weights,
        replacing(place / peft_config.NAME) as text,
    ):
        for piece in _weights(adapter, config):
            weights.write(piece)
        text.write(json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def _weights(adapter: Adapter, config: Mapping[str, Any]) -> Iterator[Buffer]:
    tensors = _ia3_tensors(adapter.sites) if config["peft_type"] == "IA3" else lora_tensors(adapter.sites, config)
    return safetensors.pieces(((PREFIX + name, np.ascontiguousarray(t)) for name, t in tensors), {"format": "pt"})


def _config(adapter: Adapter, where: str) -> dict[str, Any]:
    faults = Faults(where)
    for site in adapter.sites:
        if is_flattened(site):
            faults.add(site, FLAT_ADVICE)
    is_ia3 = any(_GAINS & change.parts.keys() for change in adapter.sites.values())
    for site, cause in (_ia3_faults if is_ia3 else lora_faults)(adapter.sites):
        faults.add(site, cause)
    faults.refuse("this adapter is none that PEFT has", advice="Nothing was written. Write it as .safetensors.")
    common = {
        "base_model_name_or_path": adapter.metadata.get("base_model"),
        "inference_mode": True,
        "peft_type": "IA3" if is_ia3 else "LORA",
        "revision": adapter.metadata.get("revision"),
        "task_type": adapter.metadata.get("task_type"),
    }
    return common | (_ia3_config if is_ia3 else lora_config)(adapter.sites)


def lora_faults(sites: Mapping[str, LowRank]) -> Iterator[tuple[str, str]]:
    """Sites that cannot stand in one LoRA adapter of PEFT, and why."""
    dora = any(MAGNITUDE in change.parts for change in sites.values())
    for site, change in sites.items():
        if set(change.parts) - {SHIFT, *ABSOLUTE}:
            yield site, "a prompt, which stands in no PEFT adapter beside other sites"
        elif not change.rank and SHIFT in change.parts:
            yield site, "a shift without matrices, which PEFT does not know"
        elif change.rank and WHOLE_WEIGHT in change.parts:
            yield site, "a whole weight and matrices at one module"
        elif dora and change.rank and MAGNITUDE not in change.parts:
            yield site, "it has no magnitude, as other sites have; PEFT's use_dora is for all"
        elif dora and SHIFT in change.parts:
            yield site, "a magnitude and a shift at one module, which PEFT refuses"


def _ia3_faults(sites: Mapping[str, LowRank]) -> Iterator[tuple[str, str]]:
    for site, change in sites.items():
        if change.rank or len(change.parts) != 1 or not _GAINS & change.parts.keys():
            yield site, f"not just one gain as in (IA)3, but {', '.join(name for name, _ in change.tensors())}"


def lora_config(sites: Mapping[str, LowRank]) -> dict[str, Any]:
    """What PEFT's ``LoraConfig`` takes for sites whose scale is folded in."""
    parts = {name for change in sites.values() for name in change.parts}
    ranks = {site: change.rank for site, change in sites.items() if change.rank}
    common = collections.Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # PEFT matches the end of a name, so that "q" would fit "a.q" too; an anchor in front is respected.
    others = {f"^{re.escape(site)}": rank for site, rank in ranks.items() if rank != common}
    saved = [
        site for site, change in sites.items() if not change.rank and set(change.parts) & {WHOLE_WEIGHT, WHOLE_BIAS}
    ]
    biases = any(WHOLE_BIAS in change.parts for change in sites.values() if change.rank)
    return {
        "alpha_pattern": others,
        "bias": "lora_only" if biases else "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_alpha": common,
        "lora_bias": SHIFT in parts,
        "lora_dropout": 0.0,
        "modules_to_save": saved or None,
        "r": common,
        "rank_pattern": others,
        "target_modules": sorted(ranks),
        "use_dora": MAGNITUDE in parts,
        "use_rslora": False,
    }


def lora_tensors(sites: Mapping[str, LowRank], config: Mapping[str, Any]) -> Iterator[tuple[str, Array]]:
    """The tensors by PEFT's names, without its prefix; ``config`` is that of :func:`lora_config`."""
    for site, change in sites.items():
        if site.rpartition(".")[2] in EMBEDDINGS and change.rank:
            yield f"{site}.lora_embedding_A", change.a
            yield f"{site}.lora_embedding_B", change.b.T
        elif change.rank:
            yield f"{site}.lora_A.weight", change.a
            yield f"{site}.lora_B.weight", change.b.T.reshape(*change.b.T.shape, *[1] * len(change.kernel))
            if config["lora_bias"]:
                zeros = np.zeros((1, change.d_out), change.dtype)
                yield f"{site}.lora_B.bias", change.parts.get(SHIFT, zeros)[0]
        if MAGNITUDE in change.parts:
            yield f"{site}.lora_magnitude_vector", change.parts[MAGNITUDE].reshape(_magnitude_shape(change))
        if WHOLE_WEIGHT in change.parts:
            yield f"{site}.weight", change.parts[WHOLE_WEIGHT]
        if WHOLE_BIAS in change.parts:
            yield f"{site}.{'base_layer.' if change.rank else ''}bias", change.parts[WHOLE_BIAS][0]


def _magnitude_shape(change: LowRank) -> tuple[int, ...]:
    return (1, change.d_out, *[1] * len(change.kernel)) if change.kernel else (change.d_out,)


def _ia3_config(sites: Mapping[str, LowRank]) -> dict[str, Any]:
    return {
        "feedforward_modules": sorted(site for site, change in sites.items() if INPUT_GAIN in change.parts),
        "init_ia3_weights": True,
        "target_modules": sorted(sites),
    }


def _ia3_tensors(sites: Mapping[str, LowRank]) -> Iterator[tuple[str, Array]]:
    for site, change in sites.items():
        [(name, part)] = change.parts.items()
        vector = (part.astype(np.float32) + 1).astype(part.dtype)
        yield f"{site}.ia3_l", vector if name == INPUT_GAIN else vector.T
