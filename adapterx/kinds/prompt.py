"""Prompt tuning, P-tuning, prefix tuning: trained vectors in front of the tokens, or of each layer's keys and values.

Lester et al., arXiv 2104.08691; Liu et al., arXiv 2103.10385; Li and Liang, arXiv 2101.00190.

In a PEFT file: ``prompt_embeddings``, ``[n_virtual, hidden]`` or, for a prefix, ``[n_virtual, 2 * layers *
kv_width]``. What an MLP computed them from during training is not in the file.

In a graph: a constant that is repeated over the batch. Port ``prompt``, the same tensor, of a fixed number of virtual
tokens: positions and masks in the graph were computed for it. There is no base without it, so it must be fed; and a
model that was exported without has no place to put it in.

In a mixed batch: refused. The rows of a batch share one prompt in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

from adapterx.adapter import PROMPT, Array, LowRank

KEYS = ("prompt_embeddings",)
SITE = "prompt_encoder"


def read(tensors: Mapping[str, Array]) -> LowRank:
    """The one site of a prompt's file.

    Raises:
        ValueError: the embeddings are no matrix.
    """
    embeddings = tensors["prompt_embeddings"]
    if embeddings.ndim != 2:
        raise ValueError(f"prompt_embeddings must be [n_virtual, width]; got {embeddings.shape}")
    return LowRank.of_parts({PROMPT: embeddings})
