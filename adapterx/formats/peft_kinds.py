"""Tensors of PEFT that are more than pairs of matrices: grouped by module, each read by its kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from adapterx.adapter import Array, LowRank
from adapterx.errors import UnsupportedAdapter
from adapterx.faults import Faults
from adapterx.formats.dtypes import BY_DTYPE, NAMES
from adapterx.formats.peft_config import PeftSettings
from adapterx.formats.tensor_table import PREFIX, Nonfinite, TensorTable, name_fault, refuse_nonfinite
from adapterx.kinds import conv, dora, embedding, ia3, loha, lokr, lora, prompt, saved, vera
from adapterx.limits import Limits

_ROOT = "base_model."
_ADAPTED = {
    "LORA": (*lora.KEYS[:3], *embedding.KEYS, *dora.KEYS),
    "ADALORA": lora.KEYS,
    "LOHA": loha.KEYS,
    "LOKR": lokr.KEYS,
    "VERA": vera.KEYS,
    "IA3": ia3.KEYS,
}
_EVERY = sorted({key for keys in _ADAPTED.values() for key in keys}, key=len, reverse=True)

_Modules = dict[str, dict[str, Array]]


def changes(
    table: TensorTable, settings: PeftSettings, limits: Limits, *, nonfinite: Nonfinite = "refuse"
) -> dict[str, LowRank]:
    """The sites of a PEFT adapter of any kind.

    Args:
        table: its tensors by the names in the file
        settings: what its config says
        limits: names, numbers and ranks are checked against them
        nonfinite: ``"allow"`` lets NaN and infinity pass

    Raises:
        UnsupportedAdapter: tensors that the config does not speak of, or that no kind knows; values that a kind cannot
            take: all of them in one message.
    """
    faults = Faults(table.where)
    if not table.arrays:
        faults.add("tensors", "there are none")
    for name, array in table.arrays.items():
        if cause := name_fault(name, limits):
            faults.add(name, cause)
        elif array.dtype not in BY_DTYPE:
            faults.add(name, f"its element type is {array.dtype}, expected one of {NAMES}; cast it before")
    if not table.finite and nonfinite == "refuse":
        refuse_nonfinite(table.arrays, faults)
    shared = {key: table.arrays[_ROOT + key] for key in vera.SHARED if _ROOT + key in table.arrays}
    sites = {}
    for module, tensors in _modules(table.arrays, settings, faults).items():
        try:
            sites[module] = _read(module, tensors, settings, shared)
        except ValueError as cause:
            faults.add(module, str(cause))
            continue
        if max((len(t) for key, t in tensors.items() if key in _LEADING_RANK), default=0) > limits.rank:
            faults.add(module, f"its rank is over {limits.rank}")
    faults.refuse(
        "this adapter cannot be applied exactly",
        advice="Nothing was loaded. Export the adapter again, or merge it with PEFT.",
        error=UnsupportedAdapter,
    )
    return sites


_LEADING_RANK = {"lora_A.weight", "lora_A", "lora_embedding_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "vera_lambda_d"}


def _modules(arrays: Mapping[str, Array], settings: PeftSettings, faults: Faults) -> _Modules:
    """Tensors by module and by what they are to it; whatever the config does not speak of becomes a fault."""
    found: _Modules = {}
    for name, array in arrays.items():
        if name.removeprefix(_ROOT) in vera.SHARED and settings.kind == "VERA":
            continue
        module, key = _place(name, settings)
        cause = "" if key else _stranger(name)
        if key and key in found.setdefault(module, {}):
            cause = "another name stands for the same tensor"
        if cause:
            faults.add(name, cause)
        else:
            found[module][key] = array
    return {module: tensors for module, tensors in found.items() if tensors}


def _place(name: str, settings: PeftSettings) -> tuple[str, str]:
    """Module and key of a tensor; no key where the config does not expect it."""
    if name in prompt.KEYS and settings.kind.endswith("_TUNING"):
        return prompt.SITE, name
    path = name.removeprefix(PREFIX)
    for key in _ADAPTED.get(settings.kind, ()):
        if path.endswith(f".{key}") and _is_expected(key, settings):
            return path[: -len(key) - 1], key
    for key in sorted(saved.KEYS, key=len, reverse=True):
        module = path.removesuffix(f".{key}")
        if module != path and not any(f".{other}" in path for other in _EVERY):
            trained = _is_saved(module, settings) or (settings.biases and key.endswith("bias"))
            return (module, key) if trained else ("", "")
    return "", ""


def _is_expected(key: str, settings: PeftSettings) -> bool:
    if key in dora.KEYS:
        return settings.dora
    return key != "lora_B.bias" or settings.lora_bias


def _is_saved(module: str, settings: PeftSettings) -> bool:
    """Whether ``modules_to_save`` names the module, or something that it is in."""
    return any(f".{name}." in f".{module}." for name in settings.saved)


def _stranger(name: str) -> str:
    for kind, keys in _ADAPTED.items():
        if any(name.endswith(f".{key}") for key in keys):
            switched = "use_dora" if name.endswith(dora.KEYS) else "lora_bias" if name.endswith("bias") else "peft_type"
            return f"a tensor of {kind} whose {switched} the config does not speak of"
    return "a whole weight that replaces one of the base, and modules_to_save does not name it"


def _read(module: str, tensors: Mapping[str, Array], settings: PeftSettings, shared: Mapping[str, Array]) -> LowRank:
    if len({array.dtype for array in tensors.values()}) > 1:
        raise ValueError(f"its tensors have several element types: { {k: str(v.dtype) for k, v in tensors.items()} }")
    adapted = {key: array for key, array in tensors.items() if key not in saved.KEYS}
    trained = {key: array for key, array in tensors.items() if key in saved.KEYS}
    parts = [change for change in (_adapted(module, adapted, settings, shared), _trained(trained)) if change]
    first = parts[0]
    if len(parts) == 1:
        return first
    return LowRank(a=first.a, b=first.b, parts={**first.parts, **parts[1].parts})


def _trained(tensors: Mapping[str, Array]) -> LowRank | None:
    return saved.read(tensors) if tensors else None


def _adapted(
    module: str, tensors: Mapping[str, Array], settings: PeftSettings, shared: Mapping[str, Array]
) -> LowRank | None:
    if not tensors:
        return None
    scale = functools.partial(settings.scale, module)
    feedforward = any(f".{module}".endswith(f".{name}") for name in settings.feedforward)
    read: dict[str, Callable[[], LowRank]] = {
        "LOHA": lambda: loha.read(tensors, scale),
        "LOKR": lambda: lokr.read(tensors, scale),
        "VERA": lambda: vera.read(tensors, shared),
        "IA3": lambda: ia3.read(tensors, feedforward=feedforward),
        "LORA": lambda: _lora(tensors, settings, scale),
        "ADALORA": lambda: lora.read(tensors, scale),
    }
    return read.get(settings.kind, lambda: prompt.read(tensors))()


def _lora(tensors: Mapping[str, Array], settings: PeftSettings, scale: lora.Scale) -> LowRank:
    if any(key in tensors for key in embedding.KEYS):
        return embedding.read(tensors, scale)
    if settings.dora and not any(key in tensors for key in dora.KEYS):
        raise ValueError("use_dora is set, but it has no lora_magnitude_vector")
    is_conv = "lora_A.weight" in tensors and tensors["lora_A.weight"].ndim > 2
    if settings.dora:
        return dora.read(tensors, scale)
    return conv.read(tensors, scale) if is_conv else lora.read(tensors, scale)
