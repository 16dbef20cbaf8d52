"""Config mapping: which layer of a model is quantized by which method.

Within a config names win over classes and classes over the global one, and among equals the last; between the configs
of a sum the same holds, except that among globals the first wins. What matches nothing is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from adapterx.errors import ModelError, OptionError, nearest
from adapterx.quant.layer_config import AnyConfig, ComposedConfig, Key, LayerConfig

# What Neural Compressor takes for a language model's head.
_HEADS = re.compile(r".*lm_head|.*output_layer|.*embed_out")
# PEFT's adapters stay float on a base that is quantized.
_ADAPTERS = re.compile(r"(^|\.)lora_(A|B|E|embedding_A|embedding_B|magnitude_vector)(\.|$)")
_GLOBAL, _TYPE, _NAME = range(3)
Claim = tuple[int, LayerConfig]


def config_mapping(model: nn.Module, config: AnyConfig) -> dict[str, LayerConfig]:
    """The config of each layer that is quantized, by name; a layer that stays float has none.

    Raises:
        OptionError: locals, white lists or whole configs that match nothing, and what they would have matched
        ModelError: no layer in the model that any of the configs is for
    """
    configs = list(config.configs) if isinstance(config, ComposedConfig) else [config]
    modules = {name: module for name, module in model.named_modules() if not _ADAPTERS.search(name)}
    classes = {type(module).__name__ for module in modules.values()}
    faults = [fault for one in configs for fault in _unmatched(one, modules, classes)]
    if faults:
        raise OptionError("; ".join(faults))
    if not any(one.takes(module) for one in configs for module in modules.values()):
        kinds = ", ".join(sorted(classes)[:8])
        raise ModelError(f"{type(model).__name__} has no float layer to quantize; its modules are {kinds}")
    found: dict[str, LayerConfig] = {}
    claimed: set[int] = set()
    for name, module in modules.items():
        claims = [(place, claim) for place, one in enumerate(configs) for claim in _claims(one, name, module, classes)]
        best = _best(claims)
        if best is None:
            continue
        place, chosen = best
        claimed.add(place)
        if chosen.takes(module) and not chosen.leaves(name, module) and chosen.method() is not None:
            found[name] = chosen
    lost = [repr(one) for place, one in enumerate(configs) if place not in claimed]
    if lost and len(configs) > 1:
        raise OptionError(
            f"{', '.join(lost)} gets no layer: the global config further left has them all; give this one a white_list"
        )
    return found


def method_mapping(model: nn.Module, config: AnyConfig) -> dict[str, Any]:
    """The frozen method of each layer that is quantized, by name; raises as `config_mapping`."""
    return {name: chosen.method() for name, chosen in config_mapping(model, config).items()}


def _best(claims: list[tuple[int, Claim]]) -> tuple[int, LayerConfig] | None:
    """Place and config of the claim that wins."""
    if not claims:
        return None
    level = max(level for _, (level, _) in claims)
    equals = [(place, config) for place, (at, config) in claims if at == level]
    return equals[0] if level == _GLOBAL else equals[-1]


def _claims(config: LayerConfig, name: str, module: nn.Module, classes: set[str]) -> Iterator[Claim]:
    """What ``config`` has for one module, weakest first, and nothing where none of it is for such a module."""
    claims: list[Claim] = [(_GLOBAL, config)] if config.white_list == "*" else []
    listed = [] if config.white_list == "*" else [(key, config) for key in config.white_list]
    pairs = [*listed, *config.locals]
    claims += [(_TYPE, own) for key, own in pairs if _is_class(key, classes) and _is_of(module, key)]
    claims += [(_NAME, own) for key, own in pairs if not _is_class(key, classes) and re.match(str(key), name)]
    claims = [(level, own) for level, own in claims if own.takes(module) or own.method() is None]
    if not claims or not any(own.takes(module) for _, own in [*claims, (_GLOBAL, config)]):
        return
    if _HEADS.match(name) and not _takes_head(config, claims[-1][1]):
        return
    yield claims[-1]


def _takes_head(config: LayerConfig, chosen: LayerConfig) -> bool:
    """Heads are quantized by those who ask for it, and by configs that have no such field."""
    return bool(getattr(config, "quant_lm_head", True) or getattr(chosen, "quant_lm_head", True))


def _is_class(key: Key, classes: set[str]) -> bool:
    return not isinstance(key, str) or key in classes


def _is_class_of_torch(key: Key) -> bool:
    return not isinstance(key, str) or isinstance(getattr(nn, key, None), type)


def _is_of(module: nn.Module, key: Key) -> bool:
    return type(module).__name__ == key if isinstance(key, str) else isinstance(module, key)


def _unmatched(config: LayerConfig, modules: dict[str, nn.Module], classes: set[str]) -> Iterator[str]:
    """Keys that match no module, or none that their method is for, and producers that are not there."""
    for field in ("absorb_layer_dict", "absorb_to_layer"):
        for producer, consumers in getattr(config, field, {}).items():
            for name in (producer, *consumers):
                if name not in modules:
                    yield f"{field}: no module {name!r}{nearest(name, modules)}"
    listed = [] if config.white_list == "*" else [(key, config) for key in config.white_list]
    for key, own in [*listed, *config.locals]:
        try:
            matched = [
                module
                for name, module in modules.items()
                if (_is_of(module, key) if _is_class(key, classes) else re.match(str(key), name))
            ]
        except re.error as wrong:
            yield f"set_local({key!r}, ...): not a regular expression: {wrong}"
            continue
        shown = key if isinstance(key, str) else key.__name__
        if not matched and own.method() is None and _is_class_of_torch(key):
            continue  # "no Conv1d is quantized" holds in a model that has none
        if not matched:
            yield (
                f"set_local({shown!r}, ...) matches no module of the model, by name or by class"
                f"{nearest(shown, [*classes, *modules])}"
            )
        elif own.method() is not None and not any(own.takes(module) for module in matched):
            kinds = ", ".join(sorted({type(module).__name__ for module in matched}))
            yield f"set_local({shown!r}, {own!r}) matches only what that has no method for: {kinds}"
