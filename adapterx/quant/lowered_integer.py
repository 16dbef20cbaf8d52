"""Lowered integer products: codes of the inputs times codes of the weights, for layers with one scale a row."""

from __future__ import annotations

import torch

from adapterx.quant.lowered_input import integers_of
from adapterx.quant.lowered_product import Product, Tensors
from adapterx.quant.weight import Activation, QuantWeight

Tensor = torch.Tensor


def integer_product(quantized: QuantWeight) -> Product | None:
    """The product in integers, exact; None where the weight has groups, or the inputs have no integer codes of one
    zero point.
    """
    activation, zeros = quantized.activation, quantized.zeros
    if activation is None or activation.format not in ("int8", "uint8") or quantized.scales.shape[1] != 1:
        return None
    if not quantized.is_affine or (zeros is not None and zeros.is_floating_point()):
        return None
    if activation.per == "token" and activation.format == "uint8":
        return None
    tensors = _weight(quantized)
    if activation.per == "static":
        return _static(quantized, tensors, activation)
    if activation.format == "uint8":
        return _dynamic_per_tensor(quantized, tensors)
    return _dynamic_symmetric(quantized, tensors, activation)


def _weight(quantized: QuantWeight) -> dict[str, Tensor]:
    """``[K, N]`` bytes: signed about zero, or unsigned with a zero point for each column."""
    tensors = {"scales": quantized.scales[:, 0].contiguous()}
    if quantized.zeros is None:
        codes = (quantized.codes.to(torch.int16) - 2 ** (quantized.bits - 1)).to(torch.int8)
    else:
        codes = quantized.codes
        tensors["qzeros"] = quantized.zeros[:, 0].contiguous()
    return {"qweight": codes.T.contiguous(), **tensors}


def _static(quantized: QuantWeight, tensors: dict[str, Tensor], activation: Activation) -> Product:
    rows, inputs = quantized.shape
    assert activation.scale is not None, "a static activation has its scale"
    dtype = torch.uint8 if activation.format == "uint8" else torch.int8
    scale = activation.scale.reshape(())
    zero = torch.zeros_like(scale) if activation.zero is None else activation.zero.reshape(())
    if "qzeros" not in tensors:
        tensors["qzeros"] = torch.zeros(rows, dtype=torch.int8)
    tensors = {**tensors, "act_scale": scale.to(torch.float32), "act_zero": zero.to(dtype)}

    def apply(x: Tensor, held: Tensors) -> Tensor:
        grid = [held["act_scale"], held["act_zero"]]
        symbolic = torch.onnx.ops.symbolic
        codes = symbolic("QuantizeLinear", [x, *grid], {}, dtype=dtype, shape=x.shape, version=21)
        floats = symbolic("DequantizeLinear", [codes, *grid], {}, dtype=torch.float32, shape=x.shape, version=21)
        columns = [held["qweight"], held["scales"], held["qzeros"]]
        weight = symbolic(
            "DequantizeLinear", columns, {"axis": 1}, dtype=torch.float32, shape=(inputs, rows), version=21
        )
        return torch.matmul(floats, weight)

    return Product("QuantizeLinear + MatMul, 8 bits", tensors, apply)


def _dynamic_per_tensor(quantized: QuantWeight, tensors: dict[str, Tensor]) -> Product:
    rows, _ = quantized.shape

    def apply(x: Tensor, held: Tensors) -> Tensor:
        codes, scale, zero = torch.onnx.ops.symbolic_multi_out(
            "DynamicQuantizeLinear",
            [x],
            {},
            dtypes=[torch.uint8, torch.float32, torch.uint8],
            shapes=[x.shape, (), ()],
            version=11,
        )
        whole = _matmul_integer(codes, zero, held, rows)
        return whole * (scale * held["scales"])

    return Product("DynamicQuantizeLinear + MatMulInteger", tensors, apply)


def _dynamic_symmetric(quantized: QuantWeight, tensors: dict[str, Tensor], activation: Activation) -> Product:
    rows, _ = quantized.shape
    # ONNX Runtime's fast kernels take unsigned codes on the left.
    tensors = {**tensors, "act_zero": torch.tensor(128, dtype=torch.uint8)}

    def apply(x: Tensor, held: Tensors) -> Tensor:
        codes, scale, _ = integers_of(x, activation)
        whole = _matmul_integer((codes + 128).to(torch.uint8), held["act_zero"], held, rows)
        # Not by the product of the scales: ONNX Runtime would fuse it, and take the first token's for all.
        return whole * scale * held["scales"]

    per = "token" if activation.per == "token" else "tensor"
    return Product(f"MatMulInteger, inputs by {per}", tensors, apply, rounds=True)


def _matmul_integer(codes: Tensor, zero: Tensor, held: Tensors, rows: int) -> Tensor:
    operands = [codes, held["qweight"], zero]
    if "qzeros" in held:
        operands.append(held["qzeros"])
    whole: Tensor = torch.onnx.ops.symbolic(
        "MatMulInteger", operands, {}, dtype=torch.int32, shape=(*codes.shape[:-1], rows), version=10
    )
    return whole.to(torch.float32)
