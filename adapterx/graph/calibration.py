"""Static quantization around an adapter: activations on grids that were chosen by the exported adapter's numbers."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from adapterx.errors import ModelError
from adapterx.graph.branches import Branch
from adapterx.graph.view import MICROSOFT, SAME_VALUE, STANDARD, constant, is_op, scalar
from adapterx.site import AdapterSite

_SHOWN = 10


def calibrated(found: Iterable[tuple[AdapterSite, Branch]]) -> tuple[str, ...]:
    """One line for each site whose activations were put on a grid, with what the grid of its result does to others."""
    return tuple(f"{site.name}: {_words(branch)}" for site, branch in found if branch.calibrated)


def refuse_calibrated(lines: tuple[str, ...], where: str) -> None:
    """Refuse a model in which another adapter would be measured by the exported one's ranges.

    Raises:
        ModelError: there are ``lines``.
    """
    if not lines:
        return
    shown = [f"  {line}" for line in lines[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"  and {len(lines) - _SHOWN} more")
    listed = "\n".join(shown)
    raise ModelError(
        f"{where} was quantized with ranges of activations that were measured with the exported adapter, at "
        f"{len(lines)} of its places; what another adapter gives there is rounded and cut off by them:\n{listed}\n"
        "Quantize the export again without the adapter's nodes (nodes_to_exclude). Or pass static_qdq='allow': the "
        "adapter's own path then computes in float, and what follows it keeps the ranges listed here."
    )


def _words(branch: Branch) -> str:
    grid = _grid_after(branch.join)
    if grid is None:
        return "its activations have the exported adapter's ranges"
    step, low, high = grid
    return f"its result is rounded to multiples of {step:.3g} and cut off at {low:.3g} and {high:.3g}"


def _grid_after(join: ir.Node) -> tuple[float, float, float] | None:
    """Step, least and greatest value of the grid that a join's result is put on."""
    value = join.outputs[0]
    while len(uses := list(value.uses())) == 1 and is_op(uses[0].node, *SAME_VALUE):
        value = uses[0].node.outputs[0]
    found = [use.node for use in value.uses() if is_op(use.node, "QuantizeLinear", domain=(*STANDARD, MICROSOFT))]
    if not found:
        return None
    _, scale, zero = [*found[0].inputs, None][:3]
    step, middle = scalar(scale), scalar(zero) or 0.0
    codes = constant(zero)
    if step is None or codes is None:
        return None
    least = -(1 << (codes.dtype.bitwidth - 1)) if codes.dtype.name.startswith("INT") else 0
    greatest = least + (1 << codes.dtype.bitwidth) - 1
    return step, (least - middle) * step, (greatest - middle) * step
