"""Modules (PEFT's ``modules_to_save``) and biases (``bias="lora_only"``) that were trained in full beside an adapter.

In a PEFT file: the whole ``weight`` and ``bias`` of the module under their own names; a bias of an adapted layer under
``base_layer.bias``.

In a graph: the module's own operation, with the trained weight. What the base had there is not in the file. So the
extracted model gets a weight and bias of zeros there, and the site must be fed: without an adapter there is no
base to run. In a model that sites were put into, the base is there, and no adapter is needed.

A bias trained in full is a bias like any other in a graph: no exporter says which parameters were trained. It is taken
out only where the exported adapter is given at extraction (``extract_adapters(adapter=...)``); else it stays.

The ports are those of LoRA at full rank, ``min(d_in, d_out)``, which is small for a classifier's head, and ``shift``:
the change from the graph's weight and bias to the trained ones (:func:`lowered`). Only linear and embedding modules.

In a mixed batch: as LoRA, each row with its own head.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapterx.adapter import PROMPT, SHIFT, WHOLE_BIAS, WHOLE_WEIGHT, Array, LowRank
from adapterx.kinds.lora import cast, of_delta, wide
from adapterx.site import AdapterSite

KEYS = ("weight", "bias", "base_layer.bias")
_OF_TRAINERS = frozenset({"peft", "kohya", "diffusers"})


def read(tensors: Mapping[str, Array]) -> LowRank:
    """What a file says in full of one module: ``weight`` ``[d_out, d_in]``, ``bias`` ``[d_out]``, or one of them.

    Raises:
        ValueError: the weight is no matrix.
    """
    weight = tensors.get("weight")
    bias = tensors.get("bias", tensors.get("base_layer.bias"))
    if weight is not None and weight.ndim != 2:
        raise ValueError(f"a module of another kind than linear, trained in full: its weight is {weight.shape}")
    parts = {} if weight is None else {WHOLE_WEIGHT: weight}
    if bias is not None:
        parts[WHOLE_BIAS] = bias.reshape(1, -1)
    return LowRank.of_parts(parts)


def needs_base(change: LowRank, site: AdapterSite, metadata: Mapping[str, str]) -> str:
    """Why ``change`` cannot act at a site whose base is not in the graph, or ``""``.

    What a trainer wrote changes a base, unless it holds weight and bias whole. What was fitted to a model says how to
    come from the zeros that the model has there.

    Args:
        change: as a reader made it
        site: trained in full when it was exported
        metadata: of the adapter
    """
    if metadata.get("format") not in _OF_TRAINERS or PROMPT in change.parts:
        return ""
    wanted = [WHOLE_WEIGHT] if site.kind == "saved" else []
    wanted += [WHOLE_BIAS] if SHIFT in site.ports else []
    lost = [part for part in wanted if part not in change.parts]
    return f"adapter brings no {' and no '.join(lost)}, and the model has no base there" if lost else ""


def lowered(change: LowRank, weight: Array | None, bias: Array | None) -> LowRank:
    """``change`` beside one base: the way from the base's weight and bias to its own.

    Args:
        change: with a ``whole_weight`` or ``whole_bias`` or both
        weight: the base's, as ``whole_weight`` lies; only needed for that
        bias: the base's ``[d_out]``, ``None`` when it has none
    """
    parts = {SHIFT: change.parts[SHIFT]} if SHIFT in change.parts else {}
    low_rank = change
    if WHOLE_WEIGHT in change.parts:
        assert weight is not None, "the caller read it"
        low_rank = of_delta(wide(change.parts[WHOLE_WEIGHT]) - wide(weight), change.dtype)
    if WHOLE_BIAS in change.parts:
        whole = wide(change.parts[WHOLE_BIAS])
        total = whole if bias is None else whole - wide(bias)
        if SHIFT in parts:
            total = total + wide(parts[SHIFT])
        parts[SHIFT] = cast(total, change.dtype, "bias")
    return LowRank(a=low_rank.a, b=low_rank.b, parts=parts)
