"""What an ``adapter_config.json`` of PEFT means for the numbers, read without PEFT.

PEFT's own reader can import modules that the file names. Here a key is one of three: it decides what the tensors mean
(the fields of :class:`PeftSettings`), it never changes what the saved tensors compute, or it is refused when it is set.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from adapterx.errors import FormatError
from adapterx.faults import Faults
from adapterx.formats.file_bytes import FileBytes
from adapterx.formats.module_pattern import Budget, ModulePattern, PatternError
from adapterx.json_text import json_object
from adapterx.limits import Limits

NAME = "adapter_config.json"

# What decides the numbers, by the kind of adapter; the common ones are read by `read`.
_DECIDES = {
    "LORA": {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "bias",
             "modules_to_save", "init_lora_weights"},
    "ADALORA": {"lora_alpha", "bias", "modules_to_save", "init_lora_weights", "r", "rank_pattern"},
    "LOHA": {"r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save"},
    "LOKR": {"r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save"},
    "VERA": {"r", "bias", "modules_to_save"},
    "IA3": {"feedforward_modules", "modules_to_save"},
    "PROMPT_TUNING": {"num_virtual_tokens"},
    "P_TUNING": {"num_virtual_tokens"},
    "PREFIX_TUNING": {"num_virtual_tokens"},
}  # fmt: skip
KINDS = tuple(_DECIDES)
_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")

# How an adapter was trained, where its tensors go (their names say so), and where it comes from.
_NO_MATTER = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "alpha_pattern",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type", "velora_config",
}  # fmt: skip
_NO_MATTER_FOR = {
    "ADALORA": {"beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step",
                "use_rslora"},
    "LOHA": {"init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"},
    "LOKR": {"init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d",
             "decompose_both", "decompose_factor"},
    "VERA": {"d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"},
    "IA3": {"init_ia3_weights"},
}  # fmt: skip
_NO_MATTER_FOR_PROMPTS = {
    "encoder_dropout", "encoder_hidden_size", "encoder_num_layers", "encoder_reparameterization_type", "init_weights",
    "num_attention_heads", "num_layers", "num_transformer_submodules", "prefix_projection", "prompt_tuning_init",
    "prompt_tuning_init_text", "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip
_BIASES = ("none", "all", "lora_only", "vera_only")

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
class PeftSettings:
    """What a config says of the numbers: the scale of each module, and what may stand in the file beside LoRA.

    Args:
        r: the rank of modules that no pattern names
        alpha: the numerator of the scale of modules that no pattern names
        kind: PEFT's ``peft_type``
        rslora: the scale is ``alpha / sqrt(r)`` instead of ``alpha / r``
        dora: sites have a magnitude
        lora_bias: sites may have a bias of their own
        biases: biases of the base may have been trained in full
        saved: names of modules that were trained in full, or of what they are in
        feedforward: names of modules whose input, not output, (IA)3 multiplies
        rank_pattern: patterns of module names and their rank; the first that fits counts
        alpha_pattern: patterns of module names and their alpha; the first that fits counts
        metadata: where the adapter comes from
        unsupported: keys that change the result in a way that is not known here, and their values
        budget: work that matching the patterns may still take
    """

    r: int
    alpha: float
    kind: str = "LORA"
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    biases: bool = False
    saved: tuple[str, ...] = ()
    feedforward: tuple[str, ...] = ()
    rank_pattern: _Patterns = ()
    alpha_pattern: _Patterns = ()
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsupported: tuple[tuple[str, str], ...] = ()
    budget: Budget = dataclasses.field(default_factory=Budget)

    def scale(self, module: str, rank: int) -> float:
        """The factor for ``b`` of a module whose tensors have ``rank``; 0 where tensors do not show their rank.

        Raises:
            ValueError: the config gives the module another rank, or the scale has no fp32 value.

        Example:
            >>> PeftSettings(r=8, alpha=16).scale("model.layers.0.self_attn.q_proj", 8)
            2.0
        """
        expected = self._first(self.rank_pattern, module, self.r)
        if self.kind != "ADALORA" and rank not in (expected, 0):
            raise ValueError(f"its tensors have rank {rank}, {NAME} says {expected:g}")
        rank = rank or int(expected)
        alpha = self._first(self.alpha_pattern, module, self.alpha)
        scale = alpha / (math.sqrt(rank) if self.rslora else rank)
        if abs(scale) > float(np.finfo(np.float32).max):
            raise ValueError(f"its scale {scale:g} is beyond fp32")
        return scale

    def _first(self, patterns: _Patterns, module: str, otherwise: float) -> float:
        return next((value for pattern, value in patterns if pattern.fits(module, self.budget)), otherwise)


def read(file: FileBytes, limits: Limits) -> PeftSettings:
    """Parse and check a config.

    Raises:
        FormatError: larger than ``limits.config_bytes``, no JSON object, or a key whose value cannot be: all at once.
    """
    if file.size > limits.config_bytes:
        raise FormatError(f"{file.path}: {file.size:,} bytes, a config of over {limits.config_bytes:,} is not read")
    raw = json_object(file.whole().tobytes(), where=str(file.path), depth=limits.json_depth)
    return settings_of(raw, limits, where=str(file.path))


def settings_of(raw: Mapping[str, Any], limits: Limits, *, where: str) -> PeftSettings:
    """What a config that has been parsed says.

    Args:
        raw: its keys
        limits: for ranks and numbers of patterns
        where: its name for messages

    Raises:
        FormatError: keys whose values cannot be, all at once.
    """
    faults = Faults(where)
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        faults.add("peft_type", f'expected "LORA", got {_shown(kind)}')
        kind = "LORA"
    decides = _DECIDES.get(kind, set())
    rank = _rank(raw.get("r"), "r", limits, faults) if "r" in decides and kind != "ADALORA" else 1
    alpha_key = next((key for key in ("lora_alpha", "alpha") if key in decides), None)
    alpha = 1.0 if alpha_key is None else _alpha(raw.get(alpha_key), alpha_key, faults)
    patterned = "alpha_pattern" in decides
    settings = PeftSettings(
        r=rank,
        alpha=alpha,
        kind=kind,
        rslora=_flag(raw, "use_rslora", faults) and kind == "LORA",
        dora=_flag(raw, "use_dora", faults),
        lora_bias=_flag(raw, "lora_bias", faults),
        biases=_word(raw, "bias", faults, expected=_BIASES) not in ("", "none"),
        saved=_names(raw, "modules_to_save", limits, faults),
        feedforward=_names(raw, "feedforward_modules", limits, faults),
        rank_pattern=_patterns(raw, "rank_pattern", limits, faults) if patterned else (),
        alpha_pattern=_patterns(raw, "alpha_pattern", limits, faults) if patterned else (),
        metadata={ours: raw[key] for ours, key in _PROVENANCE.items() if isinstance(raw.get(key), str)},
        unsupported=tuple(_unsupported(raw, kind)),
    )
    faults.refuse("not a config of a PEFT adapter", advice="Save the adapter again with PEFT's save_pretrained.")
    return settings


def _unsupported(raw: Mapping[str, Any], kind: str) -> list[tuple[str, str]]:
    """Keys that change the result in ways that are not reproduced here, with the reason."""
    found = []
    if kind not in _DECIDES:
        found.append(("peft_type", f"{_shown(kind)}; read are {', '.join(KINDS)}"))
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        found.append(
            (
                "init_lora_weights",
                f"{_shown(start)} changed the base weights; save it with path_initial_model_for_weight_conversion",
            )
        )
    known = _NO_MATTER | _DECIDES.get(kind, _DECIDES["LORA"]) | _NO_MATTER_FOR.get(kind, set())
    known |= _NO_MATTER_FOR_PROMPTS if kind in _PROMPTS else set()
    for key, value in raw.items():
        # null, false, 0, "", [] and {} switch a feature off in every version of PEFT.
        if key not in known and value and not (key == "bias" and value == "none"):
            found.append((key, f"{_shown(value)} changes the result in a way that is not known here"))
    return found


def _flag(raw: Mapping[str, Any], key: str, faults: Faults) -> bool:
    value = raw.get(key) or False
    if not isinstance(value, bool):
        faults.add(key, f"expected true or false, got {_shown(value)}")
    return bool(value)


def _word(raw: Mapping[str, Any], key: str, faults: Faults, *, expected: tuple[str, ...]) -> str:
    value = raw.get(key) or ""
    if value and value not in expected:
        faults.add(key, f"expected one of {', '.join(expected)}, got {_shown(value)}")
    return value if isinstance(value, str) else ""


def _names(raw: Mapping[str, Any], key: str, limits: Limits, faults: Faults) -> tuple[str, ...]:
    """A list of module names; a single one may stand alone."""
    value = raw.get(key) or []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or len(names) > limits.tensors or not all(isinstance(name, str) for name in names):
        faults.add(key, f"expected a list of module names, got {_shown(value)}")
        return ()
    return tuple(names)


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
