"""ONNX Runtime's quantizers, as users call them: a float file in, a quantized model out, some nodes left in float."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx.version_converter
from onnxruntime import quantization
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from adapterx.adapter import Array

Quantize = Callable[[Path, Sequence[str], Mapping[str, Array]], onnx.ModelProto]


def _nbits(model: onnx.ModelProto, excluded: Sequence[str], **options: Any) -> onnx.ModelProto:
    quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=32, nodes_to_exclude=list(excluded), **options)
    quantizer.process()
    return quantizer.model.model


def int4(path: Path, excluded: Sequence[str], feeds: Mapping[str, Array]) -> onnx.ModelProto:
    return _nbits(onnx.load(path), excluded, is_symmetric=True)


def int4_asymmetric(path: Path, excluded: Sequence[str], feeds: Mapping[str, Array]) -> onnx.ModelProto:
    return _nbits(onnx.load(path), excluded, is_symmetric=False)


def int4_level_4(path: Path, excluded: Sequence[str], feeds: Mapping[str, Array]) -> onnx.ModelProto:
    """Activations in int8 too: what the genai builder asks for."""
    return _nbits(onnx.load(path), excluded, is_symmetric=True, accuracy_level=4)


def int4_gather(path: Path, excluded: Sequence[str], feeds: Mapping[str, Array]) -> onnx.ModelProto:
    return _nbits(_at_opset_21(path), excluded, is_symmetric=False, op_types_to_quantize=("MatMul", "Gather"))


def int4_qdq(path: Path, excluded: Sequence[str], feeds: Mapping[str, Array]) -> onnx.ModelProto:
    return _nbits(_at_opset_21(path), excluded, is_symmetric=True, quant_format=quantization.QuantFormat.QDQ)


def _at_opset_21(path: Path) -> onnx.ModelProto:
    # The quantizer stamps opset 21 on files with int4 tensors, and leaves the operators as they were.
    return onnx.version_converter.convert_version(onnx.load(path), 21)


def int8_dynamic(path: Path, excluded: Sequence[str], feeds: Mapping[str, Array]) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        model, out = onnx.load(path), Path(folder) / "model.onnx"
        # It transposes weights of a Gemm, and then finds that the shapes which torch wrote down contradict it.
        del model.graph.value_info[:]
        quantization.quantize_dynamic(model, out, nodes_to_exclude=list(excluded))
        return onnx.load(out)


class _Once(quantization.CalibrationDataReader):  # type: ignore[misc]  # untyped
    """The feeds of the case, and no more."""

    def __init__(self, feeds: Mapping[str, Array]) -> None:
        self.rest = [dict(feeds)]

    def get_next(self) -> dict[str, Array] | None:
        return self.rest.pop() if self.rest else None


def int8_static(path: Path, excluded: Sequence[str], feeds: Mapping[str, Array]) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.onnx"
        quantization.quantize_static(
            path, out, _Once(feeds), op_types_to_quantize=["MatMul"], nodes_to_exclude=list(excluded)
        )
        return onnx.load(out)


QUANTIZERS: dict[str, Quantize] = {
    f.__name__: f for f in (int4, int4_asymmetric, int4_level_4, int4_gather, int4_qdq, int8_dynamic, int8_static)
}
