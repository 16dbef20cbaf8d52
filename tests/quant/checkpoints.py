"""Checkpoints that other packages wrote (see golden/make.py), and their tensors to change."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import torch

from adapterx.quant.tensor_files import read_tensor_files, write_tensor_files

GOLDEN = Path(__file__).parent / "golden"


def cases(file):
    return sorted(folder.name for folder in GOLDEN.iterdir() if (folder / file).is_file())


def expected(case):
    return json.loads((GOLDEN / case / "expected.json").read_text())


def assert_weights_are_the_packages(weights, case):
    """Bit for bit, in the dtype in which the package computes; factors on the inputs are not in it."""
    assert weights.keys() == expected(case).keys()
    for name, told in expected(case).items():
        weight = dataclasses.replace(weights[name], pre_scale=None)
        values = weight.dequantized().to(getattr(torch, told["dtype"])).float().contiguous() + 0.0
        assert list(values.shape) == told["shape"], name
        assert values.flatten()[:8].tolist() == told["head"], name
        assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == told["sha256"], name


def in_float(model):
    """``model`` in float32: transformers' own ``float`` refuses models that are quantized."""
    return torch.nn.Module.float(model)


def changed(case, folder, *, tensors=None, config=None, metadata=None):
    """A copy of a golden checkpoint in ``folder``, its tensors and quantization_config changed by two functions."""
    shutil.copytree(GOLDEN / case, folder)
    files = read_tensor_files(folder)
    held = {name: files.read(name) for name in files.tensors}
    told = dict(files.metadata)
    if tensors is not None:
        tensors(held)
    if metadata is not None:
        metadata(told)
    (folder / "model.safetensors").unlink()
    write_tensor_files(held, folder, metadata=told)
    if config is not None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        config(content["quantization_config"])
        path.write_text(json.dumps(content))
    return folder
