"""Give a graph its ports: inputs, masks, functions and the manifest; what extraction and injection have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import onnx_ir as ir

from adapterx.errors import ModelError
from adapterx.graph.masks import Masks
from adapterx.graph.ports import PortOptions, Ports, add_ports, onnx_dtype
from adapterx.graph.site_rows import SiteRows
from adapterx.manifest import KEY, MASK, Manifest, SiteBase
from adapterx.ops import DOMAIN, VERSION, low_rank_add_function, row_vector_function
from adapterx.site import VECTORS, AdapterSite, SiteTable

FUNCTION_IR_VERSION = 8
# The opset that brought it.
_CAST_LIKE = 15

Put = Callable[[AdapterSite, Ports, Masks], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """What a manifest says beside its sites and ports.

    Args:
        fingerprint: of the base weights
        base_model: what an adapter calls the base
        elsewhere: sites that other files of the export hold
        bases: weights and biases of sites that take gains and shifts
        rows: of a batch, and which sites tell them apart
    """

    fingerprint: str = ""
    base_model: str = ""
    elsewhere: tuple[str, ...] = ()
    bases: Mapping[str, SiteBase] = dataclasses.field(default_factory=dict)
    rows: SiteRows = dataclasses.field(default_factory=SiteRows)


def give_ports(model: ir.Model, sites: SiteTable, options: PortOptions, put: Put, *, origin: Origin) -> Manifest:
    """Change ``model`` in place: every site gets its ports, and ``put`` connects them.

    Args:
        model: that we may change
        sites: one row a site
        options: what kind of ports
        put: called for each site with its values and the masks
        origin: what else goes into the manifest

    Returns:
        The manifest, which the model now carries.
    """
    values, packs = add_ports(model, sites, options)
    as_inputs = options.port != "external"
    masks = Masks(model, as_input=as_inputs)
    for site in sites:
        put(site, values[site.name], masks)
    masks.place()
    opset = model.opset_imports[""]
    functions = [_low_rank_add(sites, opset)]
    if any(port in VECTORS for site in sites for port in site.ports):
        functions.append(row_vector_function(opset))
    model.opset_imports[DOMAIN] = VERSION
    model.functions.update({function.identifier(): function for function in functions})
    model.ir_version = max(model.ir_version, FUNCTION_IR_VERSION)
    manifest = Manifest(
        sites=sites,
        port=options.port,
        dynamic_rank=options.dynamic_rank,
        optional=options.optional,
        fingerprint=origin.fingerprint,
        packs=packs,
        mask=MASK if as_inputs else None,
        row_mask=masks.row_mask,
        location=None if as_inputs else options.location,
        base_model=origin.base_model,
        elsewhere=origin.elsewhere,
        required=tuple(site.name for site in sites if site.name in options.required),
        bases=origin.bases,
        batch=origin.rows.batch,
        unmixed=origin.rows.unmixed,
    )
    model.metadata_props[KEY] = manifest.dumps()
    return manifest


def _low_rank_add(sites: SiteTable, opset: int) -> ir.Function:
    """The one function of all sites: one that casts, where adapters are of another type than activations."""
    multiplied = [site for site in sites if site.is_multiplied]
    if not any(site.activations for site in multiplied):
        return low_rank_add_function(opset)
    types = {onnx_dtype(site) for site in multiplied}
    if len(types) > 1 and opset < _CAST_LIKE:
        met = ", ".join(sorted(t.name.lower() for t in types))
        raise ModelError(
            f"the model has activations of several types ({met}), and its opset {opset} has no CastLike to turn one "
            f"adapter_dtype into each; convert the model to opset {_CAST_LIKE}, or leave adapter_dtype out"
        )
    activations = types.pop() if len(types) == 1 else ir.DataType.UNDEFINED
    return low_rank_add_function(opset, activations=activations, codes=multiplied[0].dtype == "int8")
