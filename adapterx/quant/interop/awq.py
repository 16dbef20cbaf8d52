"""AWQ checkpoints (Lin et al., arXiv 2306.00978) as AutoAWQ and auto-round write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapterx.errors import FormatError, UnsupportedQuantization
from adapterx.quant.interop.bit_stream import interleaved
from adapterx.quant.interop.source import (
    FLOATS,
    Layer,
    Source,
    Tensors,
    finite,
    kept_zeros,
    names_with,
    source_of,
    stored,
    whole,
)
from adapterx.quant.weight import QuantWeight

_PARTS = ("qweight", "qzeros", "scales")
# These name kernels; the tensors are those of "gemm".
_GEMM = ("gemm", "exllama", "ipex")


def read_awq(files: Tensors, config: Mapping[str, Any]) -> Source:
    """The layers of an AWQ checkpoint.

    ``qweight`` int32 ``[K, N / 8]`` and ``qzeros`` int32 ``[G, N / 8]``, eight columns a word in the order 0, 2, 4, 6,
    1, 3, 5, 7, and ``scales`` ``[G, N]``. The scales of AWQ's search are folded into the layers before, so there is no
    ``pre_scale``.

    Raises:
        FormatError: tensors that do not belong together
        UnsupportedQuantization: a ``version`` with another packing ("gemv", "marlin"), or other than 4 bits
    """
    version = config.get("version", "gemm")
    if not isinstance(version, str) or version.lower() not in _GEMM:
        raise UnsupportedQuantization(f"{files.folder}: AWQ of version {version!r:.40}; {', '.join(_GEMM)} can be held")
    whole(config, "bits", (4,), 4, where=files.folder)
    layers = {name: _layer(files, name, config) for name in names_with(files, ".qweight")}
    return source_of(files, layers, _PARTS)


def _layer(files: Tensors, name: str, config: Mapping[str, Any]) -> Layer:
    inputs, words = stored(files, f"{name}.qweight", torch.int32, shape=(None, None))
    groups, outputs = stored(files, f"{name}.scales", *FLOATS, shape=(None, 8 * words))
    stored(files, f"{name}.qzeros", torch.int32, shape=(groups, words))
    if inputs % groups:
        raise FormatError(f"{files.folder}: {name}.scales: {groups} groups do not divide {inputs} inputs")

    def read() -> QuantWeight:
        return QuantWeight(
            codes=interleaved(files.read(f"{name}.qweight")).T.contiguous(),
            scales=finite(files, f"{name}.scales", files.read(f"{name}.scales")).T.contiguous(),
            group=inputs // groups,
            bits=4,
            zeros=kept_zeros(interleaved(files.read(f"{name}.qzeros")).T.contiguous(), 4),
        )

    return Layer((outputs, inputs), read)
