"""Masks: which rows of a batch an adapter acts on, as graph inputs, and as what a node wants of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from adapterx.graph.ports import add_input, prepend, reshaped
from adapterx.manifest import MASK, ROW_MASK


class Masks:
    """The mask inputs, and their forms for operands of other ranks and dtypes, each made once.

    ``adapter_mask`` is ``[n, R]``. A site whose ``x`` is ``[n, t, d_in]`` needs it as ``[n, 1, R]``, a convolution as
    ``[n, R, 1, 1]``. ``adapter_row_mask`` ``[n, K]``, for gains and shifts, is there only once it was asked for.
    """

    def __init__(self, model: ir.Model, *, as_input: bool) -> None:
        self._model, self._as_input = model, as_input
        self._inputs: dict[str, ir.Value] = {}
        self._forms: dict[tuple[str, int, bool, ir.DataType], ir.Value] = {}
        if as_input:
            self._input(MASK)

    @property
    def row_mask(self) -> str | None:
        """The name of the row mask input, if there is one."""
        return ROW_MASK if ROW_MASK in self._inputs and self._as_input else None

    def form(self, rank: int, dtype: ir.DataType, *, name: str = MASK, leading: bool = False) -> ir.Value:
        """A mask for an operand of ``rank`` dimensions in ``dtype``.

        Args:
            rank: of the operand
            dtype: of the operand
            name: ``adapter_mask`` or ``adapter_row_mask``
            leading: the mask's last axis meets the operand's second (the channels of a convolution), not its last
        """
        key = (name, rank, leading, dtype)
        if key not in self._forms:
            self._forms[key] = self._made(*key)
        return self._forms[key]

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

    def _made(self, name: str, rank: int, leading: bool, dtype: ir.DataType) -> ir.Value:
        value, nodes = self._input(name), []
        form = f"{name}.{rank}d" + ".leading" * leading
        if rank > 2:
            axes = list(range(2, rank)) if leading else list(range(1, rank - 1))
            nodes.append(self._reshaped("Unsqueeze", value, axes, form))
            value = nodes[-1].outputs[0]
        elif rank == 1:
            # One row without a batch axis.
            nodes.append(self._reshaped("Squeeze", value, [0], form))
            value = nodes[-1].outputs[0]
        if dtype != ir.DataType.FLOAT:
            form = f"{form}.{dtype.name.lower()}"
            nodes.append(ir.node("Cast", [value], attributes={"to": dtype.value}, name=form))
            value = nodes[-1].outputs[0]
        if nodes:
            value.name = form
        prepend(self._model, nodes)
        return value

    def _reshaped(self, op_type: str, value: ir.Value, axes: list[int], name: str) -> ir.Node:
        return reshaped(self._model, op_type, value, axes, name=name)
