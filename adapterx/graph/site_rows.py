"""Where the rows of a batch lie at the sites of a model, and which sites cannot tell them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from adapterx.graph.facts import Rows
from adapterx.graph.row_order import RowOrder
from adapterx.graph.shapes import Shapes


@dataclasses.dataclass(frozen=True, slots=True)
class SiteRows:
    """What there is to say of the rows of a batch before any site is rewired.

    Args:
        batch: graph inputs whose axis 0 counts them
        unmixed: by site, why they cannot have different adapters there
        rows: by value, where they lie in it
    """

    batch: tuple[str, ...] = ()
    unmixed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rows: Mapping[ir.Value, Rows] = dataclasses.field(default_factory=dict)

    def of(self, site: str, value: ir.Value) -> Rows | None:
        """Where the rows lie in ``value``, a place of ``site``; ``None`` where the site does not tell them apart."""
        return None if site in self.unmixed else self.rows.get(value)


def site_rows(model: ir.Model, shapes: Shapes, places: Mapping[str, Sequence[ir.Value]]) -> SiteRows:
    """Find them. A site that is called several times tells rows apart only if every call does.

    Args:
        model: looked at, before it is rewired
        shapes: of the model
        places: by site, the values that its masks will meet; without one (a prompt) the rows of a batch share the site
    """
    order = RowOrder(model, shapes, bases=[value for values in places.values() for value in values])
    unmixed: dict[str, str] = {}
    rows: dict[ir.Value, Rows] = {}
    for site, values in places.items():
        found = {value: order.rows(value) for value in values}
        reasons = [why for why in found.values() if isinstance(why, str)]
        if reasons or not values:
            unmixed[site] = reasons[0] if reasons else "its prompt is one constant, which all rows of a batch share"
        rows |= {value: there for value, there in found.items() if isinstance(there, Rows)}
    return SiteRows(order.batch, unmixed, rows)
