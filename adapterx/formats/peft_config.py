"""What an ``adapter_config.json`` of PEFT means for the numbers, read without PEFT.

PEFT's own reader can import modules that the file names. Here a key is one of three: it decides the scale (the
fields of :class:`PeftLora`), it never changes what the saved tensors compute, or it is refused when it is set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from adapterx.errors import FormatError
from adapterx.formats.faults import Faults
from adapterx.formats.file_bytes import FileBytes
from adapterx.formats.json_text import json_object
from adapterx.formats.module_pattern import Budget, ModulePattern, PatternError
from adapterx.limits import Limits

NAME = "adapter_config.json"

# How the adapter was trained, where its tensors go (their names say so), and where it comes from.
_NO_MATTER = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
}  # fmt: skip
_INNOCENT: dict[str, tuple[object, ...]] = {"bias": ("none",)}

# These take something out of the base weights first, so the tensors are right only beside the changed base.
_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")
_PROVENANCE = {
    "base_model": "base_model_name_or_path",
    "peft_type": "peft_type",
    "task_type": "task_type",
    "revision": "revision",
}
_Patterns = tuple[tuple[ModulePattern, float], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class PeftLora:
    """The scale of each module of a LoRA adapter, as PEFT would compute it.

    Args:
        r: the rank of modules that no pattern names
        alpha: the numerator of the scale of modules that no pattern names
        rslora: the scale is ``alpha / sqrt(r)`` instead of ``alpha / r``
        rank_pattern: patterns of module names and their rank; the first that fits counts
        alpha_pattern: patterns of module names and their alpha; the first that fits counts
        metadata: where the adapter comes from
        unsupported: keys that change the result in a way that is not known here, and their values
        budget: work that matching the patterns may still take
    """

    r: int
    alpha: float
    rslora: bool = False
    rank_pattern: _Patterns = ()
    alpha_pattern: _Patterns = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsupported: tuple[tuple[str, str], ...] = ()
    budget: Budget = dataclasses.field(default_factory=Budget)

    def scale(self, module: str, rank: int) -> float:
        """The factor for ``b`` of a module whose tensors have ``rank``.

        Raises:
            ValueError: the config gives the module another rank, or the scale has no fp32 value.

        Example:
            >>> PeftLora(r=8, alpha=16).scale("model.layers.0.self_attn.q_proj", 8)
            2.0
        """
        expected = self._first(self.rank_pattern, module, self.r)
        if expected != rank:
            raise ValueError(f"its tensors have rank {rank}, {NAME} says {expected:g}")
        alpha = self._first(self.alpha_pattern, module, self.alpha)
        scale = alpha / (math.sqrt(rank) if self.rslora else rank)
        if abs(scale) > float(np.finfo(np.float32).max):
            raise ValueError(f"its scale {scale:g} is beyond fp32")
        return scale

    def _first(self, patterns: _Patterns, module: str, otherwise: float) -> float:
        return next((value for pattern, value in patterns if pattern.fits(module, self.budget)), otherwise)


def read(file: FileBytes, limits: Limits) -> PeftLora:
    """Parse and check a config.

    Raises:
        FormatError: larger than ``limits.config_bytes``, no JSON object, or a key whose value cannot be: all at once.
    """
    if file.size > limits.config_bytes:
        raise FormatError(f"{file.path}: {file.size:,} bytes, a config of over {limits.config_bytes:,} is not read")
    raw = json_object(file.whole().tobytes(), where=str(file.path), depth=limits.json_depth)
    faults = Faults(str(file.path))
    rank = _rank(raw.get("r"), "r", limits, faults)
    alpha = _alpha(raw.get("lora_alpha"), "lora_alpha", faults)
    rslora = raw.get("use_rslora") or False
    if not isinstance(rslora, bool):
        faults.add("use_rslora", f"expected true or false, got {_shown(rslora)}")
    if not isinstance(raw.get("peft_type"), str):
        faults.add("peft_type", f'expected "LORA", got {_shown(raw.get("peft_type"))}')
    ranks, alphas = _patterns(raw, "rank_pattern", limits, faults), _patterns(raw, "alpha_pattern", limits, faults)
    faults.refuse("not a config of a LoRA adapter", advice="Save the adapter again with PEFT's save_pretrained.")
    return PeftLora(
        r=rank,
        alpha=alpha,
        rslora=bool(rslora),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        metadata={ours: raw[key] for ours, key in _PROVENANCE.items() if isinstance(raw.get(key), str)},
        unsupported=tuple(_unsupported(raw)),
    )


def _unsupported(raw: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys that change the result in ways that are not reproduced here, with the reason."""
    found = []
    kind = raw["peft_type"]
    if kind != "LORA":
        found.append(("peft_type", f"{_shown(kind)}; only LORA is read"))
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        found.append(
            (
                "init_lora_weights",
                f"{_shown(start)} changed the base weights; save it with path_initial_model_for_weight_conversion",
            )
        )
    for key, value in raw.items():
        # null, false, 0, "", [] and {} switch a feature off in every version of PEFT.
        if key not in _NO_MATTER and value and value not in _INNOCENT.get(key, ()):
            found.append((key, f"{_shown(value)} changes the result in a way that is not known here"))
    return found


def _rank(value: Any, key: str, limits: Limits, faults: Faults) -> int:
    if type(value) is int and 1 <= value <= limits.rank:
        return value
    faults.add(key, f"expected a whole number from 1 to {limits.rank}, got {_shown(value)}")
    return 1


def _alpha(value: Any, key: str, faults: Faults) -> float:
    # The comparison comes before float(), which fails for the longest whole numbers.
    if type(value) in (int, float) and abs(value) <= float(np.finfo(np.float32).max):
        return float(value)
    faults.add(key, f"expected a number that fp32 can hold, got {_shown(value)}")
    return 1.0


def _patterns(raw: Mapping[str, Any], key: str, limits: Limits, faults: Faults) -> _Patterns:
    table = raw.get(key) or {}
    if not isinstance(table, dict) or len(table) > limits.tensors:
        faults.add(key, f"expected an object of at most {limits.tensors} patterns, got {_shown(table)}")
        return ()
    found: list[tuple[ModulePattern, float]] = []
    for pattern, value in table.items():
        place = f"{key}[{pattern!r:.80}]"
        number = _rank(value, place, limits, faults) if key == "rank_pattern" else _alpha(value, place, faults)
        try:
            found.append((ModulePattern.parse(pattern), number))
        except PatternError as cause:
            faults.add(place, f"{cause}; use plain module names")
    return tuple(found)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
