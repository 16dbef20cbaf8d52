"""Feeds that a model accepts, made from nothing but its graph: for verifying and for a first run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from adapterx.adapter import Array
from adapterx.graph.view import is_op, source
from adapterx.manifest import MASK, Manifest

_UNBOUNDED = 2


def example_feeds(
    model: ir.Model,
    *,
    seed: int = 0,
    manifest: Manifest | None = None,
    rows: int = 2,
    length: int = 5,
) -> dict[str, Array]:
    """Random feeds for every required input of ``model``.

    Symbolic dimensions get one small size each (the first of an input is the batch, others are lengths; ``a + b`` is
    the sum). Integers that index a table stay below its length; masks are ones; positions count up.

    Args:
        model: its graph; weights are not read
        seed: of the random numbers
        manifest: of an extracted model, whose ports are left out
        rows: of the batch, where the model does not fix them
        length: of every other symbolic dimension
    """
    rng = np.random.default_rng(seed)
    sizes: dict[str, int] = {}
    skip = _ports(manifest)
    return {
        value.name: _feed(value, _shape(value, sizes, (rows, length)), rng)
        for value in model.graph.inputs
        if value.name is not None and value.name not in skip and not value.is_initializer()
    }


def _ports(manifest: Manifest | None) -> set[str]:
    if manifest is None:
        return set()
    return {
        MASK,
        *(p.name for p in manifest.packs),
        *(name for pair in manifest.tensor_names().values() for name in pair),
    }


def _shape(value: ir.Value, sizes: dict[str, int], fresh: tuple[int, int]) -> tuple[int, ...]:
    """``sizes`` are those of symbols that were met; ``fresh`` is for others: of a first axis, and of any other."""
    dims = [] if value.shape is None else list(value.shape)
    shape = []
    for axis, dim in enumerate(dims):
        if isinstance(dim, int):
            shape.append(dim)
            continue
        symbol = str(dim.value) if dim.value is not None else f"{value.name}[{axis}]"
        shape.append(sum(_size(part.strip(), sizes, fresh[axis > 0]) for part in symbol.split("+")))
    return tuple(shape)


def _size(symbol: str, sizes: dict[str, int], fresh: int) -> int:
    return int(symbol) if symbol.isdigit() else sizes.setdefault(symbol, fresh)


def _feed(value: ir.Value, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    dtype = np.dtype(np.float32) if value.dtype is None else value.dtype.numpy()
    name = (value.name or "").lower()
    if dtype.kind == "b" or "mask" in name:
        return np.ones(shape, dtype)
    if dtype.kind in "iu":
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
        return rng.integers(0, _bound(value), shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def _bound(value: ir.Value) -> int:
    """Length of the shortest table that the value indexes, directly or through casts and reshapes."""
    bounds = []
    for consumer in _readers(value):
        table = consumer.inputs[0]
        if (
            is_op(consumer, "Gather")
            and table is not None
            and table.shape is not None
            and consumer.inputs[1] is not None
        ):
            rows = table.shape[0]
            if source(consumer.inputs[1]) is value and isinstance(rows, int):
                bounds.append(rows)
    return max(1, min(bounds, default=_UNBOUNDED))


def _readers(value: ir.Value) -> list[ir.Node]:
    readers = list(value.consumers())
    for node in readers:
        if is_op(node, "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten"):
            readers += [n for n in node.outputs[0].consumers() if n not in readers]
    return readers
