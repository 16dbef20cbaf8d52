"""ONNX Runtime's quantizers, as people run them on an exported file."""

from __future__ import annotations

import contextlib
import logging

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer


@contextlib.contextmanager
def _silent():
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _blocks(model, path, exclude, **options):
    path.with_suffix(".input").write_bytes(model.SerializeToString())
    quantizer = MatMulNBitsQuantizer(
        onnx.load(path.with_suffix(".input")),
        op_types_to_quantize=("MatMul",),
        nodes_to_exclude=list(exclude),
        **{"block_size": 32, "is_symmetric": True, **options},
    )
    quantizer.process()
    onnx.save(quantizer.model.model, path)


def _dynamic(model, path, exclude, **options):
    quantize_dynamic(model, path, nodes_to_exclude=list(exclude), **options)


def _bnb4(model, path, exclude):
    quantizer = MatMulBnb4Quantizer(model, MatMulBnb4Quantizer.NF4, 32, list(exclude))
    quantizer.process()
    onnx.save(quantizer.model.model, path)


class _Samples(CalibrationDataReader):
    def __init__(self, feeds):
        self._left = list(feeds)

    def get_next(self):
        return self._left.pop() if self._left else None


def static(model, path, feeds, *, exclude=(), **options):
    """Ranges of activations are those that ``feeds`` have in ``model``."""
    with _silent():
        quantize_static(model, path, _Samples(feeds), nodes_to_exclude=list(exclude), **options)
    return path


HOW = {
    "int4": (_blocks, {}),
    "int4_asymmetric": (_blocks, {"is_symmetric": False}),
    "int4_accuracy_4": (_blocks, {"accuracy_level": 4}),
    "int8_blocks": (_blocks, {"bits": 8}),
    "int4_qdq": (_blocks, {"quant_format": QuantFormat.QDQ}),
    "uint4_qdq": (_blocks, {"quant_format": QuantFormat.QDQ, "is_symmetric": False}),
    "int4_qdq_by_column": (_blocks, {"quant_format": QuantFormat.QDQ, "channel_wised_quantize": True}),
    "int8_dynamic": (_dynamic, {}),
    "int8_dynamic_by_column": (_dynamic, {"per_channel": True}),
    "uint8_dynamic": (_dynamic, {"weight_type": QuantType.QUInt8}),
    "nf4": (_bnb4, {}),
}


def quantized(how, model, path, *, exclude=()):
    """``model`` at ``path``, quantized as ``how`` says, but for the nodes named in ``exclude``."""
    step, options = HOW[how]
    with _silent():
        step(model, path, exclude, **options)
    return path
