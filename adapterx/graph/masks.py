"""Masks: which rows of a batch an adapter acts on, as graph inputs, and as what a node wants of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from adapterx.graph.facts import FIRST, Rows
from adapterx.graph.mask_positions import MaskPositions
from adapterx.graph.ports import add_input, prepend, registered, reshaped
from adapterx.manifest import MASK, ROW_MASK


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """What a mask meets.

    Args:
        rank: its dimensions
        dtype: of its elements
        rows: where the rows of the batch lie in it; ``None`` where nothing tells, and one mask serves all
        at: a value whose dimension along ``rows.axis`` is the operand's; needed only where that has several entries a
            row
        leading: the mask's last axis meets the operand's second (the channels of a convolution), not its last
    """

    rank: int
    dtype: ir.DataType
    rows: Rows | None = FIRST
    at: ir.Value | None = None
    leading: bool = False


class Masks:
    """The mask inputs, and their forms for all kinds of operands, each made once.

    ``adapter_mask`` is ``[n, R]``. A site whose ``x`` is ``[n, t, d_in]`` needs it as ``[n, 1, R]``, a convolution as
    ``[n, R, 1, 1]``, one that reads ``[t, n, d_in]`` as ``[1, n, R]``, and one that reads ``[n * t, d_in]`` each row t
    times. ``adapter_row_mask`` ``[n, K]``, for gains and shifts, is there only once it was asked for.
    """

    def __init__(self, model: ir.Model, *, as_input: bool) -> None:
        self._model, self._as_input = model, as_input
        self._inputs: dict[str, ir.Value] = {}
        self._forms: dict[tuple[ir.Value, int, int, bool, ir.DataType], ir.Value] = {}
        self._positions = MaskPositions(model)
        if as_input:
            self._input(MASK)

    @property
    def row_mask(self) -> str | None:
        """The name of the row mask input, if there is one."""
        return ROW_MASK if ROW_MASK in self._inputs and self._as_input else None

    def form(self, operand: Operand, *, name: str = MASK) -> ir.Value:
        """A mask for ``operand``.

        Args:
            operand: what it is to meet
            name: ``adapter_mask`` or ``adapter_row_mask``
        """
        value, rows = self._input(name), operand.rows if self._as_input else FIRST
        if rows is None:
            return self._ones(operand, name)
        wide = None if rows.is_exact or operand.at is None else self._positions.wide(value, rows, operand.at)
        value = wide or value
        key = (value, operand.rank, rows.axis, operand.leading, operand.dtype)
        if key not in self._forms:
            nodes = self._formed(value, operand, rows.axis)
            self._forms[key] = nodes[-1].outputs[0] if nodes else value
            if wide is None:
                prepend(self._model, nodes)
            else:
                self._positions.then(wide, nodes)
        return self._forms[key]

    def place(self) -> None:
        """Put the nodes of masks by position where what they count is known: once all who read them are there."""
        self._positions.place()

    def _input(self, name: str) -> ir.Value:
        if name in self._inputs:
            return self._inputs[name]
        value = self._inputs[name] = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
        if self._as_input:
            columns = "adapter_ranks" if name == MASK else "adapter_count"
            value.shape = ir.Shape(["adapter_rows", columns])
            add_input(self._model, value, (1, 1), fill=1.0)
        else:
            value.shape = ir.Shape([1, 1])
            value.const_value = ir.tensor(np.ones((1, 1), np.float32), name=name)
            self._model.graph.register_initializer(value)
        return value

    def _formed(self, value: ir.Value, operand: Operand, axis: int) -> list[ir.Node]:
        """Nodes that give ``value`` ``[rows, columns]`` the dimensions and the dtype of ``operand``."""
        rank, dtype, nodes = operand.rank, operand.dtype, []
        form = f"{value.name}.{rank}d" + ".leading" * operand.leading + f".axis_{axis}" * (axis > 0)
        if rank > 2:
            axes = list(range(2, rank)) if operand.leading else [i for i in range(rank - 1) if i != axis]
            nodes.append(reshaped(self._model, "Unsqueeze", value, axes, name=form))
        elif rank == 1:
            # One row without a batch axis.
            nodes.append(reshaped(self._model, "Squeeze", value, [0], name=form))
        if dtype != ir.DataType.FLOAT:
            form = f"{form}.{dtype.name.lower()}"
            cast = [nodes[-1].outputs[0] if nodes else value]
            nodes.append(ir.node("Cast", cast, attributes={"to": dtype.value}, name=form))
        if nodes:
            nodes[-1].outputs[0].name = form
        return nodes

    def _ones(self, operand: Operand, name: str) -> ir.Value:
        """What leaves an adapter as it is, for every row."""
        form = f"{name}.unmixed.{operand.rank}d.{operand.dtype.name.lower()}"
        found = self._model.graph.initializers.get(form)
        ones = np.ones([1] * operand.rank, operand.dtype.numpy())
        return found or registered(self._model, ir.tensor(ones, name=form, dtype=operand.dtype))
