"""DoRA: the adapted weight's rows, brought to a learned length (Liu et al., arXiv 2402.09353).

``y = m / ||W + s * B @ A|| * (W + s * B @ A) x + bias``, the norm over each output's row.

In a PEFT file: those of LoRA, and ``lora_magnitude_vector`` ``[d_out]``.

In a graph: TorchScript computes the norm at each run; dynamo folds ``m / norm`` into one vector, since all of it is
constant. Either way the sites get the ports of LoRA, with ``m / norm`` multiplied into ``b``, and beside them ``gain
= m / norm - 1`` and ``shift = (1 - m / norm) * bias``. The norm needs the base weight: it is taken when the adapter
meets a model (:func:`lowered`), once, not at each run.

In a mixed batch: as LoRA, with gain and shift by the row mask. A weighted sum of DoRA adapters on one row is not what
PEFT would compute of both, since the norm is not linear.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from adapterx.adapter import GAIN, MAGNITUDE, SHIFT, WHOLE_BIAS, Array, LowRank
from adapterx.kinds import conv, lora
from adapterx.kinds.lora import Scale, cast, wide

KEYS = ("lora_magnitude_vector", "lora_magnitude_vector.weight")


def read(tensors: Mapping[str, Array], scale: Scale) -> LowRank:
    """A site of a DoRA file; arguments and errors as for :func:`adapterx.kinds.lora.read`."""
    [magnitude] = [tensors[key] for key in KEYS if key in tensors]
    is_conv = "lora_A.weight" in tensors and tensors["lora_A.weight"].ndim > 2
    low_rank = (conv if is_conv else lora).read(tensors, scale)
    if SHIFT in low_rank.parts:
        raise ValueError("lora_bias together with use_dora is nothing that PEFT computes")
    parts = {MAGNITUDE: magnitude.reshape(1, -1).astype(low_rank.dtype)}
    return LowRank(a=low_rank.a, b=low_rank.b, parts=parts)


def lowered(change: LowRank, weight: Array, bias: Array | None) -> LowRank:
    """``change`` beside one base: its magnitude as gain and shift.

    Args:
        change: with a ``magnitude``, perhaps a ``whole_bias``
        weight: the base's ``[d_out, d_in]`` (of a convolution with the kernel flattened into ``d_in``)
        bias: the base's ``[d_out]``, ``None`` when it has none

    Raises:
        ValueError: a row of the adapted weight is zero, so it has no direction.

    Example:
        >>> plain = LowRank(a=np.zeros((1, 2)), b=np.zeros((1, 2)), parts={MAGNITUDE: np.array([[10.0, 1.0]])})
        >>> lowered(plain, np.array([[3.0, 4.0], [0.0, 1.0]]), None).parts[GAIN]
        array([[1., 0.]])
    """
    b = wide(change.b)
    norm = np.linalg.norm(wide(weight) + b.T @ wide(change.a).reshape(change.rank, -1), axis=1)
    if not norm.all():
        raise ValueError(f"row {int(np.argmin(norm))} of the adapted weight is zero; DoRA divides by its length")
    factor = wide(change.parts[MAGNITUDE]).reshape(-1) / norm
    parts = {GAIN: cast((factor - 1)[None], change.dtype, GAIN)}
    before = np.zeros(len(norm), np.float32) if bias is None else wide(bias)
    after = wide(change.parts[WHOLE_BIAS]).reshape(-1) if WHOLE_BIAS in change.parts else before
    if WHOLE_BIAS in change.parts or before.any():
        parts[SHIFT] = cast((after - factor * before)[None], change.dtype, SHIFT)
    return LowRank(a=change.a, b=cast(b * factor, change.dtype, "lora_B"), parts=parts)
