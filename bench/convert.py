"""What it costs to convert a PEFT adapter of 200 MB, against tools that read it and write it as it is.

The peers check and change nothing: the plain copy moves bytes, the others parse a header. adapterx checks every value,
folds the scale in, turns a matrix of each site and flushes the file to the disk.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from measure import Result, Way, clock_option, interleaved, megabytes, options, report, rows
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import load_file, save_file

import adapterx as ax
from adapterx.adapter import LORA_A, LORA_B, tensor_name
from adapterx.atomic import atomic_write
from adapterx.formats import safetensors
from adapterx.manifest import KEY, Manifest
from adapterx.site import AdapterSite, SiteTable

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
PEER = "safetensors, load_file + save_file"
RANK = 64


def modules(layers: int, width: int) -> Iterator[tuple[str, int, int]]:
    """Name, ``d_in`` and ``d_out`` of the linear layers of Llama 3 8B, ``width`` 4096 wide."""
    kv, ff = width // 4, width * 7 // 2
    shapes = {"q": (width, width), "k": (width, kv), "v": (width, kv), "o": (width, width)}
    inner = {"gate": (width, ff), "up": (width, ff), "down": (ff, width)}
    for layer in range(layers):
        for part, table in (("self_attn", shapes), ("mlp", inner)):
            for name, (d_in, d_out) in table.items():
                yield f"model.layers.{layer}.{part}.{name}_proj", d_in, d_out


def peft_folder(folder: Path, sites: list[tuple[str, int, int]]) -> Path:
    """A PEFT adapter in bf16 with alpha 16."""
    random = np.random.default_rng(0)
    tensors = {}
    for name, d_in, d_out in sites:
        for side, shape in ((LORA_A, (RANK, d_in)), (LORA_B, (d_out, RANK))):
            values = random.standard_normal(shape, np.float32).astype(BFLOAT16)
            tensors[f"base_model.model.{tensor_name(name, side)}"] = values
    folder.mkdir()
    atomic_write(folder / "adapter_model.safetensors", safetensors.pieces(tensors.items(), {"format": "pt"}))
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "bias": "none", "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def target(path: Path, sites: list[tuple[str, int, int]]) -> Path:
    """A model that says that it has these sites, which is all that fitting plain LoRA asks of it."""
    told = SiteTable(
        AdapterSite(name, "", "lora", "MatMul", d_in, d_out, RANK, 1.0, "bfloat16", "initializer", "")
        for name, d_in, d_out in sites
    )
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[1] x) => (float[1] y) { y = Abs(x) }'
    )
    model.metadata_props.add(key=KEY, value=Manifest(told, "input", True, True, "").dumps())
    onnx.save(model, path)
    return path


def ways(folder: Path, sites: list[tuple[str, int, int]]) -> dict[str, Way]:
    """Every way to bring the adapter into another file."""
    peft, model = peft_folder(folder / "peft", sites), target(folder / "model.onnx", sites)
    weights = peft / "adapter_model.safetensors"
    return {
        "shutil.copyfile": lambda: shutil.copyfile(weights, folder / "copy"),
        PEER: lambda: save_file(load_file(weights), folder / "a.st"),
        "peft, load_peft_weights + save_file": lambda: save_file(load_peft_weights(str(peft), "cpu"), folder / "b.st"),
        "adapterx, to .safetensors": lambda: ax.convert_adapter(peft, None, folder / "c.safetensors"),
        "adapterx, to .onnx_adapter": lambda: ax.convert_adapter(peft, None, folder / "d.onnx_adapter"),
        "adapterx, to .onnx_adapter, fitted": lambda: ax.convert_adapter(peft, model, folder / "e.onnx_adapter"),
        "adapterx, to a PEFT folder": lambda: ax.convert_adapter(peft, None, folder / "f"),
        "adapterx, to int8": lambda: ax.convert_adapter(peft, None, folder / "g.safetensors", quantize="int8"),
    }


def main() -> None:
    parser = options(__doc__)
    clock_option(parser)
    parser.add_argument("--rounds", type=int, help="turns of each way (7, or 2 with --quick)")
    chosen = parser.parse_args()
    sites = list(modules(1, 64) if chosen.quick else modules(19, 4096))
    with tempfile.TemporaryDirectory() as name:
        all_ways = ways(Path(name), sites)
        times = interleaved(all_ways, rounds=chosen.rounds or (2 if chosen.quick else 7), clock=chosen.clock)
        nbytes = (Path(name) / "peft" / "adapter_model.safetensors").stat().st_size
        title = f"a PEFT adapter of {megabytes(nbytes)}: bf16, rank {RANK}, {len(sites)} sites"
        report([Result(title, PEER, rows(times))], as_json=chosen.json)


if __name__ == "__main__":
    main()
