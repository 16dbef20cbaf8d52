"""LoRA on an embedding: ``table[ids] + s * (A.T[ids] @ B.T)`` (as PEFT's ``Embedding`` layer has it).

In a PEFT file: ``lora_embedding_A`` ``[r, vocabulary]`` and ``lora_embedding_B`` ``[hidden, r]``, without ``.weight``.
``save_embedding_layers`` adds a copy of the base's table under ``base_layer.weight``, which is not the adapter's.

In a graph: ``Gather(A.T, ids) -> MatMul(B.T) -> Mul -> Add``. Ports ``lora_A`` ``[r, vocabulary]``, ``lora_B`` ``[r,
hidden]``. An lm_head that shares its table with the embedding is a site of its own: PEFT adapts the layers, not the
table.

In a mixed batch: as LoRA on a linear layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapterx.adapter import Array, LowRank
from adapterx.kinds.lora import Scale, cast, paired, wide

KEYS = ("lora_embedding_A", "lora_embedding_B")


def read(tensors: Mapping[str, Array], scale: Scale) -> LowRank:
    """An embedding's site of a LoRA file; arguments and errors as for :func:`adapterx.kinds.lora.read`."""
    a, b = paired(tensors, "lora_embedding_A")
    return LowRank(a=a, b=cast(wide(b).T * scale(len(a)), b.dtype, "lora_embedding_B"))
