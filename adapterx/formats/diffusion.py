"""LoRA files of diffusion models, as kohya-ss sd-scripts, LyCORIS and diffusers name their tensors.

A tensor's name is a module and a key. kohya flattens the module (``lora_unet_mid_block_...``), diffusers keeps its dots
behind the name of the model in the pipeline (``unet.mid_block...``). The keys say of what kind an adapter is, so a file
needs no config beside it; where its scale stands is told in :func:`read`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from adapterx.adapter import LORA_A, LORA_B, MAGNITUDE, Array, LowRank, tensor_name
from adapterx.errors import FormatError, UnsupportedAdapter
from adapterx.faults import Faults
from adapterx.flattened import PIPELINE, is_flattened
from adapterx.formats.dtypes import BY_DTYPE, NAMES
from adapterx.formats.peft_config import PeftSettings, settings_of
from adapterx.formats.tensor_table import PREFIX, Nonfinite, TensorTable, name_fault, refuse_nonfinite
from adapterx.json_text import json_object
from adapterx.kinds import conv, dora, loha, lokr, lora
from adapterx.limits import Limits

# Where diffusers keeps the config of each model of the pipeline, as one JSON object: "unet.r", "unet.lora_alpha" ...
SETTINGS = "lora_adapter_metadata"

_A, _B = tensor_name("", LORA_A)[1:], tensor_name("", LORA_B)[1:]
_ALPHA, _MID, _SCALE = "alpha", "lora_mid.weight", "dora_scale"
# Keys that are spelled alike in PEFT's files and in ours, and those that are not.
_SHARED = {_A: _A, _B: _B, "lora_B.bias": "lora_B.bias", **dict.fromkeys(dora.KEYS, dora.KEYS[0])}
_OWN = {
    **{f"{stem}down.weight": _A for stem in ("lora_", "lora.", "lora_linear_layer.")},
    **{f"{stem}up.weight": _B for stem in ("lora_", "lora.", "lora_linear_layer.")},
    **{key: key for key in (_ALPHA, _MID, _SCALE, *loha.KEYS, *lokr.KEYS)},
}
_KEYS = sorted((_SHARED | _OWN).items(), key=lambda named: -len(named[0]))
# diffusers before 0.21 kept LoRA in processors of attention.
_PROCESSOR = re.compile(
    r"(?P<module>.+?)(?:\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<side>down|up)\.weight(?P<alpha>\.alpha)?"
)
_IN_TEXT = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
_IN_UNET = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
# "transformer." also begins the paths of language models; these modules only diffusion transformers have.
_TRANSFORMER = ("transformer.transformer_blocks.", "transformer.single_transformer_blocks.")
_ADVICE = "Nothing was loaded. Export the adapter again, or merge it with the tool that made it."
_LEADING_RANK = {_A, "hada_w1_b", "lokr_w1_b", "lokr_w2_b"}
_Modules = dict[str, dict[str, Array]]


def speaks(table: TensorTable) -> bool:
    """Whether the tensors of a safetensors file have names as kohya or diffusers give them.

    Raises:
        FormatError: some do and some have PEFT's prefix.
    """
    if table.layout == "rank_first":
        return False
    theirs = [name for name in table.arrays if name.startswith(PREFIX)]
    own = [name for name in table.arrays if not name.startswith(PREFIX) and _is_own(name)]
    if own and theirs:
        raise FormatError(f"{table.where}: names of two dialects, {own[0]} and PEFT's {theirs[0]}; one tool writes one")
    return bool(own) or (not theirs and _as_diffusers_writes(table))


def read(table: TensorTable, limits: Limits, *, nonfinite: Nonfinite = "refuse") -> tuple[str, dict[str, LowRank]]:
    """The dialect (``kohya`` or ``diffusers``) and the sites of a file.

    The scale of a module is ``alpha / r``. ``alpha`` stands in ``<module>.alpha``, or in the metadata
    ``lora_adapter_metadata``; without it the scale is 1. A flattened module is the name of its site: only a model can
    tell where its dots were.

    Args:
        table: what :func:`speaks` of
        limits: names, numbers and ranks are checked against them
        nonfinite: ``"allow"`` lets NaN and infinity pass, but not in alpha

    Raises:
        FormatError: names of two dialects.
        UnsupportedAdapter: half pairs, tensors that no kind knows, values that a kind cannot take: all in one message.
    """
    faults = Faults(table.where)
    modules = _modules(table, limits, faults)
    if not table.finite and nonfinite == "refuse":
        refuse_nonfinite(table.arrays, faults)
    flat = [module for module in modules if is_flattened(module)]
    dotted = [module for module in modules if not is_flattened(module)]
    if flat and dotted:
        raise FormatError(f"{table.where}: names of two dialects, {flat[0]} and {dotted[0]}; one tool writes one")
    settings = _settings(table, limits, faults)
    sites = {}
    for module, tensors in modules.items():
        try:
            sites[module] = _change(tensors, _scale(module, tensors, settings), limits)
        except ValueError as cause:
            faults.add(module, str(cause))
    faults.refuse("this adapter cannot be applied exactly", advice=_ADVICE, error=UnsupportedAdapter)
    return "kohya" if flat else "diffusers", sites


def _is_own(name: str) -> bool:
    return bool(_PROCESSOR.fullmatch(name)) or any(name.endswith(f".{key}") for key in _OWN)


def _as_diffusers_writes(table: TensorTable) -> bool:
    """Whether PEFT's keys stand behind the name of a model in a pipeline, and lie as PEFT's do."""
    if SETTINGS not in table.metadata:
        names = tuple(f"{model}." for model in PIPELINE if model != "transformer")
        if not any(name.startswith((*names, *_TRANSFORMER)) for name in table.arrays):
            return False
    pairs = [
        (a, table.arrays.get(f"{name.removesuffix(_A)}{_B}")) for name, a in table.arrays.items() if name.endswith(_A)
    ]
    return all(b is None or (a.ndim > 1 < b.ndim and len(a) == b.shape[1]) for a, b in pairs)


def _modules(table: TensorTable, limits: Limits, faults: Faults) -> _Modules:
    """Tensors by module and key; what is of neither becomes a fault."""
    found: _Modules = {}
    if len(table.arrays) > limits.tensors:
        faults.add("tensors", f"{len(table.arrays)} of them, at most {limits.tensors} are read")
        return found
    halves: dict[tuple[str, str], str] = {}
    for name, array in table.arrays.items():
        module, key = _place(name)
        cause = name_fault(name, limits)
        if not key:
            cause = cause or f"unknown kind of tensor; known keys are {', '.join(sorted(_SHARED | _OWN))}"
        elif key in found.get(module, {}):
            cause = cause or f"another name stands for {key} of {module}"
        elif array.dtype not in BY_DTYPE and key != _ALPHA:
            cause = cause or f"its element type is {array.dtype}, expected one of {NAMES}; cast it before"
        if cause:
            faults.add(name, cause)
        else:
            found.setdefault(module, {})[key] = array
            if key in (_A, _B):
                halves[module, key] = name
    for (module, key), name in halves.items():
        if (module, _B if key == _A else _A) not in halves:
            faults.add(name, f"its other half, {_other_half(name)}, is missing")
            del found[module]
    return found


def _other_half(name: str) -> str:
    """The name that the other matrix of a pair has in the same spelling."""
    pairs = (("down.weight", "up.weight"), (_A, _B))
    return next(
        name.removesuffix(one) + other for two in pairs for one, other in (two, two[::-1]) if name.endswith(one)
    )


def _place(name: str) -> tuple[str, str]:
    """Module and key of a tensor; no key where nothing is known of it."""
    if match := _PROCESSOR.fullmatch(name):
        which = (_IN_TEXT if name.startswith("text_encoder") else _IN_UNET)[match["which"]]
        key = _ALPHA if match["alpha"] else _A if match["side"] == "down" else _B
        return f"{match['module']}.{which}", key
    for ending, key in _KEYS:
        if name.endswith(f".{ending}"):
            return name[: -len(ending) - 1], key
    return "", ""


def _settings(table: TensorTable, limits: Limits, faults: Faults) -> dict[str, PeftSettings]:
    """What the metadata say, by the name of the model in the pipeline."""
    text = table.metadata.get(SETTINGS)
    if text is None:
        return {}
    where = f"{table.where} ({SETTINGS})"
    raw = json_object(text.encode("utf-8", "surrogatepass"), where=where, depth=limits.json_depth)
    found: dict[str, PeftSettings] = {}
    for model in PIPELINE:
        own = {key.removeprefix(f"{model}."): value for key, value in raw.items() if key.startswith(f"{model}.")}
        if own:
            found[model] = settings_of({"peft_type": "LORA"} | own, limits, where=where)
            for key, reason in found[model].unsupported:
                faults.add(f"{SETTINGS}: {model}.{key}", reason)
    return found


def _scale(module: str, tensors: Mapping[str, Array], settings: Mapping[str, PeftSettings]) -> Callable[[int], float]:
    model, _, path = module.partition(".")
    told = functools.partial(settings[model].scale, path) if model in settings else None
    if _ALPHA not in tensors:
        return told or (lambda _: 1.0)
    if tensors[_ALPHA].size != 1:
        raise ValueError(f"its alpha must be one number; its shape is {tensors[_ALPHA].shape}")
    alpha = float(tensors[_ALPHA].reshape(-1)[0])
    if not math.isfinite(alpha):
        raise ValueError(f"its alpha is {alpha}")
    if alpha == 0:
        raise ValueError("its alpha is 0, which kohya takes for the rank and others for nothing; write the rank")

    def scale(rank: int) -> float:
        # Of LoKr with two whole factors nothing tells a rank, and nothing is scaled.
        factor = alpha / rank if rank else 1.0
        if told is not None and not math.isclose(told(rank), factor, rel_tol=1e-3):
            raise ValueError(f"its alpha {alpha:g} and {SETTINGS} say different scales, {factor:g} and {told(rank):g}")
        return factor

    return scale


def _change(tensors: Mapping[str, Array], scale: Callable[[int], float], limits: Limits) -> LowRank:
    """Raises ValueError with the cause."""
    held = {key: array for key, array in tensors.items() if key not in (_ALPHA, _SCALE)}
    if not held:
        raise ValueError(f"there is nothing but {', '.join(tensors)}")
    if any(len(array) > limits.rank for key, array in held.items() if key in _LEADING_RANK and array.ndim):
        raise ValueError(f"its rank is over {limits.rank}")
    if len({array.dtype for array in held.values()}) > 1:
        raise ValueError(f"its tensors have several element types: { {k: str(v.dtype) for k, v in held.items()} }")
    is_loha, is_lokr = held.keys() & set(loha.KEYS), held.keys() & set(lokr.KEYS)
    change = loha.read(held, scale) if is_loha else lokr.read(held, scale) if is_lokr else _lora(held, scale)
    return _with_magnitude(change, tensors[_SCALE]) if _SCALE in tensors else change


def _lora(tensors: Mapping[str, Array], scale: Callable[[int], float]) -> LowRank:
    held = dict(tensors)
    if _MID in held:
        held[_A] = _joined(held.pop(_MID), held.get(_A))
    if any(key in held for key in dora.KEYS):
        return dora.read(held, scale)
    is_conv = _A in held and held[_A].ndim > 2
    return conv.read(held, scale) if is_conv else lora.read(held, scale)


def _joined(mid: Array, down: Array | None) -> Array:
    """LyCORIS' convolution in three steps, ``down`` 1 wide, ``mid`` with the kernel, as two: ``mid`` after ``down``."""
    if down is None or mid.ndim < 3 or down.ndim != mid.ndim or mid.shape[1] != len(down):
        shape = None if down is None else down.shape
        raise ValueError(f"expected lora_mid [r, r, *kernel] and lora_down [r, c_in, 1, ...]; got {mid.shape}, {shape}")
    joined = np.einsum("rs...,sc->rc...", lora.wide(mid), lora.wide(down.reshape(down.shape[:2])))
    return lora.cast(joined, mid.dtype, "lora_mid")


def _with_magnitude(change: LowRank, lengths: Array) -> LowRank:
    """``change`` with DoRA's lengths of the rows, as LyCORIS keeps them: ``[d_out, 1, ...]``."""
    if lengths.size != change.d_out or lengths.shape[0] != change.d_out:
        raise ValueError(
            f"its dora_scale is {lengths.shape}, expected [{change.d_out}, 1]: one length for each output; "
            "lengths of the inputs (wd_on_out=False) are not known here"
        )
    magnitude = lora.cast(lora.wide(lengths).reshape(1, -1), change.dtype, _SCALE)
    return LowRank(a=change.a, b=change.b, parts={**change.parts, MAGNITUDE: magnitude})
