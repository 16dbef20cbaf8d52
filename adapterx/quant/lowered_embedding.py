"""Lowered embeddings: ``nn.Embedding`` as ``GatherBlockQuantized``, for the time of an export."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from adapterx.errors import OptionError
from adapterx.quant.linear import replace
from adapterx.quant.lowered_product import Product, block_of, repeated, width_of
from adapterx.quant.packing import pack
from adapterx.quant.rtn import RTN, rtn
from adapterx.quant.scheme import Scheme

Tensor = torch.Tensor


class LoweredEmbedding(nn.Module):
    """An ``nn.Embedding``, rounded to nearest, as the exporter sees it."""

    product: Product
    was: str

    def __init__(self, embedding: nn.Embedding, scheme: Scheme, *, name: str) -> None:
        super().__init__()
        self.embedding_dim = embedding.embedding_dim
        quantized = rtn(embedding.weight, RTN(scheme), name=name)
        block, width = block_of(quantized), max(4, width_of(quantized.bits))
        if not quantized.is_affine or block is None or self.embedding_dim % block:
            raise OptionError(
                f"{name}: {scheme} has no GatherBlockQuantized; give embeddings= an integer scheme whose group is a "
                f"multiple of 16 that divides its {self.embedding_dim} columns"
            )
        middle = torch.full_like(quantized.scales, 2 ** (quantized.bits - 1), dtype=torch.uint8)
        zeros = middle if quantized.zeros is None else quantized.zeros
        spread = (repeated(grid, quantized.group, block, self.embedding_dim) for grid in (quantized.scales, zeros))
        scales, zeros = spread
        self.register_buffer("qweight", pack(quantized.codes, width))
        self.register_buffer("scales", scales)
        self.register_buffer("qzeros", pack(zeros, width))
        self.attributes: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1, "block_size": block, "bits": width}
        self.product = Product(f"GatherBlockQuantized, {width} bits, block {block}", {}, lambda x, _: x)
        self.was = f"Embedding, {scheme.bits} bits, group {quantized.group}"

    def forward(self, ids: Tensor) -> Tensor:
        """``[...]`` ids -> ``[..., embedding_dim]``."""
        operands = [self.get_buffer("qweight"), ids, self.get_buffer("scales"), self.get_buffer("qzeros")]
        found: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            operands,
            self.attributes,
            dtype=torch.float32,
            shape=(*ids.shape, self.embedding_dim),
            version=1,
        )
        return found


@contextlib.contextmanager
def embeddings_lowered(model: nn.Module, embeddings: bool | Scheme) -> Iterator[dict[str, LoweredEmbedding]]:
    """Within it, every plain ``nn.Embedding`` of ``model`` is a `LoweredEmbedding`, where ``embeddings`` asks."""
    scheme = Scheme(bits=8, group_size=32, symmetric=False) if embeddings is True else embeddings
    layers: list[tuple[str, nn.Embedding]] = []
    if scheme:
        layers = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Embedding]
    made: dict[int, LoweredEmbedding] = {}
    found: dict[str, LoweredEmbedding] = {}
    try:
        for name, layer in layers:
            assert isinstance(scheme, Scheme), "True was turned into one"
            if id(layer) not in made:
                made[id(layer)] = LoweredEmbedding(layer, scheme, name=name)
            found[name] = made[id(layer)]
            replace(model, name, found[name])
        yield found
    finally:
        for name, layer in layers:
            replace(model, name, layer)
