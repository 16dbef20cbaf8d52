"""torch's two exporters, as users call them: model in, ``.onnx`` out."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from tests.zoo.models import Subject


class Held(nn.Module):
    """Holds a model under one attribute, takes its inputs in order, returns its first output."""

    def __init__(self, model: nn.Module, attribute: str, names: tuple[str, ...]) -> None:
        super().__init__()
        setattr(self, attribute, model)
        self.attribute, self.names = attribute, names

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        out = getattr(self, self.attribute)(**dict(zip(self.names, args, strict=True)))
        return out if isinstance(out, torch.Tensor) else out[0]


class Outer(nn.Module):
    """One more level."""

    def __init__(self, inner: nn.Module, attribute: str) -> None:
        super().__init__()
        setattr(self, attribute, inner)
        self.attribute = attribute

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return getattr(self, self.attribute)(*args)


def held(model: nn.Module, path: str, names: tuple[str, ...]) -> nn.Module:
    """``model`` under the dotted ``path`` of a wrapper; a path of "" is the model itself."""
    if not path:
        return model
    *outer, last = path.split(".")
    wrapped: nn.Module = Held(model, last, names)
    for attribute in reversed(outer):
        wrapped = Outer(wrapped, attribute)
    return wrapped


def torchscript(model: nn.Module, subject: Subject, path: Path, **options: Any) -> None:
    training = options.pop("training", False)
    mode = torch.onnx.TrainingMode.PRESERVE if training else torch.onnx.TrainingMode.EVAL
    model.train(training)
    with quiet(), causal_mask_without_vmap(), torch.no_grad():
        torch.onnx.export(
            model, tuple(subject.inputs.values()), str(path), dynamo=False, opset_version=17, training=mode,
            input_names=list(subject.inputs), output_names=list(subject.outputs), dynamic_axes=subject.dynamic,
            **options,
        )  # fmt: skip
    model.eval()


def dynamo(model: nn.Module, subject: Subject, path: Path, **options: Any) -> None:
    external, training = options.pop("external_data", False), options.pop("training", False)
    axes = {
        name: {axis: torch.export.Dim(label) for axis, label in subject.dynamic.get(name, {}).items()}
        for name in subject.inputs
    }
    in_order = tuple(axes.values())
    # torch.export wants the shapes of *args in a tuple of their own.
    starred = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())
    shapes: Any = (in_order,) if starred else in_order
    model.train(training)
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            model, tuple(subject.inputs.values()), dynamo=True, input_names=list(subject.inputs), verbose=False,
            output_names=list(subject.outputs), dynamic_shapes=shapes, **options,
        )  # fmt: skip
    assert program is not None
    program.save(str(path), external_data=external)
    model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters talk a lot, and tests turn warnings into noise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def _mask(batch_size: int, cache_position: torch.Tensor, kv_length: int, **options: Any) -> torch.Tensor:
    dtype = options.get("dtype", torch.float32)
    keys = torch.arange(kv_length)[None] + options.get("kv_offset", 0)
    allowed = keys <= cache_position[:, None]
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)[None, None].expand(batch_size, 1, -1, -1)


@contextlib.contextmanager
def causal_mask_without_vmap() -> Iterator[None]:
    """transformers builds its masks with vmap, which TorchScript cannot trace."""
    table = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    before = table["eager"]
    table["eager"] = _mask
    try:
        yield
    finally:
        table["eager"] = before


EXPORTERS: dict[str, Callable[..., None]] = {"torchscript": torchscript, "dynamo": dynamo}
