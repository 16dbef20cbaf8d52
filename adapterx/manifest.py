"""The manifest: one JSON string in a model's ``metadata_props`` that says where its adapters go.

Reading it needs no weights. `docs/formats.md` is its specification.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from adapterx.adapter import tensor_name
from adapterx.base_weight import BaseWeight
from adapterx.errors import ModelError
from adapterx.site import PORTS, AdapterSite, SiteTable

KEY = "adapterx.manifest"
FORMAT_VERSION = 1
MASK = "adapter_mask"
ROW_MASK = "adapter_row_mask"

Port = Literal["input", "packed", "external"]

_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_DTYPES = _FLOATS | {"int8"}


@dataclasses.dataclass(frozen=True, slots=True)
class Pack:
    """One packed graph input: the same side of several sites, stacked on axis 0 in natural order.

    Args:
        name: the graph input, ``q_proj.lora_A.weight.packed``
        side: ``lora_A``, ``lora_B`` or ``lora_scale``
        sites: the members, in stacking order; all have the same shape
    """

    name: str
    side: str
    sites: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SiteBase:
    """Where the graph has the weight and the bias of a site's base, for adapters whose arithmetic they are part of.

    Args:
        weight: how the weight is stored, ``None`` where it cannot be read
        bias: name of the initializer, ``""`` when there is no bias
    """

    weight: BaseWeight | None
    bias: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"weight": None if self.weight is None else self.weight.as_dict(), "bias": self.bias}


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """A site whose adapter stays in the codes that a quantizer made of it, in the graph's own nodes.

    Args:
        a: how the graph stores ``lora_A``; the tensors are called ``<site>.lora_A.weight`` and, where it has them,
            ``.scale`` and ``.zero_point`` after that
        b: how it stores ``lora_B``
        scale: what the graph multiplies with besides; the ``b`` of an adapter is divided by it first
    """

    a: BaseWeight
    b: BaseWeight
    scale: float

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor of the site in the graph."""
        return (*self.a.tensors.values(), *self.b.tensors.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"a": self.a.as_dict(), "b": self.b.as_dict(), "scale": self.scale}


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that a runtime must know of an extracted model.

    Args:
        sites: one row a site (never two rows of one name: several adapters at a place share its port)
        port: how weights come in: graph ``input``s, ``packed`` inputs (what could not be packed is a plain
            input), or ``external`` initializers whose file does not exist
        dynamic_rank: the rank of a port is symbolic, any rank fits; else exactly ``site.rank``
        optional: a port that is not fed makes its site the base
        fingerprint: SHA-256 over samples of the base weights, ``""`` where none could be read
        packs: packed inputs, empty unless ``port == "packed"``
        mask: name of the ``[n, R]`` mask input, ``None`` in external mode
        row_mask: name of the ``[n, K]`` mask input of gains and shifts, ``None`` where there are none
        location: file name that external initializers point at, ``None`` in the other modes
        base_model: what the exported adapter calls its base, where it was given at extraction, else ``""``
        elsewhere: sites of the same adapters that other files of the export hold (an encoder's, in a decoder)
        required: sites whose base the graph does not have, since they were trained in full: they must be fed
        bases: by site name, for sites that take gains and shifts
        kept: by site name, sites whose adapters stay quantized (external mode only); their rank is fixed, and their
            tensors lie in a file that is there, holding the exported adapter
        batch: graph inputs whose axis 0 counts the rows of a batch
        unmixed: by site name, why the rows of one batch cannot have different adapters there; one for all they can
    """

    sites: SiteTable
    port: Port
    dynamic_rank: bool
    optional: bool
    fingerprint: str
    packs: tuple[Pack, ...] = ()
    mask: str | None = MASK
    row_mask: str | None = None
    location: str | None = None
    base_model: str = ""
    elsewhere: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    bases: Mapping[str, SiteBase] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, Kept] = dataclasses.field(default_factory=dict)
    batch: tuple[str, ...] = ()
    unmixed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def tensor_names(self) -> dict[str, tuple[str, ...]]:
        """Site name -> names of its tensors in adapter files, and in the graph where not packed."""
        return {site.name: tuple(tensor_name(site.name, port) for port in site.graph_ports) for site in self.sites}

    def dumps(self) -> str:
        """The JSON string that goes into the model."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["sites"] = [site.as_dict() for site in self.sites]
        fields["packs"] = [dataclasses.asdict(pack) for pack in self.packs]
        fields["bases"] = {name: base.as_dict() for name, base in self.bases.items()}
        fields["kept"] = {name: kept.as_dict() for name, kept in self.kept.items()}
        fields["unmixed"] = dict(self.unmixed)
        return json.dumps({"format_version": FORMAT_VERSION, **fields}, separators=(",", ":"))

    @classmethod
    def loads(cls, text: str, *, where: str) -> Manifest:
        """Parse and check a manifest.

        Args:
            text: the JSON string
            where: the model's name for messages

        Raises:
            ModelError: not JSON, another format version, or fields that are missing, unknown or of a wrong type.
        """
        try:
            raw = json.loads(text)
            version = raw.pop("format_version")
            if version != FORMAT_VERSION:
                raise ModelError(
                    f"{where}: manifest has format version {version!r}, this adapterx reads {FORMAT_VERSION}; "
                    "extract the model again with this version"
                )
            if raw["port"] not in get_args(Port):
                raise ModelError(f"{where}: manifest has port {raw['port']!r}; expected one of {get_args(Port)}")
            raw["sites"] = SiteTable(_site(site) for site in raw["sites"])
            raw["packs"] = tuple(Pack(p["name"], p["side"], tuple(p["sites"])) for p in raw["packs"])
            raw["elsewhere"] = tuple(raw.get("elsewhere", ()))
            raw["required"] = tuple(raw.get("required", ()))
            raw["batch"] = tuple(str(name) for name in raw.get("batch", ()))
            raw["unmixed"] = {str(site): str(why) for site, why in raw.get("unmixed", {}).items()}
            raw["bases"] = _bases(raw.get("bases", {}))
            raw["kept"] = {name: _kept(kept) for name, kept in raw.get("kept", {}).items()}
            if raw["kept"].keys() - {site.name for site in raw["sites"]} or (raw["kept"] and raw["port"] != "external"):
                raise ValueError("it keeps codes of sites that it does not have, or where nothing is external")
            return cls(**raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{where}: its adapterx manifest is broken ({error}); extract the model again") from None


def _bases(raw: dict[str, Any]) -> dict[str, SiteBase]:
    found = {}
    for name, base in raw.items():
        weight = None if base["weight"] is None else BaseWeight.from_dict(base["weight"])
        found[name] = SiteBase(weight, str(base["bias"]))
    return found


def _kept(raw: dict[str, Any]) -> Kept:
    scale = float(raw["scale"])
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"a site that stays quantized has scale {scale}")
    return Kept(BaseWeight.from_dict(raw["a"]), BaseWeight.from_dict(raw["b"]), scale)


def _site(raw: dict[str, Any]) -> AdapterSite:
    lists: dict[str, Any] = {key: tuple(raw[key]) for key in ("kernel", "ports") if key in raw}
    site = AdapterSite(**(raw | lists))
    sizes = (site.d_in, site.d_out, site.rank, *site.kernel)
    if not site.ports or not set(site.ports) <= set(PORTS):
        raise ValueError(f"site {site.name!r} has ports {site.ports}")
    if site.dtype not in _DTYPES or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"site {site.name!r} has dtype {site.dtype!r} and sizes {sizes}")
    if site.x_dtype not in _FLOATS or (site.activations and not site.is_multiplied):
        raise ValueError(f"site {site.name!r} has dtype {site.dtype!r} beside activations of {site.activations!r}")
    return site


def manifest_of(metadata: Mapping[str, Any], *, where: str) -> Manifest | None:
    """The manifest among a model's metadata, or ``None`` when the model is not one of ours."""
    text = metadata.get(KEY)
    return None if text is None else Manifest.loads(str(text), where=where)
