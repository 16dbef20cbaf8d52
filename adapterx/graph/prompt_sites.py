"""Prompts: the trained vectors of prompt tuning, P-tuning and prefix tuning, a constant of the graph."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from adapterx.adapter import PROMPT, LowRank
from adapterx.graph.bases import Base
from adapterx.graph.claims import FOLDED_FROM, listed
from adapterx.graph.exported import Exported
from adapterx.graph.view import is_op
from adapterx.graph.weights import read
from adapterx.kinds.prompt import SITE
from adapterx.site import NameSource

_PART = re.compile(r"^(?:.+\.)?prompt_encoder\.(?P<adapter>[^.]+)\.(?P<rest>.+)$")
_EMBEDDING = "embedding.weight"
_MATRIX = 2


def find_prompts(model: ir.Model, _: Sequence[Base]) -> list[Exported]:
    """Every prompt that is one tensor; one that the graph computes from several (an MLP's) is none.

    A constant that is repeated over the batch may be a prompt that lost its name: it is among them, without one.
    """
    constants = list(model.graph.initializers.values())
    parts = [part for value in constants for part in _parts(value)]
    several = {adapter for adapter, rest, _, _ in parts if rest != _EMBEDDING}
    own = {value: _exported(value, a, source) for a, _, source, value in parts if a not in several and _fits(value)}
    nameless = [value for value in constants if value not in own and _fits(value) and _is_repeated(value)]
    return [*own.values(), *(_exported(value, "", "structure") for value in nameless)]


def _parts(value: ir.Value) -> Iterator[tuple[str, str, NameSource, ir.Value]]:
    """Adapter, part, and what tells it, of a constant that is PEFT's prompt encoder's or was folded from such."""
    if (found := _PART.match(value.name or "")) is not None:
        yield found["adapter"], found["rest"], "initializer", value
    for name in listed(value.metadata_props.get(FOLDED_FROM)):
        if (found := _PART.match(name)) is not None:
            yield found["adapter"], found["rest"], "folded_from", value


def _fits(value: ir.Value) -> bool:
    """``[tokens, width]``, behind dimensions of 1."""
    tensor = value.const_value
    shape = () if tensor is None else tuple(int(size) for size in tensor.shape.numpy())
    is_float = tensor is not None and tensor.dtype.is_floating_point()
    return is_float and len(shape) >= _MATRIX and all(size == 1 for size in shape[:-_MATRIX])


def _is_repeated(value: ir.Value) -> bool:
    repeats = [is_op(use.node, "Expand", "Tile") for use in value.uses()]
    return bool(repeats) and all(repeats)


def _exported(value: ir.Value, adapter: str, source: NameSource) -> Exported:
    assert value.const_value is not None, "a constant has its tensor"
    prompt = read(value.const_value)
    return Exported(
        module=SITE if source != "structure" else "",
        adapter=adapter,
        source=source,
        kind="prompt",
        op=None,
        x=None,
        base=None,
        join=None,
        change=LowRank.of_parts({PROMPT: prompt.reshape(prompt.shape[-_MATRIX:])}),
        nodes=tuple({use.node for use in value.uses()}),
        prompt=value,
    )
