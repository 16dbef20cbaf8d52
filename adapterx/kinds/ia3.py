"""(IA)3: activations multiplied by a learned vector (Liu et al., arXiv 2205.05638).

In a PEFT file: ``ia3_l``, ``[d_out, 1]`` where the output of a linear layer is multiplied, bias included, and ``[1,
d_in]`` where its input is (``feedforward_modules``); of a convolution ``[1, channels, 1, ...]`` for both, told apart
by the config.

In a graph: one ``Mul`` after the base, or before it. Ports ``gain`` ``[1, d_out]`` or ``input_gain`` ``[1, d_in]``.
They hold ``l - 1``: like every port they are zero for the base.

In a mixed batch: each row picks its gain by the row mask. A weighted sum of several adapters on one row adds their
``l - 1``, which is not the product that PEFT would make of several active ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapterx.adapter import GAIN, INPUT_GAIN, Array, LowRank
from adapterx.kinds.lora import cast, wide

KEYS = ("ia3_l",)


def read(tensors: Mapping[str, Array], *, feedforward: bool) -> LowRank:
    """A site of an (IA)3 file.

    Args:
        tensors: ``ia3_l`` of one module
        feedforward: what the config says of the module; the shape of a linear layer's vector tells it as well

    Raises:
        ValueError: the vector has another shape than the config asks for.
    """
    vector = tensors["ia3_l"]
    rows = vector.shape[0] if vector.ndim else 0
    if vector.ndim < 2 or vector.size != max(vector.shape):
        raise ValueError(f"ia3_l must be [d_out, 1] or [1, d_in]; got {vector.shape}")
    if vector.ndim == 2 and vector.size > 1 and (rows == 1) != feedforward:
        says = "names" if feedforward else "does not name"
        raise ValueError(f"ia3_l is {vector.shape}, but feedforward_modules {says} the module")
    change = cast(wide(vector).reshape(1, -1) - 1, vector.dtype, "ia3_l")
    return LowRank.of_parts({INPUT_GAIN if feedforward else GAIN: change})
