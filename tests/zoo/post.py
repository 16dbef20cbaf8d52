"""What people do to an exported file: each step rewrites ``path`` in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime as ort


def strip_metadata(path: Path) -> None:
    """Every metadata_props gone, as saving through many tools does."""
    model = onnx.load(path)
    del model.metadata_props[:]
    graph = model.graph
    for thing in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del thing.metadata_props[:]
    onnx.save(model, path)


def _ort_offline(path: Path, level: ort.GraphOptimizationLevel) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def ort_basic(path: Path) -> None:
    _ort_offline(path, ort.GraphOptimizationLevel.ORT_ENABLE_BASIC)


def ort_extended(path: Path) -> None:
    _ort_offline(path, ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED)


def onnxscript_optimize(path: Path) -> None:
    import onnxscript.optimizer

    onnx.save(onnxscript.optimizer.optimize(onnx.load(path)), path)


def ort_transformers_bert(path: Path) -> None:
    from onnxruntime.transformers import optimizer

    optimizer.optimize_model(str(path), model_type="bert", num_heads=4, hidden_size=48).save_model_to_file(str(path))


def float16(path: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), path)


STEPS: dict[str, Callable[[Path], None]] = {
    f.__name__: f
    for f in (strip_metadata, ort_basic, ort_extended, onnxscript_optimize, ort_transformers_bert, float16)
}
