"""Shapes and types of values: those that the model states, and inferred ones where it states none."""

from __future__ import annotations

import functools
import logging

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass, shape_inference


class Shapes:
    """What is known of a model's values. Inference is run on a copy, once, when something is missing.

    Args:
        model: looked at as it is now; values that come later must state their own shape
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    def rank(self, value: ir.Value) -> int | None:
        """How many dimensions it has, or ``None`` when nothing tells."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def shape(self, value: ir.Value) -> ir.Shape | None:
        """Its shape, or ``None`` when nothing tells."""
        if value.shape is not None:
            return value.shape
        found = self._inferred.get(value.name or "")
        return None if found is None else found.shape

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The type of its elements, or ``None`` when nothing tells."""
        if value.dtype is not None:
            return value.dtype
        found = self._inferred.get(value.name or "")
        return None if found is None else found.dtype

    @functools.cached_property
    def _inferred(self) -> dict[str, ir.Value]:
        # It logs a page for a graph that it does not understand to the end; what it found up to there is of use.
        log = logging.getLogger(shape_inference.__name__)
        disabled, log.disabled = log.disabled, True
        try:
            model = ShapeInferencePass()(self._model.clone()).model
        finally:
            log.disabled = disabled
        values = {str(value.name): value for value in model.graph.inputs}
        return values | {str(v.name): v for graph in model.graphs() for node in graph for v in node.outputs}
