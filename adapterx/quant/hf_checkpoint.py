"""A Hugging Face checkpoint quantized by a method, and written as ONNX: what `adapterx quantize FOLDER` does."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from adapterx.errors import FormatError, MissingDependency, OptionError, nearest
from adapterx.quant.configs import (
    AutoRoundConfig,
    AWQConfig,
    DynamicQuantConfig,
    GPTQConfig,
    HQQConfig,
    INT8StaticQuantConfig,
    LayerConfig,
    RTNConfig,
    SmoothQuantConfig,
    TEQConfig,
)
from adapterx.quant.linear import is_linear
from adapterx.quant.onnx_export import Exported, export
from adapterx.quant.verbs import quantize

_CONFIGS: Final[Mapping[str, type[LayerConfig]]] = {
    "rtn": RTNConfig,
    "nf4": RTNConfig,
    "fp4": RTNConfig,
    "hqq": HQQConfig,
    "gptq": GPTQConfig,
    "awq": AWQConfig,
    "teq": TEQConfig,
    "autoround": AutoRoundConfig,
    "dynamic": DynamicQuantConfig,
    "static": INT8StaticQuantConfig,
    "smoothquant": SmoothQuantConfig,
}
_NEEDS_DATA = frozenset({"gptq", "awq", "teq", "autoround", "static", "smoothquant"})
# Rows of one calibration batch, and tokens of a row of text.
_ROWS, _TOKENS = 8, 128
# What leaves a layer float, where one word does not.
_FLOAT = {"w_dtype": "fp32", "act_dtype": "fp32"}
_HEAD = re.compile(r"lm_head|output_layer|embed_out")
_FIELDS = {"bits": "bits", "group_size": "group_size", "symmetric": "use_sym"}


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """How a checkpoint is quantized and written; ``None`` is the method's default.

    Args:
        method: ``rtn``, ``gptq``, ``awq``, ...
        bits: of a weight
        group_size: weights that share a scale; -1 is a whole row
        symmetric: zero in the middle
        format: ``matmulnbits`` or ``qdq``
        exact: multiply in float
        layers: name, or end of a name -> its bits, ``None`` for float
        head: quantize the layer that makes the logits, too
        embeddings: quantize embeddings, too
    """

    method: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    format: str | None = None
    exact: bool = False
    layers: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    head: bool = False
    embeddings: bool = False


def export_checkpoint(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    wanted: Wanted,
    *,
    batches: Sequence[Mapping[str, np.ndarray]] = (),
    texts: Sequence[str] = (),
) -> Exported:
    """Load the checkpoint in ``folder`` in float32, quantize it as ``wanted``, and write it as ONNX to ``output``.

    Nothing is downloaded, and no code of the checkpoint is run.

    Args:
        folder: as ``save_pretrained`` writes it
        output: the ONNX file; its folder is made
        wanted: method and options
        batches: calibration inputs by name
        texts: calibration texts, for the tokenizer in ``folder``

    Raises:
        OptionError: no such method, an option that it does not have, or calibration data that it lacks
        FormatError: ``folder`` is no checkpoint that transformers reads
        MissingDependency: transformers, or what `export` needs, is not installed
        ModelError: as `quantize` and `export`
    """
    config = _config(wanted)
    if wanted.method in _NEEDS_DATA and not (batches or texts):
        raise OptionError(f"method {wanted.method!r} needs calibration data: a text, or inputs by name in an .npz")
    model = _loaded(Path(folder))
    _set_layers(config, wanted, model)
    feeds = [_tensors(one) for one in batches] + _tokens(Path(folder), texts)

    def calibrate(shown: nn.Module) -> None:
        for one in feeds:
            shown(**one)

    quantize(model, config, run_fn=calibrate if wanted.method in _NEEDS_DATA else None)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    form: Any = wanted.format or "matmulnbits"
    return export(model, output, format=form, exact=wanted.exact, embeddings=wanted.embeddings)


def _config(wanted: Wanted) -> LayerConfig:
    config = _CONFIGS.get(wanted.method)
    if config is None:
        raise OptionError(
            f"no method {wanted.method!r}{nearest(wanted.method, _CONFIGS)}; there are {', '.join(_CONFIGS)}"
        )
    given = {field: getattr(wanted, name) for name, field in _FIELDS.items() if getattr(wanted, name) is not None}
    if wanted.method in {"nf4", "fp4"}:
        given["dtype"] = wanted.method
    if wanted.head and "quant_lm_head" in config.fields:
        given["quant_lm_head"] = True
    return _made(config, wanted.method, given)


def _set_layers(config: LayerConfig, wanted: Wanted, model: nn.Module) -> None:
    """The exceptions; a head is one where the config has no word for it."""
    kind = type(config)
    names = [name for name, module in model.named_modules() if is_linear(module)]
    kept = {"dtype": "fp32"} if "dtype" in kind.fields else _FLOAT
    heads = [name for name in names if _HEAD.fullmatch(name.rpartition(".")[2])]
    layers: dict[str, int | None] = {} if wanted.head else dict.fromkeys(heads)
    faults = []
    for name, bits in wanted.layers.items():
        meant = [one for one in names if one == name or one.endswith(f".{name}")]
        faults += [] if meant else [f"{name!r}{nearest(name, {one.rpartition('.')[2] for one in names})}"]
        layers |= dict.fromkeys(meant, bits)
    if faults:
        raise OptionError(f"no layer of {type(model).__name__} is meant by {', '.join(faults)}")
    given = {field: getattr(config, field) for field in ("group_size", "use_sym") if field in kind.fields}
    for name, bits in layers.items():
        other = _made(kind, wanted.method, kept if bits is None else {**given, "bits": bits})
        config.set_local(f"{re.escape(name)}$", other)


def _made(config: type[LayerConfig], method: str, given: Mapping[str, Any]) -> LayerConfig:
    spelled = {field: name for name, field in _FIELDS.items()} | {"quant_lm_head": "head"}
    strange = [spelled.get(field, field) for field in given if field not in config.fields]
    if strange:
        raise OptionError(f"method {method!r} has no option {strange[0]}")
    return config(**given)


def _loaded(folder: Path) -> nn.Module:
    try:
        import transformers  # noqa: PLC0415 - seconds, and an extra
    except ImportError as error:
        raise MissingDependency("a checkpoint is read with transformers: pip install 'adapterx[train]'") from error
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint, or an ONNX file")
    try:
        known = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        name = next(iter(known.architectures or ()), "")
        kind = getattr(transformers, name, transformers.AutoModelForCausalLM)
        return kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise FormatError(f"{folder} cannot be read by transformers: {str(error).strip()[:500]}") from error


def _tensors(feeds: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feeds.items()}


def _tokens(folder: Path, texts: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """Batches of whole rows of tokens; what is left of a text over a row is dropped, but for a short text."""
    if not texts:
        return []
    import transformers  # noqa: PLC0415 - `_loaded` had it

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(  # type: ignore[no-untyped-call]
            folder, local_files_only=True
        )
    except Exception as error:  # transformers raises what its loaders happen to meet
        raise FormatError(f"{folder} has no tokenizer for a calibration text; give token ids in an .npz") from error
    found = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
        if not len(ids):
            raise OptionError("a calibration text is empty")
        width = min(_TOKENS, len(ids))
        rows = ids[: len(ids) // width * width].reshape(-1, width)
        found += [{"input_ids": part} for part in torch.split(rows, _ROWS)]
    return found
