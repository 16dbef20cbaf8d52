"""External data of a model that ONNX Runtime gets as bytes: where it really lies, below one folder."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from adapterx.external_data import check_external_data, external_protos, external_tensors


def relocate(model: onnx.ModelProto, folder: Path, *, model_file: Path | None) -> Path:
    """Point external tensors at where their files really are, in place, and return the folder that they are below.

    A session from bytes knows no model file, so ONNX Runtime would take Hugging Face's links for a way out.

    Args:
        model: a graph proto, which is changed
        folder: where its locations lie
        model_file: the model's path as the user gave it, where there was one

    Raises:
        ModelError: data that may not be read.
    """
    check_external_data(model, folder, model_file=model_file)
    files = {tensor.location: (folder / tensor.location).resolve() for tensor in external_tensors(model)}
    root = folder.resolve()
    if not all(file.is_relative_to(root) for file in files.values()):
        root = Path(os.path.commonpath([file.parent for file in files.values()]))
    for tensor in external_protos(model):
        for field in tensor.external_data:
            if field.key == "location":
                field.value = files[field.value].relative_to(root).as_posix()
    return root
