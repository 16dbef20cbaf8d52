"""export: a quantized torch model as an ONNX file, with its codes and scales as they are."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from adapterx.errors import MissingDependency, ModelError, OptionError
from adapterx.quant.lowered_dora import norms_known
from adapterx.quant.lowered_embedding import LoweredEmbedding, embeddings_lowered
from adapterx.quant.lowered_product import Format, Lowering
from adapterx.quant.lowering import LoweredLinear, lowered
from adapterx.quant.onnx_graph import finished
from adapterx.quant.onnx_signature import Signature, signature_of
from adapterx.quant.scheme import Scheme

OPSET = 21
_INLINE_LIMIT = 1_500_000_000
_EXTERNAL_FROM = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class ExportedLayer:
    """One quantized layer and what it became.

    Args:
        name: in the torch model
        weight: how it was written there
        became: ONNX operators
    """

    name: str
    weight: str
    became: str


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """What `export` wrote; prints as a table.

    Args:
        path: the model; weights of a large one lie beside it, in ``<path>.data``
        inputs: names
        outputs: names
        layers: the quantized ones
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[ExportedLayer, ...]

    def table(self) -> Table:
        """The layers as a rich table."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("layer", "weight", "in ONNX"):
            table.add_column(column, no_wrap=True)
        for layer in self.layers:
            table.add_row(layer.name, layer.weight, layer.became)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=220, markup=False, emoji=False, highlight=False).print(self.table())
        return "\n".join([*(line.rstrip() for line in text.getvalue().splitlines()), str(self.path)])


def export(  # noqa: PLR0913 - options of one verb, all by name
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    format: Format = "matmulnbits",
    exact: bool = False,
    accuracy_level: int = 4,
    embeddings: bool | Scheme = False,
    kv_cache: bool = False,
    dynamic: bool | Mapping[str, Mapping[int, str]] = True,
    opset: int = OPSET,
) -> Exported:
    """Write ``model`` as ONNX; its `QuantLinear` layers become ONNX Runtime's quantized operators, without loss.

    PEFT's layers on top stay float, under their own names, so that `adapterx.find_sites` finds them. The model itself
    is not changed; ``accuracy_level=4`` rounds inputs to int8 in the kernel; ``exact=True`` gives torch's results.

    Args:
        model: in evaluation mode while it is exported
        path: ``model.onnx``; its folder must exist
        example_inputs: one batch, as a tensor, a tuple, or a dict by name; not needed for text models of transformers.
            Give it at least 2 rows: torch takes a size of 1 for a constant
        format: "matmulnbits", or "qdq" for DequantizeLinear and MatMul
        exact: products in float32, as torch's
        accuracy_level: of MatMulNBits, where not ``exact``: 0 to 4
        embeddings: quantize ``nn.Embedding``, too (``GatherBlockQuantized``): in 8 bits by block of 32, or in the
            `Scheme` given
        kv_cache: inputs ``past_key_values.N.key``, ``.value``, outputs ``present.N.key``, ``.value``
        dynamic: leave batch and sequence free; else free dimensions by input, ``{"pixels": {0: "batch"}}``, or
            False
        opset: of the standard operators, 21 at least

    Raises:
        ModelError: torch cannot export the model, or ONNX Runtime cannot open what came of it
        FeedError: ``example_inputs`` is needed, or holds no tensors
        OptionError: an option's value that does not exist
        MissingDependency: onnxscript or onnxruntime is not installed
        FileNotFoundError: the folder of ``path`` does not exist
    """
    lowering = Lowering(format=format, exact=exact, accuracy_level=accuracy_level)
    if opset < OPSET:
        raise OptionError(f"opset={opset} has no DequantizeLinear by block; {OPSET} has")
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no folder; make it first")
    _needed()
    training = model.training
    model.eval()
    try:
        signature = signature_of(model, example_inputs=example_inputs, kv_cache=kv_cache, dynamic=dynamic)
        with norms_known(model), lowered(model, lowering) as layers, embeddings_lowered(model, embeddings) as tables:
            traced = _traced(signature, opset)
            made: dict[str, LoweredLinear | LoweredEmbedding] = {**layers, **tables}
            graph = finished(traced, signature, {name: layer.product for name, layer in made.items()})
    finally:
        model.train(training)
    _save(graph, target)
    rows = tuple(ExportedLayer(name, layer.was, layer.product.became) for name, layer in made.items())
    return Exported(target, tuple(signature.inputs), tuple(signature.outputs), rows)


def _needed() -> None:
    for package, extra in (("onnxscript", "quant"), ("onnxruntime", "cpu")):
        try:
            __import__(package)
        except ImportError:
            raise MissingDependency(f"export needs {package}: pip install 'adapterx[{extra}]'") from None


def _traced(signature: Signature, opset: int) -> Any:
    """The model as torch gives it, an ``onnx_ir.Model``, not optimized."""
    free = torch.export.Dim.AUTO
    shapes = tuple(dict.fromkeys(signature.axes.get(name, {}), free) for name in signature.inputs)
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                signature.module,
                tuple(signature.inputs.values()),
                dynamo=True,
                optimize=False,
                verbose=False,
                opset_version=opset,
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                dynamic_shapes=(shapes,) if any(shapes) else None,
            )
        except Exception as error:  # torch raises anything here, from RuntimeError to KeyError
            raise ModelError(f"torch cannot export this model: {str(error).strip()[-2000:]}") from error
    assert program is not None, "dynamo=True gives a program"
    return program.model


def _save(model: Any, target: Path) -> None:
    """Into a sibling folder first; moved over ``target`` when ONNX's checker and ONNX Runtime have taken it."""
    import onnx  # noqa: PLC0415 - half a second
    import onnx_ir as ir  # noqa: PLC0415
    import onnxruntime  # noqa: PLC0415

    stage = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=target.parent))
    file = stage / target.name
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    try:
        data = f"{target.name}.data" if size > _INLINE_LIMIT else None
        ir.save(model, file, external_data=data, size_threshold_bytes=_EXTERNAL_FROM)
        try:
            onnx.checker.check_model(str(file))
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # both have exceptions of their own, in several modules
            raise ModelError(f"the exported model does not open: {error}") from error
        for written in sorted(stage.iterdir(), key=lambda each: each.suffix == ".onnx"):
            written.replace(target.parent / written.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks of its own progress, and of operators that it does not know."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)
