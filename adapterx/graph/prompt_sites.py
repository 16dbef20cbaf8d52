"""Prompts: the trained vectors of prompt tuning, P-tuning and prefix tuning, a constant of the graph."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_ir as ir

from adapterx.adapter import PROMPT, LowRank
from adapterx.graph.bases import Base
from adapterx.graph.exported import Exported
from adapterx.graph.weights import read
from adapterx.kinds.prompt import SITE

_PART = re.compile(r"^(?:.+\.)?prompt_encoder\.(?P<adapter>[^.]+)\.(?P<rest>.+)$")
_EMBEDDING = "embedding.weight"


def find_prompts(model: ir.Model, _: Sequence[Base]) -> list[Exported]:
    """Every prompt that is one tensor; one that the graph still computes from several (an MLP's) is none."""
    parts = [(found, value) for value in model.graph.initializers.values() if (found := _PART.match(value.name or ""))]
    several = {found["adapter"] for found, _ in parts if found["rest"] != _EMBEDDING}
    return [_exported(found["adapter"], value) for found, value in parts if found["adapter"] not in several]


def _exported(adapter: str, value: ir.Value) -> Exported:
    assert value.const_value is not None, "an initializer has its tensor"
    return Exported(
        module=SITE,
        adapter=adapter,
        source="initializer",
        kind="prompt",
        op=None,
        x=None,
        base=None,
        join=None,
        change=LowRank.of_parts({PROMPT: read(value.const_value)}),
        nodes=tuple({use.node for use in value.uses()}),
        prompt=value,
    )
