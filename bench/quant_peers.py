"""Other packages that quantize, as functions of a model: whichever is installed takes part in bench/quant.py.

    pip install neural-compressor-pt torchao auto-round hqq bitsandbytes

Each function gives a model whose perplexity can be measured, with asymmetric groups of 32 and the head in float, or
raises ImportError. The settings are those with which each works on a CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

Rows = list[torch.Tensor]
Peer = Callable[[nn.Module, int, Rows], nn.Module]


def _show(model: nn.Module, rows: Rows) -> None:
    with torch.no_grad():
        for each in rows:
            # Neural Compressor stops the model after its first block, by an error that it expects to be ignored.
            with contextlib.suppress(ValueError):
                model(input_ids=each)


def _reread(model: nn.Module) -> nn.Module:
    """The model, as read from a folder: Neural Compressor's GPTQ asks for its path."""
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _neural_compressor(config: str, **options: Any) -> Peer:
    def quantized(model: nn.Module, bits: int, rows: Rows) -> nn.Module:
        torch_api = importlib.import_module("neural_compressor.torch.quantization")
        if config == "GPTQConfig":
            model = _reread(model)
        made = getattr(torch_api, config)(bits=bits, group_size=32, **options)
        prepared = torch_api.prepare(model, made, example_inputs=rows[0])
        if config in ("GPTQConfig", "AWQConfig"):
            _show(prepared, rows)
        return torch_api.convert(prepared)

    return quantized


def _torchao(model: nn.Module, bits: int, _: Rows) -> nn.Module:
    api = importlib.import_module("torchao.quantization")
    granularity = importlib.import_module("torchao.quantization.granularity")
    config = api.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=granularity.PerGroup(32),
        mapping_type=api.MappingType.ASYMMETRIC,
    )
    api.quantize_(model.model, config)
    return model


def _hqq(model: nn.Module, bits: int, _: Rows) -> nn.Module:
    api = importlib.import_module("hqq.core.quantize")
    config = api.BaseQuantizeConfig(nbits=bits, group_size=32, axis=1)
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, last = name.rpartition(".")
            made = api.HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
            setattr(model.model.get_submodule(parent), last, made)
    return model


def _auto_round(model: nn.Module, bits: int, rows: Rows) -> nn.Module:
    api = importlib.import_module("auto_round")
    dataset = [{"input_ids": row[None]} for each in rows for row in each]
    tuned = api.AutoRound(
        model,
        tokenizer=types.SimpleNamespace(),  # asked for, and not used: the data are tokens
        bits=bits,
        group_size=32,
        sym=False,
        iters=200,
        seqlen=rows[0].shape[1],
        nsamples=len(dataset),
        dataset=dataset,
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
        scale_dtype="fp32",
    )
    return tuned.quantize()[0]


def _bitsandbytes(model: nn.Module, *_: object) -> nn.Module:
    api = importlib.import_module("bitsandbytes.functional")
    for layer in (part for part in model.model.modules() if isinstance(part, nn.Linear)):
        codes, state = api.quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4")
        layer.weight.data = api.dequantize_4bit(codes, state).to(layer.weight.dtype)
    return model


_INC = "neural-compressor-pt"
PEERS: dict[str, tuple[str, Peer]] = {
    "Neural Compressor, RTN": (_INC, _neural_compressor("RTNConfig", use_sym=False, use_layer_wise=False)),
    "Neural Compressor, HQQ": (_INC, _neural_compressor("HQQConfig")),
    "Neural Compressor, GPTQ": (_INC, _neural_compressor("GPTQConfig", use_sym=False)),
    "Neural Compressor, AWQ": (_INC, _neural_compressor("AWQConfig", use_sym=False)),
    "torchao, affine": ("torchao", _torchao),
    "hqq": ("hqq", _hqq),
    "auto-round, 200 steps": ("auto-round", _auto_round),
}
NF4_PEERS: dict[str, tuple[str, Peer]] = {"bitsandbytes, nf4": ("bitsandbytes", _bitsandbytes)}


def missing(package: str) -> str:
    """Why ``package`` takes no part, or ""."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it nobody prints, logs or warns."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
