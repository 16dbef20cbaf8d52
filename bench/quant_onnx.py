"""Perplexity of quantized models in torch, and of their exports on ONNX Runtime: exact, and as fast as they go.

    python bench/quant_onnx.py

The model, data and sizes of bench/quant.py. "fast" is the default of `adapterx.quant.export`, where ONNX Runtime's
kernels round the inputs of MatMulNBits to eight bits.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from measure import machine, options
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from adapterx.quant import (
    AWQConfig,
    DynamicQuantConfig,
    FP8Config,
    GPTQConfig,
    HQQConfig,
    MXQuantConfig,
    RTNConfig,
    SmoothQuantConfig,
    export,
    quantize,
)
from tests.quant.language import language, perplexity, text

GROUP = {"group_size": 32, "use_sym": False}
CONFIGS: Mapping[str, Any] = {
    "RTN, 4 bits": RTNConfig(bits=4, **GROUP),
    "AWQ, 4 bits": AWQConfig(bits=4, **GROUP),
    "GPTQ, 3 bits, act_order": GPTQConfig(bits=3, act_order=True, **GROUP),
    "HQQ, 4 bits": HQQConfig(bits=4, group_size=32, quant_zero=False),
    "RTN, 8 bits": RTNConfig(bits=8, **GROUP),
    "RTN, 2 bits": RTNConfig(bits=2, **GROUP),
    "nf4": RTNConfig(dtype="nf4", group_size=32),
    "int8, static, SmoothQuant": SmoothQuantConfig(),
    "int8, dynamic": DynamicQuantConfig(w_granularity="per_channel"),
    "MXFP8, weights and inputs": MXQuantConfig(w_dtype="fp8_e4m3", act_dtype="fp8_e4m3", out_dtype="float32"),
    "FP8 e4m3, weights and inputs": FP8Config(hp_dtype="fp32"),
}


def on_onnxruntime(path: Path, tokens: torch.Tensor) -> float:
    """Perplexity of the file, as `tests.quant.language.perplexity` counts it."""
    session = ort.InferenceSession(path)
    losses = []
    for rows in tokens.split(16):
        feeds = {"input_ids": rows.numpy(), "attention_mask": np.ones(rows.shape, np.int64)}
        logits = session.run(None, {each.name: feeds[each.name] for each in session.get_inputs()})[0]
        flat = torch.from_numpy(logits)[:, :-1].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(flat, rows[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).double().mean())


def main() -> None:
    asked = options(__doc__).parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    steps, tokens = (20, text().evaluation(8, 64)) if asked.quick else (800, text().evaluation())
    shown = list(text().calibration(8 if asked.quick else 64).split(8))
    rows: dict[str, list[float]] = {}
    for name, config in list(CONFIGS.items())[: 2 if asked.quick else None]:
        model = quantize(language(steps), config, run_fn=lambda given: [given(input_ids=each) for each in shown])
        rows[name] = [perplexity(model, tokens)]
        with tempfile.TemporaryDirectory() as folder:
            for exact in (True, False):
                export(model, Path(folder) / "model.onnx", exact=exact)
                rows[name].append(on_onnxruntime(Path(folder) / "model.onnx", tokens))
    if asked.json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return
    table = Table(title="perplexity", title_justify="left", box=None, header_style="bold", pad_edge=False)
    for column in ("way", "torch", "exact", "%", "fast", "%"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, (in_torch, exact, fast) in rows.items():
        shares = [f"{100 * (value / in_torch - 1):+.3f}" for value in (exact, fast)]
        table.add_row(name, f"{in_torch:.3f}", f"{exact:.3f}", shares[0], f"{fast:.3f}", shares[1])
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
