"""Facts: what is known of a value before the run, as far as it helps to tell where the rows of a batch lie in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from adapterx.graph.sizes import ONE, Size

Dims = tuple[Size | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of a batch lie in a value: along ``axis``, which has ``before * n * after`` entries.

    ``before`` and ``after`` are 1 where the axis is the batch. ``[n * t, d]`` has ``after`` t: entry i belongs to row
    ``i // t``. ``[t * n, d]`` has ``before`` t.
    """

    axis: int = 0
    before: Size = ONE
    after: Size = ONE

    @property
    def is_exact(self) -> bool:
        """Whether the axis has one entry for each row."""
        return self.before == ONE == self.after

    def at(self, axis: int) -> Rows:
        """The same along another axis."""
        return dataclasses.replace(self, axis=axis)


FIRST = Rows()


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one value.

    Args:
        dims: its dimensions, ``None`` those of which nothing is known; ``None`` if not even their number is known
        rows: where the rows of the batch lie; ``None`` where there are none, or they are lost
        lost: why nothing tells where they are, ``""`` if something does or there are none
        numbers: the elements of a small vector of integers (a shape, say)
        counts: the axis along which the elements count the rows: row i has ``i * stride``, and perhaps something less
            than ``stride`` on top (the place of a token in rows that were flattened)
        stride: of ``counts``
    """

    dims: Dims | None = None
    rows: Rows | None = None
    lost: str = ""
    numbers: Dims | None = None
    counts: int | None = None
    stride: Size = ONE

    @property
    def rank(self) -> int | None:
        """How many dimensions it has."""
        return None if self.dims is None else len(self.dims)

    @property
    def is_shared(self) -> bool:
        """Whether all rows of the batch share it: it does not depend on them."""
        return self.rows is None and not self.lost


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A node and what is known of its operands.

    Args:
        node: in the graph
        operands: one an input, ``None`` where the input is absent
        opset: version of the standard operators
        rows: how many rows the batch has
        said: what the model says of the dimensions of an output
    """

    node: ir.Node
    operands: tuple[Fact | None, ...]
    opset: int
    rows: Size
    said: Callable[[int], Dims | None]

    @property
    def first(self) -> Fact:
        """The first operand."""
        return self.operand(0) or Fact()

    def operand(self, index: int) -> Fact | None:
        """The operand at ``index``, if there is one."""
        return self.operands[index] if index < len(self.operands) else None

    def number(self, name: str, default: int) -> int:
        """An attribute that is an integer."""
        found = self.node.attributes.get(name)
        return default if found is None else int(found.as_int())

    def ints(self, name: str, index: int) -> list[int] | None:
        """Integers of the attribute ``name``, or of the operand at ``index``; ``None`` if they are not known."""
        if name in self.node.attributes:
            return list(self.node.attributes[name].as_ints())
        operand = self.operand(index)
        if operand is None or operand.numbers is None:
            return None
        known = [size.number for size in operand.numbers if size is not None and size.is_number]
        return known if len(known) == len(operand.numbers) else None

    def has(self, name: str, index: int) -> bool:
        """Whether the attribute ``name`` or the operand at ``index`` is given."""
        return name in self.node.attributes or self.operand(index) is not None

    def lost(self, why: str) -> Fact:
        """That it is lost here, and why."""
        node = self.node
        name = node.name or (node.outputs[0].name if node.outputs else "") or "without a name"
        return Fact(lost=f"node {name!r} ({node.op_type}) {why}")

    @property
    def cause(self) -> str:
        """Why the rows of an operand are lost, ``""`` when those of none are."""
        return next((fact.lost for fact in self.operands if fact is not None and fact.lost), "")

    @property
    def is_shared(self) -> bool:
        """Whether no operand depends on rows of the batch."""
        return all(fact is None or fact.is_shared for fact in self.operands)
